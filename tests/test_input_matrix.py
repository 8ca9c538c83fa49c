"""Every colour mode in every container, against pixels made by numpy and written by other libraries.

Exact unless a cell says otherwise: JPEG and lossy WebP are compared with Pillow's decoder, CMYK with Pillow's ImageCms
through the same profile.
"""

import io
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
import zarr
from PIL import Image, ImageCms

from engine.errors import InputError, TooManyPixels, UnreadableInput, UnsupportedInput
from engine.geometry import Box, Size
from engine.image import ImageInfo, decode, digest, probe
from tests.test_image import chunk, read_all, write_png, write_tiff

CMYK_PROFILE = bytes(pyvips.Image.profile_load("cmyk"))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
H, W = 37, 53
CMYK_LEVELS = 2
"""lcms' 8-bit and 16-bit arithmetic differ by one level, two versions of it by one more."""


def noise(channels: int, dtype: str = "uint8", seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (H, W, channels), dtype=dtype, endpoint=True)


def smooth(channels: int = 3) -> np.ndarray:
    """Pixels that JPEG keeps well."""
    small = np.random.default_rng(2).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((W, H), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


@dataclass(frozen=True)
class Cell:
    name: str
    write: Callable[[Path], np.ndarray | str]
    """Writes the file; returns its pixels `(h, w, c)`, or a part of the message that refuses it."""
    levels: int = 0
    """How far a pixel may be from the reference."""
    icc: bytes | None = None
    converted: str | None = None


def by_pillow(pixels: np.ndarray, **options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(pixels.squeeze()).save(path, **options)
        return pixels

    return write


def by_tifffile(pixels: np.ndarray, expected: np.ndarray | str | None = None, **options: object):
    def write(path: Path) -> np.ndarray | str:
        planes = options.get("planarconfig") == "separate"
        stored = np.ascontiguousarray(np.moveaxis(pixels, 2, 0)) if planes else pixels
        if planes:
            tifffile.imwrite(path, stored, **options)
        else:
            write_tiff(path, stored, **options)
        return pixels if expected is None else expected

    return write


def by_hand(pixels: np.ndarray, **options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        write_png(path, pixels, **options)
        return pixels

    return write


def one_bit(**options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        bits = noise(1)[..., 0] > 128
        Image.fromarray(bits).save(path, **options)
        return np.where(bits, 255, 0).astype(np.uint8)[..., None]

    return write


def one_bit_white_zero(path: Path) -> np.ndarray:
    bits = noise(1)[..., 0] > 128
    tifffile.imwrite(path, bits, photometric="miniswhite")
    return np.where(bits, 0, 255).astype(np.uint8)[..., None]


def palette(mode: str, **options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        image = Image.fromarray(smooth()).quantize(30)
        image.save(path, **options)
        return np.asarray(Image.open(path).convert(mode))

    return write


def deep_palette(bits: int, low: bool = True) -> Callable[[Path], np.ndarray | str]:
    def write(path: Path) -> np.ndarray | str:
        rng = np.random.default_rng(3)
        colours = rng.integers(0, 65536 if low else 256, (3, 1 << bits), dtype=np.uint16)
        index = rng.integers(0, 1 << bits, (H, W)).astype("uint8" if bits == 8 else "uint16")
        tifffile.imwrite(path, index, photometric="palette", colormap=colours)
        return np.moveaxis(colours[:, index], 0, 2) if low else "up to 255 of 65535"

    return write


def transparent_colour(channels: int, dtype: str) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        pixels = noise(channels, dtype)
        key = pixels[5, 6].copy()
        write_png(path, pixels, extra=chunk(b"tRNS", key.astype(">u2").tobytes()))
        alpha = np.where((pixels == key).all(axis=2), 0, np.iinfo(dtype).max).astype(dtype)
        return np.dstack([pixels, alpha])

    return write


def in_srgb(inks: Image.Image) -> np.ndarray:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(CMYK_PROFILE))
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(inks, profile, srgb, renderingIntent=1, outputMode="RGB"))


def inks() -> Image.Image:
    return Image.frombytes("CMYK", (W, H), smooth(4).tobytes())


def cmyk_jpeg(kind: str, profile: bytes | None = CMYK_PROFILE) -> Callable[[Path], np.ndarray | str]:
    def write(path: Path) -> np.ndarray | str:
        if kind == "ycck":
            stored = 255 - smooth(4)
            data = imagecodecs.jpeg8_encode(stored, level=95, colorspace="CMYK", outcolorspace="YCCK")
            data = _with_profile(data, profile)
        else:
            file = io.BytesIO()
            inks().save(file, "JPEG", quality=95, icc_profile=profile)
            data = file.getvalue()
        if kind == "plain":
            data = _without_adobe(data)
        path.write_bytes(data)
        with Image.open(path) as image:
            assert image.mode == "CMYK"
            assert image.info.get("adobe_transform") == {"adobe": 0, "ycck": 2, "plain": None}[kind]
            return "its colours are not defined" if profile is None else in_srgb(image)

    return write


def _with_profile(data: bytes, profile: bytes | None) -> bytes:
    """The profile in pieces, in APP2 segments behind the start of the image."""
    parts = [] if profile is None else [profile[at : at + 65000] for at in range(0, len(profile), 65000)]
    segments = b"".join(
        b"\xff\xe2" + struct.pack(">H", len(part) + 16) + b"ICC_PROFILE\0" + bytes([num + 1, len(parts)]) + part
        for num, part in enumerate(parts)
    )
    return data[:2] + segments + data[2:]


def _without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[:at] + data[at + 16 :]


def cmyk_tiff(dtype: str, profile: bytes | None = CMYK_PROFILE, **options: object):
    def write(path: Path) -> np.ndarray | str:
        factor = 257 if dtype == "uint16" else 1
        stored = (smooth(4).astype(dtype) * factor).astype(dtype)
        if options.get("planarconfig") == "separate":
            stored = np.ascontiguousarray(np.moveaxis(stored, 2, 0))
        planar = {"planarconfig": "contig", **options}
        tifffile.imwrite(path, stored, photometric="separated", iccprofile=profile, **planar)
        if profile is None:
            return "its colours are not defined"
        return (in_srgb(inks()).astype(dtype) * factor).astype(dtype)

    return write


def floats(channels: int, **options: object) -> Callable[[Path], np.ndarray]:
    pixels = noise(channels, "uint16")
    return by_tifffile((pixels / 65535).astype(np.float32), pixels, **options)


def premultiplied(dtype: str) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        straight, top = noise(4, dtype), int(np.iinfo(dtype).max)
        alpha = straight[..., 3:].astype(np.int64)
        alpha[0, :5] = [[0], [1], [2], [top - 1], [top]]
        stored = np.rint(straight[..., :3] * (alpha / top)).astype(np.int64)
        write_tiff(path, np.concatenate([stored, alpha], 2).astype(dtype), extrasamples=["assocalpha"])
        exact = np.floor(stored * top / np.maximum(alpha, 1) + 0.5) * (alpha > 0)
        return np.concatenate([exact, alpha], 2).astype(dtype)

    return write


def jpeg2000(pixels: np.ndarray, **options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        fmt = "jp2" if path.suffix == ".jp2" else "j2k"
        path.write_bytes(imagecodecs.jpeg2k_encode(pixels.squeeze(), level=0, codecformat=fmt, **options))
        return pixels

    return write


def few_bits(bits: int) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        dtype, top = ("uint8", 255) if bits < 8 else ("uint16", 65535)
        stored = (noise(3, "uint16") >> (16 - bits)).astype(dtype)
        path.write_bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat="jp2", bitspersample=bits))
        return np.floor(stored * (top / ((1 << bits) - 1)) + 0.5).astype(dtype)

    return write


def lossy(**options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(smooth().squeeze()).save(path, **options)
        return np.asarray(Image.open(path))

    return write


def grey_jpeg(**options: object) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(smooth()[..., 0]).save(path, **options)
        return np.asarray(Image.open(path))[..., None]

    return write


CMYK_WORDS = "CMYK to sRGB through the embedded profile, relative colorimetric"
FLOAT_WORDS = "32-bit floating point in [0, 1] to 16 bit, rounded half to even"
ALPHA_WORDS = "alpha multiplied into the colours to straight alpha"
BITS_WORDS = "fewer than 8 or 16 bits per channel to the whole range of 8 or 16"
PNG_CELLS = [
    Cell("1-bit.png", one_bit()),
    *[Cell(f"{c}x{d}.png", by_hand(noise(c, d))) for c in (1, 2, 3, 4) for d in ("uint8", "uint16")],
    Cell("P.png", palette("RGB")),
    Cell("P+tRNS.png", palette("RGBA", transparency=3)),
    Cell("P+tRNS-bytes.png", palette("RGBA", transparency=bytes(range(0, 240, 8)))),
    *[Cell(f"tRNS-{c}x{d}.png", transparent_colour(c, d)) for c in (1, 3) for d in ("uint8", "uint16")],
    Cell("L+icc.png", by_pillow(noise(1), icc_profile=SRGB)),  # a profile for RGB is not for grey
    Cell("RGB+icc.png", by_pillow(noise(3), icc_profile=SRGB), icc=SRGB),
    Cell("RGBA+icc.png", by_pillow(noise(4), icc_profile=SRGB), icc=SRGB),
    Cell("dark-16.png", by_hand((noise(3, "uint16") % 200).astype(np.uint16))),
]
JPEG_CELLS = [
    Cell("L.jpg", grey_jpeg(quality=90)),
    Cell("L-progressive.jpg", grey_jpeg(quality=90, progressive=True)),
    Cell("RGB.jpg", lossy(quality=90, subsampling=0), levels=1),
    Cell("RGB-420.jpg", lossy(quality=90, subsampling=2), levels=1),
    Cell("RGB-progressive+icc.jpg", lossy(quality=90, progressive=True, icc_profile=SRGB), levels=1, icc=SRGB),
    *[
        Cell(f"CMYK-{kind}.jpg", cmyk_jpeg(kind), levels=CMYK_LEVELS, icc=b"RGB ", converted=CMYK_WORDS)
        for kind in ("adobe", "plain", "ycck")
    ],
    *[Cell(f"CMYK-{kind}-no-icc.jpg", cmyk_jpeg(kind, None)) for kind in ("adobe", "plain", "ycck")],
    Cell("CMYK-rgb-icc.jpg", lambda path: (cmyk_jpeg("adobe", SRGB)(path), "a profile of b'RGB '")[1]),
]
TIFF_CELLS = [
    Cell("1-bit.tif", one_bit()),
    Cell("1-bit-fax.tif", one_bit(compression="group4")),
    Cell("1-bit-white-0.tif", one_bit_white_zero),
    *[
        Cell(f"{c}x{d}-{comp}.tif", by_tifffile(noise(c, d), compression=comp))
        for c, d, comp in (
            (1, "uint8", None),
            (1, "uint16", "lzw"),
            (2, "uint8", "zlib"),
            (2, "uint16", "zstd"),
            (3, "uint8", "packbits"),
            (3, "uint16", "zstd"),
            (4, "uint8", "zstd"),
            (4, "uint16", "lzw"),
        )
    ],
    Cell("white-0-zstd.tif", by_tifffile(noise(1), 255 - noise(1), photometric="miniswhite", compression="zstd")),
    Cell("zstd-predictor.tif", by_tifffile(noise(3, "uint16"), compression="zstd", predictor=True, tile=(16, 16))),
    *[
        Cell(
            f"planes-{d}-{comp}-{tile}.tif",
            by_tifffile(noise(3, d), photometric="rgb", planarconfig="separate", compression=comp, tile=tile),
        )
        for d, comp, tile in (
            ("uint8", None, None),
            ("uint8", None, (16, 32)),
            ("uint16", "lzw", (16, 16)),
            ("uint16", "zstd", (32, 16)),
            ("uint8", "zstd", None),
        )
    ],
    Cell("bigtiff-big-endian.tif", by_tifffile(noise(3, "uint16"), bigtiff=True, byteorder=">", compression="zstd")),
    Cell("P.tif", palette("RGB")),
    Cell("P-deep.tif", deep_palette(8)),
    Cell("P-16.tif", deep_palette(16)),
    Cell("P-dark.tif", deep_palette(8, low=False)),
    Cell("jpeg.tif", lambda path: (write_tiff(path, smooth(), compression="jpeg"), tifffile.imread(path))[1], levels=1),
    Cell("RGB+icc.tif", by_tifffile(noise(3), iccprofile=SRGB), icc=SRGB),
    Cell("RGB+icc-zstd.tif", by_tifffile(noise(3), iccprofile=SRGB, compression="zstd"), icc=SRGB),
    Cell("dark-16.tif", by_tifffile((noise(1, "uint16") % 200).astype(np.uint16))),
    *[
        Cell(f"float-{c}-{num}.tif", floats(c, **options), converted=FLOAT_WORDS)
        for num, options in enumerate(({}, {"compression": "zlib", "predictor": True}, {"compression": "zstd"}))
        for c in (1, 3, 4)
    ],
    Cell("float-tiles.tif", floats(3, tile=(16, 16), iccprofile=SRGB), icc=SRGB, converted=FLOAT_WORDS),
    *[
        Cell(f"CMYK-{d}-{num}.tif", cmyk_tiff(d, **options), CMYK_LEVELS * m, b"RGB ", CMYK_WORDS)
        for d, m in (("uint8", 1), ("uint16", 257))
        for num, options in enumerate(({}, {"compression": "zstd"}, {"planarconfig": "separate", "tile": (16, 16)}))
    ],
    *[Cell(f"CMYK-{d}-no-icc.tif", cmyk_tiff(d, None)) for d in ("uint8", "uint16")],
    Cell("premultiplied-8.tif", premultiplied("uint8"), converted=ALPHA_WORDS),
    Cell("premultiplied-16.tif", premultiplied("uint16"), converted=ALPHA_WORDS),
    Cell("lab.tif", by_tifffile(noise(3), "CIE Lab", photometric="cielab")),
]
OTHER_CELLS = [
    Cell("RGB.webp", by_pillow(noise(3), lossless=True)),
    Cell("RGBA.webp", by_pillow(noise(4), lossless=True, exact=True)),
    Cell("RGB+icc.webp", by_pillow(noise(3), lossless=True, icc_profile=SRGB), icc=SRGB),
    Cell("lossy.webp", lossy(quality=80), levels=1),
    *[
        Cell(f"{c}x{d}.{suffix}", jpeg2000(noise(c, d)))
        for c in (1, 3)
        for d in ("uint8", "uint16")
        for suffix in ("jp2", "j2k")
    ],
    *[Cell(f"{bits}-bit.jp2", few_bits(bits), converted=BITS_WORDS) for bits in (4, 12)],
]
CELLS = [*PNG_CELLS, *JPEG_CELLS, *TIFF_CELLS, *OTHER_CELLS]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_of_the_matrix(cell, tmp_path):
    path = tmp_path / cell.name
    expected = cell.write(path)
    if isinstance(expected, str):
        with pytest.raises(UnsupportedInput, match=expected):
            probe(path)
        return
    info = probe(path)
    found = read_all(path, tmp_path / "s")
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found.astype(np.int64) - expected).max() <= cell.levels
    assert info.converted == cell.converted
    assert (info.metadata.icc or b"")[16:20] == b"RGB " if cell.icc == b"RGB " else info.metadata.icc == cell.icc


def test_the_matrix_is_large():
    assert len({cell.name for cell in CELLS}) == len(CELLS) >= 60


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF's table in numpy: what row 0 and column 0 of the stored picture are."""
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "zstd.tif", "cmyk.tif", "float.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_every_container(orientation, name, tmp_path):
    path, exif = tmp_path / name, Image.Exif()
    exif[274] = orientation
    tag = {"extratags": [(274, 3, 1, orientation, True)]}
    if name == "zstd.tif":
        write_tiff(path, smooth(), compression="zstd", **tag)
    elif name == "cmyk.tif":
        cmyk_tiff("uint8", **tag)(path)
    elif name == "float.tif":
        floats(3, **tag)(path)
    else:
        Image.fromarray(smooth()).save(path, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    stored = {
        "a.jpg": lambda: np.asarray(Image.open(path)),
        "cmyk.tif": lambda: in_srgb(inks()),
        "float.tif": lambda: noise(3, "uint16"),
    }.get(name, smooth)()
    expected = upright(stored, orientation)
    info = probe(path)
    assert (info.orientation, info.size) == (orientation, Size(*expected.shape[:2]))
    found = decode(info, tmp_path / "s").read(Box.of(info.size))
    assert np.abs(found.astype(int) - expected).max() <= (CMYK_LEVELS if name == "cmyk.tif" else 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5, 1.25], "from 0.5 to 1.25; 0 to 1"),
        ([-0.5, 1.0], "from -0.5 to 1; 0 to 1"),
        ([0.0, np.inf], "from 0 to inf"),
        ([0.0, np.nan], "1 of 2 values"),
    ],
)
def test_floats_outside_are_refused(values, said, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.array([values], np.float32), photometric="minisblack")
    with pytest.raises(UnsupportedInput, match=said):
        decode(probe(path), tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


def test_alpha_that_was_never_multiplied_in_is_refused(tmp_path):
    pixels = np.full((4, 5, 4), 100, np.uint8)
    pixels[2, 3] = [50, 60, 101, 100]
    path = write_tiff(tmp_path / "a.tif", pixels, extrasamples=["assocalpha"])
    with pytest.raises(UnsupportedInput, match="a colour of 101 has alpha 100"):
        decode(probe(path), tmp_path / "s")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_multiplying_by_alpha_gives_back_what_was_stored(dtype, tmp_path):
    premultiplied(dtype)(tmp_path / "a.tif")
    stored = tifffile.imread(tmp_path / "a.tif").astype(np.float64)
    found = read_all(tmp_path / "a.tif", tmp_path / "s").astype(np.float64)
    assert np.array_equal(np.rint(found[..., :3] * found[..., 3:] / np.iinfo(dtype).max), stored[..., :3])


def test_a_damaged_cmyk_profile_is_not_replaced(tmp_path):
    path = tmp_path / "a.tif"
    cmyk_tiff("uint8", CMYK_PROFILE[:200] + b"\xff" * (len(CMYK_PROFILE) - 200))(path)
    with pytest.raises(UnreadableInput, match=f"profile of {len(CMYK_PROFILE):,} bytes is damaged"):
        decode(probe(path), tmp_path / "s")


def three_pages(path: Path, **options: object) -> list[np.ndarray]:
    pages = [noise(3, seed=num) for num in range(3)]
    with tifffile.TiffWriter(path) as writer:
        for page in pages:
            writer.write(page, photometric="rgb", metadata=None, **options)
            writer.write(page[::2, ::2], photometric="rgb", metadata=None, subfiletype=1, **options)
    return pages


@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_pages(compression, tmp_path):
    path = tmp_path / "a.tif"
    pages = three_pages(path, compression=compression)
    with pytest.raises(UnsupportedInput, match="3 pages; choose one with --page 0 to 2"):
        probe(path)
    for num, expected in enumerate(pages):
        info = probe(path, page=num)
        assert info.page == num
        assert np.array_equal(decode(info, tmp_path / "s").read(Box.of(info.size)), expected)
    for num in (3, -1):
        with pytest.raises(UnsupportedInput, match=f"3 pages; page {num} is asked for; the first is 0, the last 2"):
            probe(path, page=num)


def test_files_of_one_page(tmp_path):
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(noise(3)).save(tmp_path / name)
        assert probe(tmp_path / name, page=0).size == Size(H, W)
        with pytest.raises(UnsupportedInput, match="page 1 is asked for"):
            probe(tmp_path / name, page=1)


def test_a_pyramid_is_one_page(tmp_path):
    path = tmp_path / "a.tif"
    pyvips.Image.new_from_array(noise(3)).tiffsave(str(path), pyramid=True, tile=True, tile_width=16, tile_height=16)
    assert np.array_equal(read_all(path, tmp_path / "s"), noise(3))


@pytest.mark.parametrize("name", ["a.webp", "lossy.webp", "a.jp2", "a.j2k", "zstd.tif", "planes.tif"])
def test_cut_off_anywhere_is_refused(name, tmp_path):
    path = tmp_path / name
    if name.endswith("webp"):
        Image.fromarray(smooth()).save(path, lossless=name == "a.webp")
    elif name.endswith("tif"):
        planes = {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 16)}
        by_tifffile(smooth(), **({"compression": "zstd"} if name == "zstd.tif" else planes))(path)
    else:
        jpeg2000(smooth())(path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 2}:
        path.write_bytes(whole[:length])
        with pytest.raises(UnreadableInput):
            decode(probe(path), tmp_path / "s")
    assert not list(tmp_path.rglob("*.raw"))


def _mutated(name: str, tmp_path: Path) -> Path:
    path = tmp_path / name
    writers = {
        "a.webp": by_pillow(smooth(), lossless=True),
        "lossy.webp": lossy(quality=60),
        "a.jp2": jpeg2000(smooth()),
        "cmyk.jpg": cmyk_jpeg("adobe"),
        "zstd.tif": by_tifffile(smooth(), compression="zstd"),
        "planes.tif": by_tifffile(smooth(), photometric="rgb", planarconfig="separate", tile=(16, 16)),
        "float.tif": floats(3, compression="zlib"),
        "deep.tif": deep_palette(8),
    }
    writers[name](path)
    return path


@pytest.mark.parametrize(
    "name", ["a.webp", "lossy.webp", "a.jp2", "cmyk.jpg", "zstd.tif", "planes.tif", "float.tif", "deep.tif"]
)
def test_damaged_files_raise_typed_errors_or_decode(name, tmp_path):
    path, rng = _mutated(name, tmp_path), np.random.default_rng(7)
    whole = path.read_bytes()
    for num in range(12 if name == "cmyk.jpg" else 60):
        data = bytearray(whole)
        span = len(data) if num % 2 else min(len(data), 400)
        for at in rng.integers(0, span, 4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with suppress(InputError):
            decode(probe(path, max_pixels=1 << 20), tmp_path / "s")


def write_zarr(path: Path, pixels: np.ndarray, *, version: int = 3, axes: str = "cyx", **options: object) -> Path:
    """An OME-Zarr written by zarr-python, with the metadata by hand."""
    group = zarr.open_group(path, mode="w", zarr_format=version)
    planes = np.moveaxis(pixels, 2, 0)
    planes = planes[0] if axes == "yx" else planes
    settings = {"chunks": (*planes.shape[:-2], 16, 16), "config": {"write_empty_chunks": True}, **options}
    group.create_array("0", data=planes, **settings)
    ome: dict = {
        "version": "0.5" if version == 3 else "0.4",
        "multiscales": [{"axes": [{"name": axis} for axis in axes], "datasets": [{"path": "0"}]}],
    }
    if pixels.shape[2] in (2, 4):
        labels = ["grey", "alpha"] if pixels.shape[2] == 2 else ["red", "green", "blue", "alpha"]
        colours = ["FFFFFF", "FFFFFF"] if pixels.shape[2] == 2 else ["FF0000", "00FF00", "0000FF", "FFFFFF"]
        ome["omero"] = {"channels": [{"label": n, "color": c} for n, c in zip(labels, colours, strict=True)]}
    group.attrs.update({"ome": ome} if version == 3 else ome)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("version", "options"), [(2, {}), (3, {}), (3, {"shards": (48, 64)})])
def test_ome_zarr_is_read_where_it_lies(version, options, channels, dtype, tmp_path):
    pixels = noise(channels, dtype)
    if "shards" in options:
        options = {"shards": (channels, 48, 64)}
    path = write_zarr(tmp_path / "a.zarr", pixels, version=version, **options)
    info = probe(path)
    assert (info.format, info.size, info.channels, info.dtype) == ("ome-zarr", Size(H, W), channels, dtype)
    picture = decode(info, tmp_path / "s")
    assert np.array_equal(picture.read(Box.of(info.size)), pixels)
    assert np.array_equal(picture.read(Box(3, 20, 19, 41)), pixels[3:19, 20:41])
    assert not (tmp_path / "s").exists()
    assert picture.sha256 == digest(info)


def test_ome_zarr_without_channel_axis_and_its_digest(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", noise(1), axes="yx")
    assert np.array_equal(read_all(path, tmp_path / "s"), noise(1))
    before = digest(probe(path))
    assert digest(probe(write_zarr(tmp_path / "b.zarr", noise(1), axes="yx"))) == before
    changed = write_zarr(tmp_path / "c.zarr", noise(1, seed=2), axes="yx")
    assert digest(probe(changed)) != before


def test_a_lost_chunk_is_no_black_tile(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", noise(3))
    info = probe(path)
    (path / "0" / "c" / "0" / "1" / "2").unlink()
    with pytest.raises(UnreadableInput, match="the chunk c/0/1/2, 1 of 12, is not stored"):
        decode(info, tmp_path / "s")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("put", "said"), [(Path.touch, "0 bytes"), (os.mkfifo, "no plain file"), (Path.mkdir, "no plain file")]
)
def test_a_shard_that_holds_nothing_is_no_black_picture(put, said, tmp_path):
    path = write_zarr(tmp_path / "a.zarr", noise(3), shards=(3, 48, 64))
    info = probe(path)
    shard = path / "0" / "c" / "0" / "0" / "0"
    shard.unlink()
    put(shard)
    for read in (lambda: decode(info, tmp_path / "s"), lambda: digest(info)):
        with pytest.raises(UnreadableInput, match=rf"the chunk c/0/0/0, 1 of 1, is not stored \(.*{said}\)"):
            read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: meta["multiscales"][0].update(axes=[{"name": n} for n in "zyx"]), "axes z,y,x"),
        (lambda meta: meta["multiscales"][0].update(datasets=[{"path": "../b"}]), "outside of it"),
        (lambda meta: meta.pop("multiscales"), "without OME-Zarr"),
        (lambda meta: meta.update(omero={"channels": [{"color": "00FFFF"}] * 3}), "channels shown as 00FFFF"),
    ],
)
def test_ome_zarr_that_is_something_else(change, said, tmp_path):
    path = write_zarr(tmp_path / "a.zarr", noise(3))
    found = json.loads((path / "zarr.json").read_text())
    change(found["attributes"]["ome"])
    (path / "zarr.json").write_text(json.dumps(found))
    with pytest.raises(UnsupportedInput, match=said):
        probe(path)


def test_ome_zarr_of_unknown_codecs_and_types(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", noise(3), version=2)
    meta = path / "0" / ".zarray"
    stored = json.loads(meta.read_text())
    for change, said in (
        ({"filters": [{"id": "pickle"}]}, "codecs .*pickle"),
        ({"compressor": {"id": "pickle"}}, "codecs .*pickle"),
        ({"dtype": "<f4"}, "values of <f4"),
        ({"shape": [9, H, W]}, "9 channels"),
        ({"chunks": [3, 1 << 15, 1 << 15]}, "3,221,225,472 bytes, the limit is 536,870,912"),
    ):
        meta.write_text(json.dumps({**stored, **change}))
        with pytest.raises(UnsupportedInput, match=said):
            probe(path)
    meta.write_text(json.dumps({**stored, "shape": [3, 1 << 20, 1 << 20], "chunks": [3, 4096, 4096]}))
    with pytest.raises(TooManyPixels):
        probe(path)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UnreadableInput, match=r"neither zarr\.json nor"):
        probe(tmp_path / "empty.zarr")


def test_the_jp2_boxes_are_carried(tmp_path):
    path = tmp_path / "a.jp2"
    jpeg2000(noise(3))(path)
    data = path.read_bytes()
    at = data.index(b"colr") - 4
    colr = struct.pack(">I", 11 + len(SRGB)) + b"colr\2\0\0" + SRGB
    resc = struct.pack(">I4sHHHHbb", 18, b"resc", 300, 254, 600, 254, 4, 4)
    extra = colr + struct.pack(">I", 8 + len(resc)) + b"res " + resc
    head = data.index(b"jp2h") - 4
    length = struct.unpack(">I", data[head : head + 4])[0] - 15 + len(extra)
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    uuid = struct.pack(">I", 24 + len(xmp)) + b"uuid" + bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + xmp
    path.write_bytes(data[:head] + struct.pack(">I", length) + data[head + 4 : at] + extra + uuid + data[at + 15 :])
    metadata = probe(path).metadata
    assert metadata.icc == SRGB
    assert metadata.xmp == xmp
    assert metadata.resolution_px_per_mm == pytest.approx((300 / 25.4, 600 / 25.4))
    assert np.array_equal(read_all(path, tmp_path / "s"), noise(3))


def refused_jp2(tmp_path: Path, old: bytes, new: bytes) -> str:
    path = tmp_path / "a.jp2"
    jpeg2000(noise(3))(path)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(UnsupportedInput) as caught:
        probe(path)
    return str(caught.value)


def test_jpeg_2000_of_other_kinds(tmp_path):
    srgb = b"colr\1\0\0\0\0\0\x10"
    assert "sYCC" in refused_jp2(tmp_path, srgb, b"colr\1\0\0\0\0\0\x12")
    assert "3 channels where 1" in refused_jp2(tmp_path, srgb, b"colr\1\0\0\0\0\0\x11")
    assert "signed" in refused_jp2(tmp_path, b"\0\3\7\1\1\7\1\1\7\1\1", b"\0\3\x87\1\1\7\1\1\7\1\1")
    assert "steps of 2" in refused_jp2(tmp_path, b"\0\3\7\1\1\7\1\1\7\1\1", b"\0\3\7\1\1\7\2\2\7\1\1")
    assert "17/17/17 bits" in refused_jp2(tmp_path, b"\0\3\7\1\1\7\1\1\7\1\1", b"\0\3\x10\1\1\x10\1\1\x10\1\1")


def test_pdf_is_refused_with_a_hint(tmp_path):
    Image.fromarray(noise(3)).save(tmp_path / "a.pdf")
    with pytest.raises(UnsupportedInput, match=r"PDF\. Export the page as TIFF"):
        probe(tmp_path / "a.pdf")


def test_the_page_is_part_of_what_was_probed(tmp_path):
    three_pages(tmp_path / "a.tif")
    first, second = (probe(tmp_path / "a.tif", page=num) for num in (0, 1))
    assert first != second
    assert isinstance(first, ImageInfo)
