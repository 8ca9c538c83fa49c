"""The folder for IIIF viewers: every address that info.json promises is there, and shows the picture in sRGB."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from engine.errors import OutputTooLarge
from engine.geometry import Size, ceil_div
from engine.metadata import Metadata
from engine.tiling.export import check_format, export

BASE = "https://archive.example/pictures/"


def picture(h: int, w: int, channels: int, dtype: str = "uint8") -> np.ndarray:
    """Smooth, so that JPEG is close to it."""
    y, x = np.mgrid[:h, :w]
    planes = [y * 200 / h + 20, x * 200 / w + 20, (x + y) * 200 / (h + w) + 20, np.full((h, w), 255)]
    planes = [planes[0], planes[3]][:channels] if channels <= 2 else planes[:channels]
    return np.stack(planes, -1).astype(dtype) * (257 if dtype == "uint16" else 1)


def write(path: Path, pixels: np.ndarray, icc: bytes | None = None) -> Path:
    size = Size(*pixels.shape[:2])
    options = {"channels": pixels.shape[2], "dtype": pixels.dtype.name, "metadata": Metadata(icc=icc)}
    export(lambda _, box: pixels[box.slices], level_sizes=[size], fmt="iiif", path=path, iiif_base=BASE, **options)
    return path


def promised(info: dict) -> set[str]:
    """Every image address that a viewer may build from info.json (Image API 3.0, sections 4.7, 5.4 and 5.6)."""
    height, width, tile = info["height"], info["width"], info["tiles"][0]["width"]
    found = {"full/max/0/default.jpg"} | {f"full/{s['width']},{s['height']}/0/default.jpg" for s in info["sizes"]}
    for factor in info["tiles"][0]["scaleFactors"]:
        step = tile * factor
        for y in range(0, height, step):
            for x in range(0, width, step):
                h, w = min(step, height - y), min(step, width - x)
                region = "full" if (h, w) == (height, width) else f"{x},{y},{w},{h}"
                found.add(f"{region}/{ceil_div(w, factor)},{ceil_div(h, factor)}/0/default.jpg")
    return found


@pytest.mark.parametrize("size", [(40, 50), (512, 512), (513, 700), (1500, 2100), (1300, 300)])
def test_every_promised_address_is_there(size, tmp_path):
    pixels = picture(*size, 3)
    folder = write(tmp_path / "a.iiif", pixels)
    info = json.loads((folder / "info.json").read_bytes())
    assert info["@context"] == "http://iiif.io/api/image/3/context.json"
    assert (info["id"], info["type"], info["profile"]) == (BASE + "a.iiif", "ImageService3", "level0")
    assert (info["height"], info["width"]) == size
    made = {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")}
    assert made == promised(info)
    whole = np.zeros_like(pixels)
    for name in made:
        with Image.open(folder / name) as image:
            region, shown = name.split("/")[:2]
            if shown != "max":
                assert image.size == tuple(map(int, shown.split(",")))
            x, y, w, h = (0, 0, *size[::-1]) if region == "full" else tuple(map(int, region.split(",")))
            if image.size == (w, h):
                whole[y : y + h, x : x + w] = np.asarray(image)
    assert np.abs(whole.astype(int) - pixels).max() <= 6
    with Image.open(folder / "full/max/0/default.jpg") as image:
        assert max(image.size) == min(max(size), 1024)
        assert image.width <= info.get("maxWidth", size[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.iiif"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_kinds_of_pictures_are_shown_in_8_bit(channels, dtype, tmp_path):
    pixels = picture(60, 80, channels, dtype)
    with Image.open(write(tmp_path / "a.iiif", pixels) / "full/max/0/default.jpg") as image:
        assert image.mode == ("L" if channels <= 2 else "RGB")
        shown = np.asarray(image).reshape(60, 80, -1).astype(int)
    wanted = pixels[..., : 1 if channels <= 2 else 3] // (257 if dtype == "uint16" else 1)
    assert np.abs(shown - wanted).max() <= 6


def test_transparent_becomes_white(tmp_path):
    pixels = picture(60, 80, 4)
    pixels[..., 3] = 0
    with Image.open(write(tmp_path / "a.iiif", pixels) / "full/max/0/default.jpg") as image:
        assert np.asarray(image).min() >= 250


def test_colours_go_through_the_profile(tmp_path):
    """A profile whose red is blue and whose blue is red: only a reader that applies it shows the right colours."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {bytes(icc[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(int.from_bytes(icc[128:132], "big"))}
    red, blue = at[b"rXYZ"], at[b"bXYZ"]
    icc[red : red + 4], icc[blue : blue + 4] = icc[blue : blue + 4], icc[red : red + 4]
    pixels = picture(60, 80, 3)
    with Image.open(write(tmp_path / "a.iiif", pixels, bytes(icc)) / "full/max/0/default.jpg") as image:
        shown = np.asarray(image).astype(int)
    through = ImageCms.profileToProfile(
        Image.fromarray(pixels), io.BytesIO(bytes(icc)), ImageCms.createProfile("sRGB"), renderingIntent=1
    )
    assert np.abs(shown - np.asarray(through)).max() <= 8
    assert np.abs(shown - pixels).max() > 100


def test_a_folder_is_replaced_whole_and_nothing_is_left_on_an_error(tmp_path):
    folder = write(tmp_path / "a.iiif", picture(40, 50, 3))
    (folder / "old").write_bytes(b"")

    def failing(level, box):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        export(
            failing,
            level_sizes=[Size(9, 9)],
            channels=3,
            dtype="uint8",
            fmt="iiif",
            path=folder,
            metadata=Metadata(),
        )
    assert (folder / "old").exists()
    write(folder, picture(40, 60, 3))
    assert not (folder / "old").exists()
    assert json.loads((folder / "info.json").read_bytes())["width"] == 60
    assert [path.name for path in tmp_path.iterdir()] == ["a.iiif"]


def test_jp2_and_iiif_have_limits(tmp_path):
    with pytest.raises(OutputTooLarge, match=r"603,979,776 bytes.*536,870,912"):
        check_format("jp2", size=Size(12288, 8192), channels=3, dtype="uint16")
    check_format("jp2", size=Size(8192, 8192), channels=4, dtype="uint16")
    with pytest.raises(OutputTooLarge, match="10,000,000"):
        check_format("iiif", size=Size(10_000_001, 4), channels=3, dtype="uint8")
