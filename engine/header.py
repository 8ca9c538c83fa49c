"""What a PNG, JPEG or TIFF file says of itself, read without any decoder.

The magic bytes decide the format. What is not one of the pictures that are restored (8 or 16 bit, grey or RGB, with or
without straight alpha) is refused here, before a decoder sees a single byte of it.

    PNG   W3C Portable Network Graphics, third edition, sections 5 and 11
    JPEG  ITU-T T.81, annex B
    TIFF  revision 6.0 and BigTIFF: see `engine.tiff_header`
"""

import os
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from engine import tiff_header
from engine.errors import DisguisedInput, UnreadableInput, UnsupportedInput
from engine.geometry import Size

MAX_WORKING_BYTES = 512 << 20
"""What a decoder may have to hold at once: interlaced, progressive and single-strip files are not streams."""

SUFFIXES = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "tiff": (".tif", ".tiff", ".btf", ".tf8"),
}
"""The names under which a format is accepted."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)
_OTHER_MAGIC = (
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"PK\x03\x04", "ZIP"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"<", "XML, SVG or HTML"),
    (b"#!", "script"),
)
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_MAX_SIDE_PX = 2**31 - 1
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class Header:
    """The layout of the stored pixels, before any EXIF orientation."""

    format: str
    """"png", "jpeg" or "tiff"."""
    size: Size
    channels: int
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha, after palettes and transparent colours are expanded."""
    dtype: str
    """"uint8" or "uint16"."""
    working_bytes: int
    """The least that a decoder must hold at once where the file cannot be read row by row, else 0."""


def read_header(file: BufferedReader, path: Path) -> Header:
    """The header of an open file. Raises the InputError that says why it is not restored."""
    head = file.read(16)
    if not head:
        raise UnreadableInput(f"{path}: the file is empty (0 bytes). Give a picture.")
    found = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    _check_name(path, found, head)
    file.seek(0)
    if found == "png":
        return _read_png(file, path)
    return _read_jpeg(file, path) if found == "jpeg" else _read_tiff(file, path)


def check_png_end(file: BufferedReader, path: Path) -> None:
    """Raises UnreadableInput unless the chunks of a PNG reach its IEND; libpng does not mind when that is cut off."""
    num_bytes = os.fstat(file.fileno()).st_size
    offset = 8
    while True:
        file.seek(offset)
        length, kind = _png_chunk(file, path)
        offset += 12 + length
        if offset > num_bytes:
            raise UnreadableInput(f"{path}: truncated: {offset} bytes are needed, it has {num_bytes}. Copy it anew.")
        if kind == b"IEND":
            return


def _check_name(path: Path, found: str | None, head: bytes) -> None:
    suffix = path.suffix.lower()
    named = next((name for name, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if found is not None and named != found:
        raise DisguisedInput(
            f"{path}: the content is {found.upper()}, the name ends in '{path.suffix}'. "
            f"Rename it to '{path.stem}{SUFFIXES[found][0]}'."
        )
    if found is None:
        other = next((name for magic, name in _OTHER_MAGIC if head.startswith(magic)), None)
        if named is not None and other is not None:
            raise DisguisedInput(f"{path}: the name says {named.upper()}, the content is {other}. Convert it to PNG.")
        if named is not None:
            raise UnreadableInput(f"{path}: damaged, or not a {named.upper()} at all: it starts with {head[:8]!r}.")
        raise UnsupportedInput(f"{path}: {other or 'not a picture format that is known'}. Convert it to PNG or TIFF.")


def _read_png(file: BufferedReader, path: Path) -> Header:
    file.seek(8)
    length, kind = _png_chunk(file, path)
    body = file.read(13)
    if (length, kind, len(body)) != (13, b"IHDR", 13) or zlib.crc32(kind + body) != _uint(file.read(4)):
        raise UnreadableInput(f"{path}: the PNG header is damaged or cut off. Copy or scan it anew.")
    size = Size(h=_uint(body[4:8]), w=_uint(body[:4]))
    depth, colour, interlaced = body[8], body[9], body[12]
    if depth not in _PNG_DEPTHS.get(colour, ()) or not 0 < min(size.h, size.w) <= size.long_side <= _PNG_MAX_SIDE_PX:
        raise UnreadableInput(f"{path}: no PNG has {size} px, colour type {colour} and {depth} bits. Copy it anew.")
    kinds = _png_kinds_before_pixels(file, path)
    if b"acTL" in kinds:
        raise UnsupportedInput(f"{path}: an animated PNG. Save the picture that is meant as a plain PNG.")
    channels = _PNG_CHANNELS[colour] + (b"tRNS" in kinds and colour in (0, 2, 3))
    num_bytes = size.num_pixels * channels * (2 if depth == 16 else 1)
    return Header("png", size, channels, "uint16" if depth == 16 else "uint8", num_bytes if interlaced else 0)


def _png_kinds_before_pixels(file: BufferedReader, path: Path) -> set[bytes]:
    kinds: set[bytes] = set()
    while True:
        length, kind = _png_chunk(file, path)
        if kind in (b"IDAT", b"IEND"):
            return kinds
        kinds.add(kind)
        file.seek(length + 4, os.SEEK_CUR)


def _png_chunk(file: BufferedReader, path: Path) -> tuple[int, bytes]:
    head = file.read(8)
    if len(head) < 8:
        raise UnreadableInput(f"{path}: truncated: the file ends within a PNG chunk. Copy or scan it anew.")
    return _uint(head[:4]), head[4:]


def _read_jpeg(file: BufferedReader, path: Path) -> Header:
    marker, body = _jpeg_frame(file, path)
    precision, size, channels = body[0], Size(h=_uint(body[1:3]), w=_uint(body[3:5])), body[5]
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8:
        raise UnsupportedInput(
            f"{path}: a JPEG of kind SOF{marker - 0xC0} with {precision} bits. Save it as PNG or TIFF."
        )
    if channels not in (1, 3):
        what = "CMYK" if channels == 4 else f"{channels} channels"
        raise UnsupportedInput(f"{path}: a JPEG in {what}; grey and RGB are restored. Convert it to RGB.")
    if min(size.h, size.w) == 0:
        raise UnsupportedInput(f"{path}: a JPEG that does not state its height ({size} px). Save it anew.")
    coefficient_bytes = 2 * size.num_pixels * channels
    return Header("jpeg", size, channels, "uint8", coefficient_bytes if marker == 0xC2 else 0)


def _jpeg_frame(file: BufferedReader, path: Path) -> tuple[int, bytes]:
    """The first start-of-frame marker and what it holds (at least 6 bytes)."""
    file.seek(2)
    while byte := file.read(1):
        marker = file.read(1)
        while marker == b"\xff":
            marker = file.read(1)
        if byte != b"\xff" or not marker:
            break
        if marker[0] in _JPEG_BARE_MARKERS:
            continue
        length = _uint(file.read(2))
        if length < 2 or marker[0] in (0xD9, 0xDA):
            break
        if marker[0] in _JPEG_FRAMES:
            body = file.read(length - 2)
            if len(body) < 6 or len(body) != length - 2:
                break
            return marker[0], body
        file.seek(length - 2, os.SEEK_CUR)
    raise UnreadableInput(f"{path}: the JPEG header is damaged or cut off. Copy or scan it anew.")


def _read_tiff(file: BufferedReader, path: Path) -> Header:
    layout = tiff_header.read_layout(file, path)
    return Header("tiff", layout.size, layout.channels, layout.dtype, layout.working_bytes)


def _uint(data: bytes) -> int:
    return int.from_bytes(data, "big")
