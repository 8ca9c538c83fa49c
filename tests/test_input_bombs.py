"""Files that are small and would unfold to something huge, or are not what they are called: refused by their header.

Each is probed in a child process whose decoders are replaced by an alarm.
"""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.forked import REPOSITORY
from tests.test_image import chunk, write_png

MAX_GROWN_BYTES = 32 << 20
MAX_S = 0.05
"""Of the processor."""
HUGE = 60_000


def png(*chunks: bytes, size: int = 20, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", size, size, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", b""), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deflated(num_bytes: int) -> bytes:
    compress = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join([compress.compress(block) for _ in range(num_bytes >> 20)] + [compress.flush()])


def jpeg(size: int, channels: int = 3, marker: int = 0xC0, scan: int | None = None, before: bytes = b"") -> bytes:
    body = struct.pack(">BHHB", 8, size, size, channels) + b"".join(bytes([c + 1, 0x11, 0]) for c in range(channels))
    frame = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
    count = channels if scan is None else scan
    sos = b"\xff\xda" + struct.pack(">HB", 6 + 2 * count, count) + bytes(2 * count + 3)
    return b"\xff\xd8" + before + frame + sos + b"\0\xff\xd9"


def webp(kind: bytes, body: bytes, *more: tuple[bytes, bytes]) -> bytes:
    chunks = b"".join(k + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for k, b in ((kind, body), *more))
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def vp8l(size: int) -> bytes:
    return b"\x2f" + struct.pack("<I", (size - 1) | (size - 1) << 14) + bytes(5)


def vp8x(flags: int, size: int) -> bytes:
    side = struct.pack("<I", size - 1)[:3]
    return bytes([flags, 0, 0, 0]) + side + side


def animation(frames: int) -> bytes:
    return webp(b"VP8X", vp8x(2, 50), (b"ANIM", bytes(6)), *[(b"ANMF", bytes(16))] * frames)


def codestream(size: int, tile: int | None = None, channels: int = 3, parts: int = 1) -> bytes:
    tile = size if tile is None else tile
    siz = struct.pack(">H8IH", 0, size, size, 0, 0, tile, tile, 0, 0, channels) + b"\7\1\1" * channels
    head = b"\xff\x4f\xff\x51" + struct.pack(">H", len(siz) + 2) + siz
    tiles = b"".join(
        b"\xff\x90" + struct.pack(">HHIBB", 10, num & 0xFFFF, 14, 0, 1) + b"\xff\x93" for num in range(parts)
    )
    return head + tiles + b"\xff\xd9"


def jp2(stream: bytes, *boxes: bytes) -> bytes:
    ihdr = box(b"ihdr", struct.pack(">IIHBBBB", 20, 20, 3, 7, 7, 0, 0))
    head = box(b"jp2h", ihdr + b"".join(boxes) + box(b"colr", b"\1\0\0" + struct.pack(">I", 16)))
    return box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + head + box(b"jp2c", stream)


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def tiff(entries: dict[int, tuple[int, int, int]], *, link: int = 0, extra: bytes = b"") -> bytes:
    """One little-endian directory at byte 8; entries are tag: (type, count, value or offset); then `extra`."""
    body = struct.pack("<H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        body += struct.pack("<HHII", tag, kind, count, value)
    return b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", link) + extra


def plain(w: int, h: int, **changes: tuple[int, int, int] | None) -> dict[int, tuple[int, int, int]]:
    """The entries of a grey 8-bit picture whose one strip lies at byte 8."""
    names = {"bits": 258, "compression": 259, "rows": 278, "offsets": 273, "lengths": 279, "samples": 277}
    names |= {"tile_w": 322, "tile_h": 323, "tile_offsets": 324, "tile_lengths": 325, "subfile": 254, "colours": 320}
    entries = {256: (4, 1, w), 257: (4, 1, h), 258: (3, 1, 8), 259: (3, 1, 5), 262: (3, 1, 1)}
    entries |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, h), 279: (4, 1, 20)}
    for name, entry in changes.items():
        if entry is None:
            del entries[names[name]]
        else:
            entries[names[name]] = entry
    return entries


def chained(num: int) -> bytes:
    """So many directories of one picture each."""
    data, each = b"II*\0" + struct.pack("<I", 8), len(tiff(plain(20, 20))) - 8
    for n in range(num):
        data += tiff(plain(20, 20), link=0 if n == num - 1 else 8 + (n + 1) * each)[8:]
    return data


def sparse(data: bytes, length: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)
        os.truncate(path, length)

    return write


def big_tiff(num_entries: int) -> bytes:
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, num_entries)


def moving_png(path: Path) -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), num, np.uint8)) for num in range(3)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def many_pages(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        for _ in range(300):
            writer.write(np.zeros((8, 8), np.uint8), photometric="minisblack", metadata=None)


TEXT = deflated(64 << 20)
BOMBS: dict[str, bytes | Callable[[Path], None]] = {
    # dimensions
    "rgb.png": png(size=HUGE),
    "grey16.png": png(size=HUGE, depth=16, colour=0),
    "palette1.png": png(size=HUGE, depth=1, colour=3),
    "largest.png": png(size=2**31 - 1),
    "over.png": png(size=2**31),
    "interlaced.png": png(size=20_000, interlaced=1),
    "baseline.jpg": jpeg(HUGE),
    "largest.jpg": jpeg(65_535, channels=1),
    "progressive.jpg": jpeg(20_000, marker=0xC2),
    "scans.jpg": jpeg(20_000, scan=1),
    "cmyk.jpg": jpeg(HUGE, channels=4),
    "no-height.jpg": jpeg(0),
    "lossless.webp": webp(b"VP8L", vp8l(16_384)),
    "lossy.webp": webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)),
    "canvas.webp": webp(b"VP8X", vp8x(0, 1 << 24), (b"VP8L", vp8l(20))),
    "both.webp": webp(b"VP8X", vp8x(16, 16_384), (b"VP8L", vp8l(16_384))),
    "whole.j2k": codestream(2**31 - 1),
    "large.j2k": codestream(20_000),
    "tiles.j2k": codestream(20_000, tile=1),
    "absent-tiles.j2k": codestream(4096, tile=64, parts=3),
    "parts.j2k": codestream(64, parts=70_000),
    "channels.j2k": codestream(64, channels=16_384),
    "whole.jp2": jp2(codestream(100_000)),
    "boxes.jp2": jp2(codestream(20), *[box(b"free", b"")] * 300),
    "profile.jp2": jp2(codestream(20), box(b"colr", b"\2\0\0" + bytes(9 << 20))),
    "large.tif": tiff(plain(HUGE, HUGE), extra=bytes(100)),
    "largest.tif": tiff(plain(2**32 - 1, 2**32 - 1), extra=bytes(100)),
    "tall.tif": tiff(plain(1, 2**30, rows=(4, 1, 1)), extra=bytes(100)),
    # ancillary data
    "zTXt.png": png(chunk(b"zTXt", b"a\0\0" + TEXT)),
    "iCCP.png": png(chunk(b"iCCP", b"a\0\0" + TEXT)),
    "iTXt.png": png(chunk(b"iTXt", b"a\0\1\0\0\0" + TEXT)),
    "texts.png": png(*[chunk(b"zTXt", b"a\0\0" + deflated(1 << 20))] * 60),
    "tEXt.png": png(chunk(b"tEXt", b"a\0" + bytes(9 << 20))),
    "chunks.png": png(*[chunk(b"tEXt", b"a\0b")] * 5000),
    "markers.jpg": jpeg(20, before=b"\xff\xfe\0\2" * 50_000),
    "fill.jpg": b"\xff\xd8" + b"\xff" * (4 << 20),
    "exif.webp": webp(b"VP8X", vp8x(8, 20), (b"VP8L", vp8l(20)), (b"EXIF", bytes(9 << 20))),
    "chunks.webp": webp(b"VP8X", vp8x(0, 20), *[(b"junk", b"")] * 5000),
    # directories, strips, tiles
    "circle.tif": tiff(plain(20, 20), link=8, extra=bytes(100)),
    "directories.tif": chained(3000),
    "pages.tif": many_pages,
    "entries.tif": sparse(big_tiff(2**63), 1 << 30),
    "many-entries.tif": sparse(big_tiff(10_000_000), 1 << 30),
    "strips.tif": sparse(tiff(plain(20, 20, offsets=(4, 2**28, 200), lengths=(4, 2**28, 200))), 2 << 30),
    "row-strips.tif": sparse(
        tiff(plain(1, 2**28, rows=(4, 1, 1), offsets=(4, 2**28, 200), lengths=(4, 2**28, 200))), 2 << 30
    ),
    "one-strip.tif": sparse(tiff(plain(30_000, 30_000, lengths=(4, 1, 600 << 20))), 1 << 30),
    "tile.tif": tiff(
        plain(20, 20, tile_w=(4, 1, 2**31), tile_h=(4, 1, 2**31), tile_offsets=(4, 1, 8), tile_lengths=(4, 1, 20)),
        extra=bytes(100),
    ),
    "zero-rows.tif": tiff(plain(20, 0), extra=bytes(100)),
    "outside.tif": tiff(plain(20, 20, offsets=(4, 1, 2**32 - 8)), extra=bytes(100)),
    "samples.tif": tiff(plain(20, 20, samples=(3, 1, 65_535)), extra=bytes(100)),
    "bits.tif": tiff(plain(20, 20, bits=(3, 2**30, 8)), extra=bytes(100)),
    # animations
    "moving.png": moving_png,
    "moving.webp": animation(3),
    "frames.webp": animation(5000),
}
DISGUISED = {
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "eps-binary.tif": b"\xc5\xd0\xd3\xc6" + bytes(30),
    "pdf.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "fits.tif": b"SIMPLE  =                    T",
    "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "xml.jpg": b"<?xml version='1.0'?><svg/>",
    "psd.jpg": b"8BPS\0\1" + bytes(30),
    "ico.png": b"\0\0\1\0\1\0" + bytes(30),
    "gif.png": b"GIF89a\1\0\1\0" + bytes(30),
    "bmp.jpg": b"BM" + bytes(50),
    "ppm.png": b"P6\n20 20\n255\n" + bytes(1200),
    "zip.webp": b"PK\x03\x04" + bytes(30),
    "gzip.tif": b"\x1f\x8b\x08" + bytes(30),
    "avi.webp": b"RIFF\x20\0\0\0AVI LIST" + bytes(30),
    "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(30),
    "exr.tif": b"\x76\x2f\x31\x01" + bytes(30),
    "djvu.jp2": b"AT&TFORM" + bytes(30),
    "jxl.jp2": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30),
    "script.png": b"#!/bin/sh\necho hello\n",
    "hdr.tif": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n",
    "mvg.png": b"push graphic-context\nviewbox 0 0 9 9\n",
    "jpeg.png": jpeg(20),
    "png.jp2": png(),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What a child process found in a folder of all of them."""
    folder = tmp_path_factory.mktemp("bombs")
    write_png(folder / "warm.png", np.zeros((4, 4, 3), np.uint8))
    for name, content in (BOMBS | DISGUISED).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "bomb_job.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    return json.loads(run.stdout)


def test_bombs_are_refused_from_their_headers(report):
    assert len(BOMBS) >= 50
    codes = {name: report["found"][name][:2] for name in BOMBS}
    refusals = {"unreadable-input", "unsupported-input", "too-many-pixels"}
    assert {name: said for name, said in codes.items() if said[0] not in refusals} == {}
    assert report["started"] == []


def test_bombs_cost_neither_memory_nor_time(report):
    assert report["grown_bytes"] <= MAX_GROWN_BYTES
    seconds = {name: report["found"][name][2] for name in BOMBS}
    assert max(seconds.values()) <= MAX_S, max(seconds, key=lambda name: seconds[name])


def test_disguised_formats_are_refused_and_nothing_is_started(report):
    assert len(DISGUISED) >= 20
    codes = {name: report["found"][name][0] for name in DISGUISED}
    unknown = {"mvg.png"}  # no magic bytes: not a PNG, and nothing else that can be told
    assert {name: code for name, code in codes.items() if code != "disguised-input"} == dict.fromkeys(
        unknown, "unreadable-input"
    )
    assert report["started"] == []
    assert "Export the page as TIFF" in report["found"]["pdf.png"][1]
    assert "3 frames" in report["found"]["moving.webp"][1]
    assert "300 pages" in report["found"]["pages.tif"][1]
