"""Ten thousand damaged pictures: each is a typed refusal or an array of the announced shape; none ends the program."""

import io
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from engine.errors import DecoderCrashed, DecoderTimeout, InputError
from engine.isolate import decode_in_child, in_child, probe_in_child
from engine.warden import Limits
from tests.faults.mutants import MAX_PIXELS, Seed, mutant, outcome, outcomes

NUM_MUTANTS = 10_000
BATCH = 500
HANG_S = 2.0
SIDE_PX = (61, 64)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def texture(channels: int, dtype: str = "uint8") -> np.ndarray:
    """A smooth picture with a little noise: small when encoded, but not trivial."""
    rng = np.random.default_rng(channels)
    y, x = np.mgrid[: SIDE_PX[0], : SIDE_PX[1]] / 64
    planes = [0.5 + 0.4 * np.sin(5 * x + channel + 3 * y * y) for channel in range(channels)]
    values = np.stack(planes, axis=2) + rng.normal(0, 0.01, (*SIDE_PX, channels))
    pixels = (values.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
    return pixels[..., 0] if channels == 1 else pixels


def pillow(fmt: str, image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    options.setdefault("photometric", "minisblack" if pixels.ndim == 2 else "rgb")
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def pngs() -> list[Seed]:
    grey, rgb = Image.fromarray(texture(1)), Image.fromarray(texture(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        ("grey.png", pillow("PNG", grey)),
        ("bits.png", pillow("PNG", grey.convert("1"))),
        ("grey16.png", pillow("PNG", Image.fromarray(texture(1, "uint16")))),
        ("rgb.png", pillow("PNG", rgb, icc_profile=ICC, dpi=(300, 300))),
        ("rgba.png", pillow("PNG", Image.fromarray(texture(4)))),
        ("grey-alpha.png", pillow("PNG", Image.fromarray(texture(4)).convert("LA"))),
        ("palette.png", pillow("PNG", rgb.quantize(16), transparency=3)),
        ("turned.png", pillow("PNG", rgb, exif=exif)),
        ("grey.jpg", pillow("JPEG", grey)),
        ("rgb.jpg", pillow("JPEG", rgb, quality=90, icc_profile=ICC)),
        ("progressive.jpg", pillow("JPEG", rgb, progressive=True)),
        ("restart.jpg", pillow("JPEG", rgb, restart_marker_blocks=3, subsampling=0)),
        ("turned.jpg", pillow("JPEG", rgb, exif=exif)),
        ("cmyk.jpg", pillow("JPEG", rgb.convert("CMYK"))),
    ]


def tiffs() -> list[Seed]:
    rgb, rgb16, grey16 = texture(3), texture(3, "uint16"), texture(1, "uint16")
    return [
        ("strips.tif", tiff(rgb, rowsperstrip=8)),
        ("tiles.tif", tiff(rgb, tile=(32, 32))),
        ("lzw.tif", tiff(rgb, compression="lzw", predictor=True, rowsperstrip=16)),
        ("deflate.tif", tiff(grey16, compression="adobe_deflate", tile=(32, 16), predictor=True, iccprofile=ICC)),
        ("jpeg.tif", tiff(rgb, compression="jpeg", tile=(32, 32))),
        ("sixteen.tif", tiff(rgb16, rowsperstrip=20, byteorder=">")),
        ("big.tif", tiff(rgb, bigtiff=True, compression="packbits")),
        ("planar.tif", tiff(rgb.transpose(2, 0, 1), planarconfig="separate", rowsperstrip=32)),
        ("alpha.tif", tiff(texture(4), extrasamples=["unassalpha"], compression="zstd")),
        ("bits.tif", pillow("TIFF", Image.fromarray(texture(1)).convert("1"), compression="group4")),
        ("pages.tif", tiff(np.stack([rgb, rgb]), rowsperstrip=61)),
        ("float.tif", tiff(texture(1).astype(np.float32) / 255)),
    ]


@pytest.fixture(scope="module")
def seeds() -> list[Seed]:
    """PNG, JPEG and TIFF of 26 kinds, made by Pillow and tifffile."""
    return [*pngs(), interlaced(), *tiffs()]


def interlaced() -> Seed:
    """Pillow writes none: seven passes (Adam7) of rows without a filter."""
    import struct
    import zlib

    pixels, passes = (
        texture(1),
        [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)],
    )
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", SIDE_PX[1], SIDE_PX[0], 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return "interlaced.png", b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def isolated(seeds: list[Seed], number: int, folder: Path) -> str:
    """What the program itself would make of one mutant: the way of a file that ended its whole batch."""
    name, data = mutant(seeds, number)
    path = folder / f"alone-{number}-{name}"
    path.write_bytes(data)
    limits = Limits(timeout_s=HANG_S)
    try:
        decode_in_child(probe_in_child(path, max_pixels=MAX_PIXELS, limits=limits), folder / "alone", limits=limits)
    except InputError as error:
        return error.code
    return "decoded"


def run_batch(seeds: list[Seed], numbers: range, folder: Path) -> list[tuple[int, str, float]]:
    folder.mkdir()
    try:
        return in_child(outcomes, seeds, numbers, folder, subject=folder, limits=Limits(timeout_s=60))
    except (DecoderCrashed, DecoderTimeout):
        return [(number, isolated(seeds, number, folder), 0.0) for number in numbers]


def test_intact_pictures_of_all_kinds_are_decoded_or_refused_with_a_reason(seeds, tmp_path):
    """Without this, the mutants could all be refused for nothing."""
    assert len({name for name, _ in seeds}) == len(seeds) >= 17
    decoded = 0
    for name, data in seeds:
        (tmp_path / name).write_bytes(data)
        found = outcome(tmp_path / name, tmp_path / "scratch")
        assert found in ("decoded", "unsupported-input"), name
        decoded += found == "decoded"
    assert decoded >= 17


@pytest.mark.slow
@pytest.mark.timeout(900)  # 30 s on two free cores
def test_ten_thousand_damaged_pictures(seeds, tmp_path, record_property):
    started = time.monotonic()
    batches = [range(first, first + BATCH) for first in range(0, NUM_MUTANTS, BATCH)]
    with ThreadPoolExecutor(2) as workers:
        parts = workers.map(lambda numbers: run_batch(seeds, numbers, tmp_path / f"batch-{numbers[0]}"), batches)
        done = [one for part in parts for one in part]
    counts = Counter(found.split(":")[0] for _, found, _ in done)
    slowest = max(done, key=lambda one: one[2])
    record_property("outcomes", f"{dict(counts)}; slowest {slowest}; {time.monotonic() - started:.1f} s")
    assert sorted(number for number, _, _ in done) == list(range(NUM_MUTANTS))
    untyped = [(number, seeds[number % len(seeds)][0], found) for number, found, _ in done if "untyped" in found]
    assert not untyped, f"{len(untyped)}: {untyped[:10]}"
    assert counts["decoder-timeout"] == 0
    assert slowest[2] < HANG_S
    assert counts["decoded"] > NUM_MUTANTS // 50  # also what was damaged beyond its header was looked at
    assert counts["unreadable-input"] > NUM_MUTANTS // 4


def test_a_crash_and_a_hang_are_counted(seeds, tmp_path):
    """The way in which a mutant would have to be noticed."""
    with pytest.raises(DecoderCrashed, match="SIGSEGV"):
        in_child(signal.raise_signal, signal.SIGSEGV, subject=tmp_path / "a.tif")
    with pytest.raises(DecoderTimeout):
        in_child(time.sleep, 1000, subject=tmp_path / "a.tif", limits=Limits(timeout_s=0.2))
    with pytest.raises(DecoderCrashed, match="SIGABRT"):
        in_child(os.abort, subject=tmp_path / "a.tif")
    number = len(seeds)  # a mutant of the first seed
    assert isolated(seeds, number, tmp_path) == outcomes(seeds, [number], tmp_path / "batch")[0][1]
