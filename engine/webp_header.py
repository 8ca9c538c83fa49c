"""A WebP's canvas and frames: RFC 9649 (RIFF container, VP8, VP8L, VP8X)."""

import os
from io import BufferedReader
from pathlib import Path

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size
from engine.picture_header import Header, read_exactly

_ANIMATED, _ALPHA = 0x02, 0x10
_MAX_CHUNKS = 1000
_MAX_CHUNK_BYTES = 8 << 20
"""Of a profile, EXIF or XMP."""


def read_header(file: BufferedReader, path: Path) -> Header:
    """Raises UnsupportedInput for animations, UnreadableInput for files that are cut off or say two sizes."""
    num_bytes = os.fstat(file.fileno()).st_size
    file.seek(4)
    riff_bytes = _uint(file.read(4)) + 8
    if riff_bytes > num_bytes:
        raise UnreadableInput(f"{path}: truncated: {riff_bytes} bytes are needed, it has {num_bytes}. Copy it anew.")
    chunks = _chunks(file, path, riff_bytes)
    kind = next(iter(chunks), b"")
    if kind == b"VP8X":
        return _extended(file, path, chunks)
    if kind not in (b"VP8 ", b"VP8L"):
        raise UnreadableInput(f"{path}: a WebP that begins with {kind!r} is damaged. Copy or scan it anew.")
    size, alpha = _frame(file, path, kind, chunks[kind][0])
    return _header(size, alpha)


def _extended(file: BufferedReader, path: Path, chunks: "_Chunks") -> Header:
    file.seek(chunks[b"VP8X"][0])
    body = read_exactly(file, 10)
    if not body:
        raise UnreadableInput(f"{path}: the WebP header is damaged or cut off. Copy or scan it anew.")
    flags, size = body[0], Size(h=_uint(body[7:10]) + 1, w=_uint(body[4:7]) + 1)
    if flags & _ANIMATED or b"ANIM" in chunks or b"ANMF" in chunks:
        frames = len(chunks.get(b"ANMF", ()))
        raise UnsupportedInput(
            f"{path}: a WebP animation of {frames} frames; 1 picture is restored. Save the frame that is meant."
        )
    kind = next((kind for kind in (b"VP8 ", b"VP8L") if kind in chunks), b"")
    if not kind:
        raise UnreadableInput(f"{path}: a WebP without a picture is damaged. Copy or scan it anew.")
    stored, _ = _frame(file, path, kind, chunks[kind][0])
    if stored != size:
        raise UnreadableInput(f"{path}: a WebP of {size} px that holds one of {stored} px. Copy or scan it anew.")
    return _header(size, bool(flags & _ALPHA))


def _header(size: Size, alpha: bool) -> Header:
    channels = 4 if alpha else 3
    return Header("webp", size, channels, "uint8", size.num_pixels * 4)  # libwebp decodes a whole frame


_Chunks = dict[bytes, list[int]]


def _chunks(file: BufferedReader, path: Path, end: int) -> _Chunks:
    """Where the data of each kind of chunk begins, in the order of their first appearance."""
    found: _Chunks = {}
    offset = 12
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > end:
            return found
        file.seek(offset)
        head = read_exactly(file, 8)
        length = _uint(head[4:])
        if not head or offset + 8 + length > end:
            raise UnreadableInput(
                f"{path}: truncated: {offset + 8 + length} bytes are needed, it has {end}. Copy it anew."
            )
        if head[:4] in (b"ICCP", b"EXIF", b"XMP ") and length > _MAX_CHUNK_BYTES:
            raise UnsupportedInput(
                f"{path}: {length:,} bytes beside the pixels, the limit is {_MAX_CHUNK_BYTES:,}. "
                "Save the picture without its texts and profile."
            )
        found.setdefault(head[:4], []).append(offset + 8)
        offset += 8 + length + length % 2
    raise UnsupportedInput(f"{path}: a WebP of more than {_MAX_CHUNKS} frames or chunks. Save the frame that is meant.")


def _frame(file: BufferedReader, path: Path, kind: bytes, offset: int) -> tuple[Size, bool]:
    """The size that the compressed picture itself states, and whether it says that it has alpha."""
    file.seek(offset)
    body = file.read(10)
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = _uint(body[1:5])
        return Size(h=(bits >> 14 & 0x3FFF) + 1, w=(bits & 0x3FFF) + 1), bool(bits >> 28 & 1)
    if kind == b"VP8 " and len(body) == 10 and body[3:6] == b"\x9d\x01\x2a":
        size = Size(h=_uint(body[8:10]) & 0x3FFF, w=_uint(body[6:8]) & 0x3FFF)
        if min(size.h, size.w) > 0:
            return size, False
    raise UnreadableInput(f"{path}: the WebP header is damaged or cut off. Copy or scan it anew.")


def _uint(data: bytes) -> int:
    return int.from_bytes(data, "little")
