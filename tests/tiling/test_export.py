"""Pictures out: the file holds exactly the pixels, appears whole or not at all, and is made in bounded memory."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms

from engine.errors import OutputTooLarge, OutputUnsupported, StorageError, StorageFull, StorageReadOnly
from engine.geometry import Box, Size
from engine.image import decode, probe
from engine.metadata import Metadata
from engine.tiling.export import SUFFIX, check_format, export

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZE = Size(700, 1030)


def noise(rng: np.random.Generator, *, channels: int, dtype: str = "uint8", size: Size = SIZE) -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, (size.h, size.w, channels), dtype=dtype, endpoint=True)


def write(pixels: np.ndarray, path: Path, fmt: str, **options) -> Path:
    h, w, channels = pixels.shape
    read = options.pop("read", lambda box: pixels[box.slices])
    metadata = Metadata(**options)
    export(
        lambda level, box: read(box),
        level_sizes=[Size(h, w)],
        channels=channels,
        dtype=pixels.dtype.name,
        fmt=fmt,
        path=path,
        metadata=metadata,
    )
    return path


def with_vips(path: Path) -> np.ndarray:
    image = pyvips.Image.new_from_file(str(path), access="sequential")
    return image.numpy().reshape(image.height, image.width, image.bands)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiff_holds_the_pixels(channels, dtype, rng, tmp_path):
    pixels = noise(rng, channels=channels, dtype=dtype)
    path = write(pixels, tmp_path / "a.tif", "tiff", icc=ICC if channels >= 3 else None)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray().reshape(pixels.shape), pixels)
        assert (page.tilelength, page.tilewidth) == (512, 512)
        assert list(page.extrasamples) == ([2] if channels in (2, 4) else [])
    assert np.array_equal(with_vips(path), pixels)
    assert np.array_equal(decode(probe(path), tmp_path / "s").read(Box.of(SIZE)), pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_holds_the_pixels(channels, dtype, rng, tmp_path):
    pixels = noise(rng, channels=channels, dtype=dtype)
    path = write(pixels, tmp_path / "a.png", "png", icc=ICC if channels >= 3 else None)
    assert np.array_equal(with_vips(path), pixels)
    if dtype == "uint8":
        assert np.array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)
    assert np.array_equal(decode(probe(path), tmp_path / "s").read(Box.of(SIZE)), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_and_keeps_full_colour(channels, rng, tmp_path):
    small = noise(rng, channels=3, size=Size(30, 40))
    pixels = np.asarray(Image.fromarray(small).resize((1030, 700), Image.Resampling.BICUBIC))[..., :channels]
    path = write(pixels, tmp_path / "a.jpg", "jpeg")
    image = Image.open(path)
    error = np.asarray(image).reshape(pixels.shape).astype(int) - pixels
    assert np.abs(error).mean() < 1.5
    if channels == 3:
        assert [part[1:3] for part in image.layer] == [(1, 1)] * 3


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize(
    "size", [Size(1, 1), Size(17, 100), Size(1, 3000), Size(3000, 1), Size(512, 1024), Size(513, 511)]
)
def test_all_shapes(fmt, size, rng, tmp_path):
    pixels = noise(rng, channels=3, size=size)
    path = write(pixels, tmp_path / f"a{SUFFIX[fmt]}", fmt)
    read = decode(probe(path), tmp_path / "s").read(Box.of(size))
    assert read.shape == pixels.shape
    assert fmt == "jpeg" or np.array_equal(read, pixels)


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_profile_and_resolution_are_carried(fmt, rng, tmp_path):
    pixels = noise(rng, channels=3, size=Size(40, 50))
    path = tmp_path / f"a{SUFFIX[fmt]}"
    info = probe(write(pixels, path, fmt, icc=ICC, resolution_px_per_mm=(600 / 25.4, 300 / 25.4)))
    assert info.metadata.icc == ICC
    assert info.metadata.resolution_px_per_mm == pytest.approx((600 / 25.4, 300 / 25.4), rel=1e-3)
    bare = probe(write(pixels, path, fmt))
    assert bare.metadata.icc is None
    assert bare.metadata.resolution_px_per_mm is None or bare.metadata.resolution_px_per_mm == pytest.approx(
        (2.835, 2.835), abs=1e-3
    )


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_reads_are_small_boxes_in_rows(fmt, rng, tmp_path):
    pixels = noise(rng, channels=3, size=Size(1100, 1500))
    boxes: list[Box] = []

    def read(box: Box) -> np.ndarray:
        boxes.append(box)
        return pixels[box.slices]

    write(pixels, tmp_path / f"a{SUFFIX[fmt]}", fmt, read=read)
    assert boxes == sorted(boxes)
    assert len(boxes) == 9
    assert max(box.size.long_side for box in boxes) == 512


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_an_error_leaves_nothing_and_keeps_the_old(fmt, rng, tmp_path):
    pixels = noise(rng, channels=3, size=Size(1100, 600))
    path = tmp_path / f"a{SUFFIX[fmt]}"
    path.write_bytes(b"old")

    def failing(box: Box) -> np.ndarray:
        if box.y0 >= 512:
            raise RuntimeError("stopped")
        return pixels[box.slices]

    with pytest.raises(RuntimeError, match="stopped"):
        write(pixels, path, fmt, read=failing)
    with pytest.raises(ValueError, match="was read as"):
        write(pixels, path, fmt, read=lambda box: pixels[box.slices].astype(np.uint16))
    with pytest.raises(ValueError, match="was read as"):
        write(pixels, path, fmt, read=lambda box: pixels[box.slices][:-1])
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [(path.name, b"old")]
    write(pixels, path, fmt)
    assert probe(path).size == Size(1100, 600)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize("limit_bytes", [100_000, 2_400_000])
def test_a_refused_write_is_a_storage_error(fmt, limit_bytes, rng, tmp_path):
    pixels = noise(rng, channels=3, size=Size(900, 900))
    kind, hard = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    ample_bytes = {"tiff": 2_430_000, "png": 3_000_000, "jpeg": 3_000_000}[fmt]
    resource.setrlimit(kind, (min(limit_bytes, ample_bytes), hard))
    try:
        with pytest.raises(StorageError, match=r"a\."):
            write(pixels, tmp_path / f"a{SUFFIX[fmt]}", fmt)
    finally:
        resource.setrlimit(kind, (hard, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fmt", ["png", "jpeg"])
def test_a_disk_that_fills_up_while_encoding(fmt, rng, tmp_path, monkeypatch):
    pixels = noise(rng, channels=3, size=Size(900, 900))
    monkeypatch.setattr("engine.vips.FileTarget._write", _full)
    with pytest.raises(StorageFull, match="bytes free"):
        write(pixels, tmp_path / f"a{SUFFIX[fmt]}", fmt)
    assert list(tmp_path.iterdir()) == []


def _full(target, data: bytes) -> int:
    target.error = OSError(28, os.strerror(28))
    return -1


def test_a_folder_that_is_a_file(rng, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StorageReadOnly):
        write(noise(rng, channels=3), tmp_path / "out" / "a.png", "png")


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_nothing_stays_open(fmt, rng, tmp_path):
    write(noise(rng, channels=3), tmp_path / f"a{SUFFIX[fmt]}", fmt)
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [name for name in held if str(tmp_path) in name] == []


@pytest.mark.parametrize(
    ("fmt", "channels", "dtype", "size", "error", "words"),
    [
        ("jpeg", 3, "uint8", Size(10, 65_501), OutputTooLarge, "65501x10.*65,500.*tiff"),
        ("png", 3, "uint8", Size(1_000_001, 10), OutputTooLarge, "1,000,000"),
        ("jpeg", 4, "uint8", SIZE, OutputUnsupported, "alpha.*png"),
        ("jpeg", 2, "uint8", SIZE, OutputUnsupported, "alpha.*png"),
        ("jpeg", 3, "uint16", SIZE, OutputUnsupported, "16.*png"),
        ("gif", 3, "uint8", SIZE, OutputUnsupported, "ome-zarr, tiff, png, jpeg, jp2, iiif"),
    ],
)
def test_what_a_format_cannot_hold(fmt, channels, dtype, size, error, words, tmp_path):
    with pytest.raises(error, match=words):
        check_format(fmt, size=size, channels=channels, dtype=dtype)
    with pytest.raises(error):
        export(
            lambda level, box: 1 / 0,
            level_sizes=[size],
            channels=channels,
            dtype=dtype,
            fmt=fmt,
            path=tmp_path / "a",
            metadata=Metadata(),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_limits_are_what_the_encoders_take(tmp_path):
    pixels = np.zeros((1, 65_500, 1), np.uint8)
    assert probe(write(pixels, tmp_path / "a.jpg", "jpeg")).size == Size(1, 65_500)
    pixels = np.zeros((1, 1_000_000, 1), np.uint8)
    assert probe(write(pixels, tmp_path / "a.png", "png")).size == Size(1, 1_000_000)
    for fmt in ("ome-zarr", "tiff"):
        check_format(fmt, size=Size(2_000_000, 2_000_000), channels=4, dtype="uint16")


PROBE = """
import sys
import numpy as np
from pathlib import Path
from engine.geometry import Size
from engine.memory import process_memory
from engine.metadata import Metadata
from engine.tiling.export import export
side = int(sys.argv[1])
base = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
export(lambda level, box: base[: box.size.h, : box.size.w], level_sizes=[Size(side, 4096)], channels=3, dtype="uint8",
       fmt=sys.argv[2], path=Path(sys.argv[3]), metadata=Metadata())
print(process_memory("VmHWM"))
"""


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_memory_does_not_grow_with_height(fmt, tmp_path):
    def peak_bytes(side_px: int) -> int:
        command = [sys.executable, "-c", PROBE, str(side_px), fmt, str(tmp_path / "a")]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    low, high = peak_bytes(1024), peak_bytes(8192)
    assert high - low < 20 << 20  # the picture grew by 88 MB
