"""Outputs in other people's tools: each reader finds the levels that it knows of, and the very pixels of the canvas."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pytest
import pyvips
import tifffile
import zarr
from ome_zarr import OMEZarrMultiscale
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v05 import Image as ImageV05
from PIL import Image

from engine.geometry import Box, Size
from engine.metadata import Metadata
from engine.tiling import tiff_export
from engine.tiling.canvas import Canvas
from engine.tiling.execute import run
from engine.tiling.export import SUFFIX, export
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard

SIZE = Size(301, 517)
LEVEL_SIZES = [Size(301, 517), Size(151, 259), Size(76, 130), Size(38, 65), Size(19, 33)]
KINDS = {"RGB": (3, "uint8"), "grey16": (1, "uint16"), "RGBA": (4, "uint8")}


def picture(channels: int, dtype: str) -> np.ndarray:
    """Ramps with a little noise: close to its JPEG, yet no two regions, rows or channels are alike."""
    y, x = np.mgrid[: SIZE.h, : SIZE.w]
    ramps = [y / SIZE.h, x / SIZE.w, (x + y) / (SIZE.h + SIZE.w), 1 - y / SIZE.h]
    noise = np.random.default_rng(0).uniform(0, 0.02, (SIZE.h, SIZE.w, channels))
    return ((np.stack(ramps[:channels], -1) * 0.98 + noise) * np.iinfo(dtype).max).astype(dtype)


@pytest.fixture(scope="module", params=KINDS)
def canvas(request, tmp_path_factory) -> Canvas:
    channels, dtype = KINDS[request.param]
    out = tmp_path_factory.mktemp("out")
    grid = Grid(SIZE, 64, 128)
    plan = Plan("scan", SIZE, channels, dtype, grid, "a", "none", "lite", "b", {"scale": 1}, 0, 0)
    pixels = picture(channels, dtype)
    with Canvas.open(plan, out) as canvas:
        halve = HalveShard(canvas)

        def work(key: ShardKey) -> np.ndarray:
            return halve(key) if key.level else pixels[grid.box(key).slices]

        list(run(canvas, grid.all_keys(), work))
        canvas.publish(out / "scan.zarr", replace=False)
    assert list(grid.level_sizes) == LEVEL_SIZES
    return Canvas.load(out / "scan.zarr")


def level_of(canvas: Canvas, level: int) -> np.ndarray:
    return canvas.read(Box.of(LEVEL_SIZES[level]), level=level)


def exported(canvas: Canvas, fmt: str, folder: Path) -> Path:
    path = folder / f"scan{SUFFIX[fmt]}"
    plan = canvas.plan
    export(
        lambda level, box: canvas.read(box, level=level),
        level_sizes=LEVEL_SIZES,
        channels=plan.channels,
        dtype=plan.dtype,
        fmt=fmt,
        path=path,
        metadata=Metadata(),
    )
    return path


def with_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def with_opencv(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def with_dask(path: Path) -> list[np.ndarray]:
    datasets = json.loads((path / "zarr.json").read_bytes())["attributes"]["ome"]["multiscales"][0]["datasets"]
    return [da.from_zarr(str(path), component=dataset["path"]).compute() for dataset in datasets]


def with_ome_zarr_reader(path: Path) -> list[np.ndarray]:
    [node] = Reader(parse_url(path))()
    return [plane.compute() for plane in node.data]


def with_ome_zarr_multiscale(path: Path) -> list[np.ndarray]:
    return [image.data.compute() for image in OMEZarrMultiscale.from_ome_zarr(str(path)).images]


@pytest.mark.parametrize("read", [with_dask, with_ome_zarr_reader, with_ome_zarr_multiscale], ids=lambda f: f.__name__)
def test_every_level_of_an_ome_zarr(read, canvas):
    levels = read(canvas.root)
    assert len(levels) == len(LEVEL_SIZES)
    for level, planes in enumerate(levels):
        assert planes.dtype == canvas.plan.dtype
        np.testing.assert_array_equal(np.moveaxis(planes, 0, 2), level_of(canvas, level))


def test_ome_zarr_py_knows_axes_scales_and_channels(canvas):
    image = OMEZarrMultiscale.from_ome_zarr(str(canvas.root))
    for level, size in zip(image.images, LEVEL_SIZES, strict=True):
        assert (level.name, tuple(level.axes)) == ("scan", ("c", "y", "x"))
        assert level.scale == pytest.approx({"c": 1, "y": SIZE.h / size.h, "x": SIZE.w / size.w})
    names = {1: ["grey"], 3: ["red", "green", "blue"], 4: ["red", "green", "blue", "alpha"]}[canvas.plan.channels]
    assert [channel["label"] for channel in image.omero.model_dump()["channels"]] == names
    [node] = Reader(parse_url(canvas.root))()
    assert [axis["type"] for axis in node.metadata["axes"]] == ["channel", "space", "space"]
    assert node.metadata["channel_names"] == names
    assert node.metadata["contrast_limits"] == [[0, np.iinfo(canvas.plan.dtype).max]] * len(names)


def test_the_ome_zarr_is_valid_in_version_0_5(canvas):
    group = zarr.open_group(canvas.root, mode="r")
    found = ImageV05.from_zarr(group)
    assert found.attributes.ome.version == "0.5"
    assert [dataset.path for dataset in found.attributes.ome.multiscales[0].datasets] == list("01234")
    wrong = found.model_dump()
    wrong["attributes"]["ome"]["multiscales"][0]["axes"].pop()
    with pytest.raises(ValueError, match="axes"):  # the validator does look
        ImageV05.model_validate(wrong)


@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
def test_every_level_of_a_tiff(big, canvas, tmp_path, monkeypatch):
    if big:
        monkeypatch.setattr(tiff_export, "_CLASSIC_BYTES", 0)
    path = exported(canvas, "tiff", tmp_path)
    wanted = [np.squeeze(level_of(canvas, level)) for level in range(len(LEVEL_SIZES))]
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff is big
        [series] = file.series
        assert series.is_pyramidal
        for level, pixels in zip(series.levels, wanted, strict=True):
            np.testing.assert_array_equal(level.asarray(), pixels)
    load: Callable[..., pyvips.Image] = partial(pyvips.Image.tiffload, str(path), fail_on="warning")
    assert load().get("n-subifds") == len(wanted) - 1
    for level, pixels in enumerate(wanted):
        np.testing.assert_array_equal(np.squeeze(load(subifd=level - 1).numpy()), pixels)
    with Image.open(path) as image:
        assert image.n_frames == 1  # a reader of pages takes no reduced level for a page
    np.testing.assert_array_equal(with_pillow(path), wanted[0])
    shown = wanted[0]
    if canvas.plan.channels == 4:  # OpenCV multiplies the colours of any TIFF whose alpha is straight
        alpha = shown[..., 3:]
        shown = np.concatenate([np.round(shown[..., :3] / 255 * alpha).astype(np.uint8), alpha], -1)
    np.testing.assert_array_equal(with_opencv(path), shown)


@pytest.mark.parametrize("fmt", ["png", "jp2"])
@pytest.mark.parametrize("read", [with_pillow, with_opencv], ids=lambda f: f.__name__)
def test_the_pixels_of_a_lossless_file(read, fmt, canvas, tmp_path):
    pixels = read(exported(canvas, fmt, tmp_path))
    assert pixels.dtype == canvas.plan.dtype
    np.testing.assert_array_equal(pixels, np.squeeze(level_of(canvas, 0)))


@pytest.mark.parametrize("canvas", ["RGB"], indirect=True)
@pytest.mark.parametrize("read", [with_pillow, with_opencv], ids=lambda f: f.__name__)
def test_a_jpeg_is_close(read, canvas, tmp_path):
    error = read(exported(canvas, "jpeg", tmp_path)).astype(int) - level_of(canvas, 0)
    assert np.abs(error).mean() < 1.5


@pytest.mark.parametrize(
    ("long_side_px", "taken"),
    [(513, True), (1024, True), (1025, False), (1536, False), (2046, False), (2047, False), (2049, False)],
)
def test_sizes_that_openseadragon_takes_for_levels_are_the_levels(long_side_px, taken, tmp_path):
    """It does where they, with the full size, are as many as the scale factors, and each is near to one of them."""
    pixels = np.zeros((90, long_side_px, 3), np.uint8)
    export(
        lambda _, box: pixels[box.slices],
        level_sizes=[Size(*pixels.shape[:2])],
        channels=3,
        dtype="uint8",
        fmt="iiif",
        path=tmp_path / "a.iiif",
        metadata=Metadata(),
    )
    info = json.loads((tmp_path / "a.iiif" / "info.json").read_bytes())
    full = (info["width"], info["height"])
    sizes = sorted({(size["width"], size["height"]) for size in info["sizes"]} | {full}, reverse=True)
    factors = info["tiles"][0]["scaleFactors"]
    near = [tuple(int(side / part + 0.5) for side, part in zip(full, size, strict=True)) for size in sizes]
    assert (near == [(factor, factor) for factor in factors]) == taken
    if taken:
        assert sizes == [tuple(-(-side // factor) for side in full) for factor in factors]
