"""Pictures in: every accepted kind arrives exactly, every other is refused, and nothing is ever cut off silently."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from engine.errors import (
    DisguisedInput,
    InputError,
    ModelError,
    StorageFull,
    TooManyPixels,
    UnreadableInput,
    UnsupportedInput,
)
from engine.geometry import Box, Size
from engine.image import ArrayPicture, decode, from_rgb_float, probe, to_rgb_float

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZE = Size(101, 77)
CHANNELS = (1, 2, 3, 4)
TIFFS = [
    {},
    {"tile": (64, 32)},
    {"compression": "adobe_deflate", "tile": (48, 64), "predictor": True},
    {"compression": "lzw", "rowsperstrip": 7},
    {"compression": "lzw", "predictor": True, "rowsperstrip": 1000},
    {"compression": "packbits", "rowsperstrip": 16},
    {"byteorder": ">", "rowsperstrip": 16},
    {"bigtiff": True, "compression": "adobe_deflate", "tile": (64, 64)},
]


def noise(rng: np.random.Generator, *, channels: int = 3, dtype: str = "uint8", size: Size = SIZE) -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, (size.h, size.w, channels), dtype=dtype, endpoint=True)


def write_tiff(path: Path, pixels: np.ndarray, **options) -> Path:
    channels = pixels.shape[2]
    options.setdefault("photometric", "rgb" if channels >= 3 else "minisblack")
    if channels in (2, 4):
        options.setdefault("extrasamples", ["unassalpha"])
    if channels > 1:
        options.setdefault("planarconfig", "contig")
    tifffile.imwrite(path, pixels[..., 0] if channels == 1 else pixels, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, pixels: np.ndarray, *, extra: bytes = b"", colour: int | None = None) -> Path:
    """A PNG made by hand, because Pillow writes no 16 bit RGB."""
    h, w, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour is None else colour
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(h, -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", w, h, 8 * pixels.itemsize, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )
    return path


def read_all(path: Path, scratch: Path) -> np.ndarray:
    picture = decode(probe(path), scratch)
    pixels = picture.read(Box.of(picture.size))
    assert pixels.shape == (picture.size.h, picture.size.w, picture.channels)
    assert pixels.dtype == picture.dtype
    return pixels


def refused(path: Path, scratch: Path, error: type[InputError]) -> str:
    """Refused, and nothing is left in `scratch`."""
    with pytest.raises(error) as caught:
        decode(probe(path), scratch)
    assert str(path) in str(caught.value)
    assert not list(scratch.glob("*.raw"))
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_png_arrives_exactly(channels, dtype, rng, tmp_path):
    pixels = noise(rng, channels=channels, dtype=dtype)
    assert np.array_equal(read_all(write_png(tmp_path / "a.png", pixels), tmp_path / "s"), pixels)


@pytest.mark.parametrize("options", TIFFS, ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_tiff_arrives_exactly(channels, dtype, options, rng, tmp_path):
    pixels = noise(rng, channels=channels, dtype=dtype)
    assert np.array_equal(read_all(write_tiff(tmp_path / "a.tif", pixels, **options), tmp_path / "s"), pixels)


def test_tiff_in_separate_planes(rng, tmp_path):
    pixels = noise(rng)
    path = write_tiff(tmp_path / "a.tif", np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_all(path, tmp_path / "s"), pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_tiff_with_white_zero_is_turned_over(dtype, rng, tmp_path):
    pixels = noise(rng, channels=1, dtype=dtype)
    path = write_tiff(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert np.array_equal(read_all(path, tmp_path / "s"), np.iinfo(dtype).max - pixels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_arrives_as_its_decoder_gives_it(mode, progressive, rng, tmp_path):
    smooth = np.asarray(Image.fromarray(noise(rng, size=Size(9, 9))).resize((130, 99)))
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth).convert(mode).save(path, quality=95, progressive=progressive, subsampling=0)
    reference = np.asarray(Image.open(path)).reshape(99, 130, -1)
    assert np.array_equal(read_all(path, tmp_path / "s"), reference)


@pytest.mark.parametrize("write", [write_png, write_tiff])
def test_a_dark_16_bit_scan_stays_16_bit(write, rng, tmp_path):
    pixels = (noise(rng, dtype="uint16") % 200).astype(np.uint16)
    path = write(tmp_path / ("a.png" if write is write_png else "a.tif"), pixels)
    assert np.array_equal(read_all(path, tmp_path / "s"), pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_transparent_colour_becomes_alpha(dtype, rng, tmp_path):
    pixels = noise(rng, dtype=dtype)
    key = pixels[5, 6].copy()
    path = write_png(tmp_path / "a.png", pixels, extra=chunk(b"tRNS", key.astype(">u2").tobytes()))
    top = np.iinfo(dtype).max
    alpha = np.where((pixels == key).all(axis=2), 0, top).astype(dtype)
    assert np.array_equal(read_all(path, tmp_path / "s"), np.dstack([pixels, alpha]))


@pytest.mark.parametrize("colours", [2, 3, 7, 200])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palettes_are_expanded_exactly(colours, suffix, rng, tmp_path):
    image = Image.fromarray(noise(rng)).quantize(colours)
    image.save(tmp_path / f"a{suffix}")
    assert np.array_equal(read_all(tmp_path / f"a{suffix}", tmp_path / "s"), np.asarray(image.convert("RGB")))


def test_a_palette_with_a_transparent_entry(rng, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(rng)).quantize(30).save(path, transparency=3)
    assert np.array_equal(read_all(path, tmp_path / "s"), np.asarray(Image.open(path).convert("RGBA")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "fax.tif"])
def test_one_bit_becomes_black_and_white(name, rng, tmp_path):
    bits = noise(rng)[..., 0] > 128
    Image.fromarray(bits).save(tmp_path / name, **({"compression": "group4"} if name == "fax.tif" else {}))
    assert np.array_equal(read_all(tmp_path / name, tmp_path / "s")[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize("depth", [2, 4])
def test_few_bits_of_grey_span_the_whole_range(depth, tmp_path):
    header = struct.pack(">IIBBBBB", 8 // depth, 1, depth, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    last = 2**depth - 1
    data = zlib.compress(bytes([0, last]))  # all zero but the last pixel of the row
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    assert read_all(path, tmp_path / "s").ravel().tolist() == [0] * (8 // depth - 1) + [255]


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "planes.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation, kind, rng, tmp_path):
    pixels = np.asarray(Image.fromarray(noise(rng, size=Size(9, 9))).resize((37, 23)))
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "planes.tif":
        tag = [(274, 3, 1, orientation, True)]
        write_tiff(path, np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate", extratags=tag)
    else:
        Image.fromarray(pixels).save(path, exif=exif)
    stored = pixels if kind != "jpg" else np.asarray(Image.open(path))
    exif_free = Image.fromarray(stored)
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    for turn in turns.get(orientation, []):
        exif_free = exif_free.transpose(turn)
    upright = np.asarray(exif_free)
    info = probe(path)
    assert (info.size, info.orientation) == (Size(*upright.shape[:2]), orientation)
    picture = decode(info, tmp_path / "s")
    assert np.array_equal(picture.read(Box.of(info.size)), upright)
    box = Box(3, 2, 11, 19)
    assert np.array_equal(picture.read(box), upright[box.slices])


@pytest.mark.parametrize("size", [Size(1, 1), Size(1, 10_000), Size(10_000, 1), Size(700, 3)])
@pytest.mark.parametrize("write", [write_png, write_tiff])
def test_extreme_shapes(write, size, rng, tmp_path):
    pixels = noise(rng, size=size)
    path = write(tmp_path / ("a.png" if write is write_png else "a.tif"), pixels)
    assert np.array_equal(read_all(path, tmp_path / "s"), pixels)


def samples(rng: np.random.Generator, folder: Path) -> list[Path]:
    """One small file of every kind."""
    pixels = noise(rng, size=Size(30, 23))
    paths = [write_png(folder / "a.png", pixels)]
    for progressive in (False, True):
        paths.append(folder / f"{progressive}.jpg")
        Image.fromarray(pixels).save(paths[-1], progressive=progressive)
    paths += [write_tiff(folder / f"{num}.tif", pixels, **options) for num, options in enumerate(TIFFS)]
    paths.append(folder / "end.tif")  # its directory lies behind the pixels
    Image.fromarray(pixels).save(paths[-1], compression="tiff_lzw")
    return paths


@pytest.mark.parametrize("num", range(3 + len(TIFFS) + 1))
def test_cut_off_anywhere_is_refused(num, rng, tmp_path):
    path = samples(rng, tmp_path)[num]
    whole = path.read_bytes()
    last_needed = len(whole) - (1 if path.suffix == ".tif" and len(whole) % 2 == 0 else 0)
    lengths = {*range(0, len(whole), 41), *range(len(whole) - 30, last_needed)}
    silent = []
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        try:
            decode(probe(path), tmp_path / "s")
        except UnreadableInput:
            assert not list((tmp_path / "s").glob("*.raw"))
            continue
        silent.append(length)
    path.write_bytes(whole)
    assert decode(probe(path), tmp_path / "s").size == Size(30, 23)
    assert silent == []


@pytest.mark.parametrize("name", ["a.png", "z.tif", "lzw.tif"])
def test_damage_inside_is_refused(name, rng, tmp_path):
    pixels = noise(rng)
    if name == "a.png":
        path = write_png(tmp_path / name, pixels)
    else:
        path = write_tiff(tmp_path / name, pixels, compression="lzw" if "lzw" in name else "zlib", tile=(64, 64))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 60] = b"\xff" * 60
    path.write_bytes(data)
    refused(path, tmp_path / "s", UnreadableInput)


def test_an_absent_tile_is_refused(rng, tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise(rng), tile=(64, 64))
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    with pytest.raises(UnreadableInput, match="4 strips or tiles are needed, 3 have data"):
        probe(path)


def test_a_cut_off_tiff_is_refused_from_its_header(rng, tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise(rng), tile=(64, 64), compression="lzw")
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(UnreadableInput, match=f"it has {len(data) - 100}"):
        probe(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"II*\0\xff\xff\xff\x7f"]
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_garbled_headers_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises((UnreadableInput, DisguisedInput)):
        probe(path)


@pytest.mark.parametrize("seed", range(300))
def test_damaged_files_raise_typed_errors_or_decode(seed, tmp_path):
    rng = np.random.default_rng(seed)
    paths = samples(np.random.default_rng(0), tmp_path)
    path = paths[seed % len(paths)]
    data = bytearray(path.read_bytes())
    span = len(data) if seed % 2 else 200
    for at in rng.integers(0, min(span, len(data)), 3):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
        pixels = read_all(path, tmp_path / "s")
    except InputError:
        return
    assert pixels.ndim == 3


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(UnreadableInput, match=path.name):
            probe(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.gif", "a", "a.PNG.txt"])
def test_disguised_names_are_refused(name, rng, tmp_path):
    write_png(tmp_path / "a.png", noise(rng)).rename(tmp_path / name)
    assert "PNG" in refused(tmp_path / name, tmp_path / "s", DisguisedInput)


def test_other_formats_never_reach_a_decoder(rng, tmp_path):
    image = Image.fromarray(noise(rng))
    for name, named in (("a.gif", "b.png"), ("a.ico", "b.jpg"), ("a.bmp", "b.tif"), ("a.pdf", "c.png")):
        image.save(tmp_path / name)
        refused(tmp_path / name, tmp_path / "s", UnsupportedInput)
        (tmp_path / name).rename(tmp_path / named)
        refused(tmp_path / named, tmp_path / "s", DisguisedInput)


def test_odd_file_names(rng, tmp_path):
    pixels = noise(rng)
    for name in ("a[page=1].png", "ü 漢.PNG", "-x%d.png", "a\udcff.png"):
        assert np.array_equal(read_all(write_png(tmp_path / name, pixels), tmp_path / "s"), pixels)


def test_a_huge_header_is_refused_at_once(tmp_path):
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    started = time.perf_counter()
    with pytest.raises(TooManyPixels, match=r"3,600,000,000 .* 1,073,741,824"):
        probe(path)
    assert time.perf_counter() - started < 0.1


def test_the_pixel_limit_is_inclusive(rng, tmp_path):
    path = write_png(tmp_path / "a.png", noise(rng, size=Size(10, 20)))
    assert probe(path, max_pixels=200).size == Size(10, 20)
    with pytest.raises(TooManyPixels, match="200 pixels, the limit is 199"):
        probe(path, max_pixels=199)


def test_what_cannot_stream_is_limited(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 1)
    path = tmp_path / "interlaced.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(UnsupportedInput, match="1,200,000,000 bytes at once"):
        probe(path)


def test_unsupported_jpegs_and_pngs(rng, tmp_path):
    pixels = noise(rng)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert "CMYK" in refused(tmp_path / "cmyk.jpg", tmp_path / "s", UnsupportedInput)
    frames = [Image.fromarray(255 - pixels)]
    Image.fromarray(pixels).save(tmp_path / "moving.png", save_all=True, append_images=frames)
    assert "animated" in refused(tmp_path / "moving.png", tmp_path / "s", UnsupportedInput)


@pytest.mark.parametrize(
    ("what", "pixels", "options"),
    [
        ("2 pages", np.zeros((2, 20, 20, 3), np.uint8), {"photometric": "rgb"}),
        ("CMYK", np.zeros((20, 20, 4), np.uint8), {"photometric": "separated", "extrasamples": []}),
        ("Lab", np.zeros((20, 20, 3), np.uint8), {"photometric": "cielab"}),
        ("64/64/64 floating-point bits", np.zeros((20, 20, 3), np.float64), {"photometric": "rgb"}),
        ("16/16/16 floating-point bits", np.zeros((20, 20, 3), np.float16), {"photometric": "rgb"}),
        ("signed", np.zeros((20, 20, 3), np.int16), {"photometric": "rgb"}),
        ("32/32/32 bits", np.zeros((20, 20, 3), np.uint32), {"photometric": "rgb"}),
        ("unknown meaning", np.zeros((20, 20, 4), np.uint8), {"extrasamples": ["unspecified"]}),
        ("compression 34925", np.zeros((20, 20, 3), np.uint8), {"compression": "lzma"}),
        ("tiles are too large", np.zeros((20, 20, 3), np.uint8), {"tile": (512, 512)}),
        ("5 channels", np.zeros((20, 20, 5), np.uint8), {"photometric": "rgb", "extrasamples": [2, 0]}),
    ],
)
def test_unsupported_tiffs(what, pixels, options, tmp_path):
    if pixels.ndim == 4:
        tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    else:
        write_tiff(tmp_path / "a.tif", pixels, **options)
    assert what in refused(tmp_path / "a.tif", tmp_path / "s", UnsupportedInput)


def test_a_thumbnail_beside_the_picture_is_no_second_page(rng, tmp_path):
    pixels = noise(rng)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pixels, photometric="rgb", metadata=None)
        writer.write(pixels[::4, ::4], photometric="rgb", metadata=None, subfiletype=1)
    assert np.array_equal(read_all(tmp_path / "a.tif", tmp_path / "s"), pixels)


def test_private_tags_do_no_harm(rng, tmp_path):
    pixels = noise(rng)
    tags = [(65001, "s", 0, "hello", True), (33550, "d", 3, (1.0, 2.0, 3.0), True)]
    assert np.array_equal(read_all(write_tiff(tmp_path / "a.tif", pixels, extratags=tags), tmp_path / "s"), pixels)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_profile_and_resolution_are_carried(name, rng, tmp_path):
    image = Image.fromarray(noise(rng))
    image.save(tmp_path / name, icc_profile=ICC, dpi=(300, 600))
    info = probe(tmp_path / name)
    assert info.metadata.icc == ICC
    assert info.metadata.resolution_px_per_mm == pytest.approx((600 / 25.4, 300 / 25.4), rel=1e-3)
    image.save(tmp_path / f"bare-{name}")
    bare = probe(tmp_path / f"bare-{name}")
    assert (bare.metadata.icc, bare.metadata.resolution_px_per_mm) == (None, None)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_profile_for_other_channels_is_left_out(name, rng, tmp_path):
    Image.fromarray(noise(rng)[..., 0]).save(tmp_path / name, icc_profile=ICC)
    assert probe(tmp_path / name).metadata.icc is None


def test_a_changed_file_is_noticed(rng, tmp_path):
    path = write_png(tmp_path / "a.png", noise(rng))
    info = probe(path)
    write_png(path, noise(rng, size=Size(50, 50)))
    with pytest.raises(UnreadableInput, match="changed"):
        decode(info, tmp_path / "s")


def test_the_same_name_with_new_pixels_is_read_anew(rng, tmp_path):
    for _ in range(3):
        pixels = noise(rng)
        assert np.array_equal(read_all(write_png(tmp_path / "a.png", pixels), tmp_path / "s"), pixels)


def test_nothing_stays_open_or_mapped(rng, tmp_path):
    for path in samples(rng, tmp_path):
        read_all(path, tmp_path / "s")
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [name for name in held if str(tmp_path) in name] == []
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_said_before_decoding(rng, tmp_path, monkeypatch):
    info = probe(write_png(tmp_path / "a.png", noise(rng)))
    monkeypatch.setattr("engine.staged.free_bytes", lambda path: 100)
    with pytest.raises(StorageFull, match=f"{101 * 77 * 3:,} bytes are needed .* 100 are free"):
        decode(info, tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


def test_boxes_outside_are_refused(rng, tmp_path):
    picture = decode(probe(write_png(tmp_path / "a.png", noise(rng))), tmp_path / "s")
    for source in (picture, ArrayPicture(picture.read(Box.of(picture.size)))):
        for box in (Box(-1, 0, 5, 5), Box(0, 0, 102, 5), Box(3, 3, 3, 9)):
            with pytest.raises(ValueError, match="outside"):
                source.read(box)


def test_an_array_reads_like_a_file(rng, tmp_path):
    pixels = noise(rng, channels=4, dtype="uint16")
    picture = decode(probe(write_png(tmp_path / "a.png", pixels)), tmp_path / "s")
    array = ArrayPicture(pixels)
    assert (array.size, array.channels, array.dtype) == (picture.size, picture.channels, picture.dtype)
    box = Box(10, 20, 50, 70)
    array.read(box)[:] = 0  # a copy
    assert np.array_equal(array.read(box), picture.read(box))
    assert ArrayPicture(pixels).sha256 != ArrayPicture(pixels[::-1]).sha256
    for bad in (pixels[..., :0], pixels.astype(np.float32), np.zeros((2, 2, 5), np.uint8)):
        with pytest.raises(UnsupportedInput):
            ArrayPicture(bad)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_float_and_back_keeps_every_level(channels, dtype):
    top = np.iinfo(dtype).max
    levels = np.arange(top + 1, dtype=dtype).reshape(-1, 16)
    pixels = np.repeat(levels[..., None], channels, axis=2)
    rgb = to_rgb_float(pixels)
    assert (rgb.dtype, rgb.min(), rgb.max()) == (np.float32, 0, 1)
    alpha = levels.astype(np.float32) / np.float32(top) if channels in (2, 4) else None
    assert np.array_equal(from_rgb_float(rgb, channels=channels, dtype=dtype, alpha=alpha), pixels)


def test_from_float_clips_rounds_to_even_and_means():
    rgb = np.array([[[-1, 0.5 / 255, 2.0], [1.5 / 255, 1.5 / 255, 1.5 / 255]]], np.float32)
    assert from_rgb_float(rgb, channels=3, dtype="uint8").tolist() == [[[0, 0, 255], [2, 2, 2]]]
    grey = np.array([[[0.0, 0.3, 0.9]]], np.float32)
    assert from_rgb_float(grey, channels=1, dtype="uint8").tolist() == [[[102]]]
    with pytest.raises(ValueError, match="alpha"):
        from_rgb_float(rgb, channels=4, dtype="uint8")
    rgb[0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="not numbers"):
        from_rgb_float(rgb, channels=3, dtype="uint8")


def test_probe_reads_little(rng, tmp_path, monkeypatch):
    path = write_png(tmp_path / "a.png", noise(rng, size=Size(2000, 2000)))
    taken = 0
    real_open = Path.open

    class Counted(io.BufferedReader):
        def read(self, size=-1):
            nonlocal taken
            data = super().read(size)
            taken += len(data)
            return data

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Counted(real_open(self, "rb", buffering=0)))
    assert probe(path).size == Size(2000, 2000)
    assert 0 < taken < 200
