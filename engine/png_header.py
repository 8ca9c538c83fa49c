"""A PNG's header and its ancillary chunks: W3C Portable Network Graphics, third edition, sections 5 and 11."""

import os
import zlib
from io import BufferedReader
from pathlib import Path

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size
from engine.picture_header import Header, big_endian, listed, read_exactly

_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_MAX_SIDE_PX = 2**31 - 1
_MAX_CHUNKS = 1000
_MAX_ANCILLARY_BYTES = 8 << 20
"""Of all chunks beside the pixels, as they are once inflated: real profiles and texts stay far below."""
_STEP_BYTES = 1 << 20
_INFLATED = (b"iCCP", b"zTXt", b"iTXt")
_KEPT = {b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"pHYs", b"tEXt", b"zTXt", b"iTXt"}
"""Carried, or told of elsewhere."""
_COLOUR = {b"cHRM", b"gAMA", b"sRGB", b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi"}
_SMALL = (b"gAMA", b"cICP", b"pHYs")
_HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of ITU-T H.273 whose values are not those of a display."""
_SRGB_GAMMA, _GAMMA_TOLERANCE = 45455, 455


def read_header(file: BufferedReader, path: Path) -> Header:
    """The header, and a check of all that a decoder would inflate before the first pixel."""
    file.seek(8)
    length, kind = _chunk(file, path)
    body = file.read(13)
    if (length, kind, len(body)) != (13, b"IHDR", 13) or zlib.crc32(kind + body) != big_endian(file.read(4)):
        raise UnreadableInput(f"{path}: the PNG header is damaged or cut off. Copy or scan it anew.")
    size = Size(h=big_endian(body[4:8]), w=big_endian(body[:4]))
    depth, colour, interlaced = body[8], body[9], body[12]
    if depth not in _DEPTHS.get(colour, ()) or not 0 < min(size.h, size.w) <= size.long_side <= _MAX_SIDE_PX:
        raise UnreadableInput(f"{path}: no PNG has {size} px, colour type {colour} and {depth} bits. Copy it anew.")
    chunks = _chunks_before_pixels(file, path)
    _check_colours(path, chunks)
    channels = _CHANNELS[colour] + (b"tRNS" in chunks and colour in (0, 2, 3))
    num_bytes = size.num_pixels * channels * (2 if depth == 16 else 1)
    return Header(
        "png",
        size,
        channels,
        "uint16" if depth == 16 else "uint8",
        num_bytes if interlaced else 0,
        resolution_px_per_mm=_resolution(chunks.get(b"pHYs", b"")),
        has_profile=b"iCCP" in chunks,
        left_out=_left_out(chunks),
    )


def _check_colours(path: Path, chunks: dict[bytes, bytes]) -> None:
    """Raises UnsupportedInput for samples that mean other colours than the outputs, without these chunks, would say."""
    transfer = chunks.get(b"cICP", b"")[1:2]
    if transfer and transfer[0] in _HDR:
        raise UnsupportedInput(
            f"{path}: an HDR picture ({_HDR[transfer[0]]}, cICP transfer {transfer[0]}), which sRGB cannot show. "
            "Convert it to sRGB or to a profile."
        )
    gamma = big_endian(chunks.get(b"gAMA", b""))
    if not gamma or chunks.keys() & {b"iCCP", b"sRGB", b"cICP"}:
        return
    if abs(gamma - _SRGB_GAMMA) > _GAMMA_TOLERANCE:
        raise UnsupportedInput(
            f"{path}: a gamma of {gamma / 100_000:g} (gAMA) and no profile; {_SRGB_GAMMA / 100_000:g} is what outputs "
            "without a profile are shown with. Convert it to sRGB, or assign a profile."
        )


def _resolution(body: bytes) -> tuple[float, float] | None:
    """(y, x) pixels per mm, where the unit is the metre."""
    x, y = big_endian(body[:4]), big_endian(body[4:8])
    return (y / 1000, x / 1000) if body[8:9] == b"\1" and min(x, y) > 0 else None


def _left_out(chunks: dict[bytes, bytes]) -> tuple[str, ...]:
    colour = [kind.decode() for kind in chunks.keys() & _COLOUR]
    others = [ascii(kind.decode("latin-1"))[1:-1] for kind in chunks.keys() - _COLOUR - _KEPT]
    found = [f"the PNG colour chunks {listed(colour)}"] * bool(colour)
    found += [f"the PNG chunks {listed(others)}"] * bool(others)
    density = chunks.get(b"pHYs", b"")
    if density[8:9] == b"\0" and density[:4] != density[4:8]:
        found.append("a shape of the pixels without a resolution (pHYs)")
    return tuple(found)


def check_end(file: BufferedReader, path: Path) -> None:
    """Raises UnreadableInput unless the chunks reach IEND, as libpng does not mind when that is cut off.

    Raises UnsupportedInput for EXIF behind the pixels: libvips would not see its orientation.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    offset, ancillary, pixels = 8, _Ancillary(path), False
    while True:
        file.seek(offset)
        length, kind = _chunk(file, path)
        offset += 12 + length
        if offset > num_bytes:
            raise UnreadableInput(f"{path}: truncated: {offset} bytes are needed, it has {num_bytes}. Copy it anew.")
        if kind == b"IEND":
            return
        if kind == b"IDAT":
            pixels = True
            continue
        if pixels and kind == b"eXIf":
            raise UnsupportedInput(f"{path}: a PNG with its EXIF data behind the pixels. Save it anew.")
        ancillary.add(file, kind, length)


def _chunks_before_pixels(file: BufferedReader, path: Path) -> dict[bytes, bytes]:
    """The kinds of the chunks behind IHDR, each with its first bytes where these are asked for."""
    found: dict[bytes, bytes] = {}
    ancillary = _Ancillary(path)
    offset = 33
    while True:
        file.seek(offset)
        length, kind = _chunk(file, path)
        if kind in (b"IDAT", b"IEND"):
            return found
        if kind == b"acTL":
            frames = big_endian(read_exactly(file, 4))
            raise UnsupportedInput(
                f"{path}: an animated PNG of {frames} frames; 1 picture is restored. Save it as a plain PNG."
            )
        if kind in _SMALL:
            found.setdefault(kind, file.read(min(length, 9)))
        else:
            found.setdefault(kind, b"")
            ancillary.add(file, kind, length)
        offset += 12 + length


class _Ancillary:
    """Counts the chunks beside the pixels and what they hold once inflated; refuses a file with too much of either."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_chunks = self._num_bytes = 0

    def add(self, file: BufferedReader, kind: bytes, length: int) -> None:
        """`file` stands at the beginning of the chunk's data."""
        self._num_chunks += 1
        self._num_bytes += length
        self._check()
        if kind in _INFLATED:
            self._inflate(_compressed(kind, file.read(length)))

    def _inflate(self, data: bytes) -> None:
        """A damaged stream is for the decoder to judge: it stops there as well."""
        inflate = zlib.decompressobj()
        try:
            while data and not inflate.eof:
                self._num_bytes += len(inflate.decompress(data, _STEP_BYTES))
                self._check()
                data = inflate.unconsumed_tail
        except zlib.error:
            return

    def _check(self) -> None:
        if self._num_chunks > _MAX_CHUNKS:
            raise UnsupportedInput(
                f"{self._path}: more than {_MAX_CHUNKS} chunks beside the pixels. Save the picture without them."
            )
        if self._num_bytes > _MAX_ANCILLARY_BYTES:
            raise UnsupportedInput(
                f"{self._path}: {self._num_bytes:,} bytes or more beside the pixels, the limit is "
                f"{_MAX_ANCILLARY_BYTES:,}. Save the picture without its texts and profile."
            )


def _compressed(kind: bytes, data: bytes) -> bytes:
    """The deflated part of a chunk; empty where there is none."""
    _, _, rest = data.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    if rest[:1] != b"\1":
        return b""
    return rest[2:].partition(b"\0")[2].partition(b"\0")[2]


def _chunk(file: BufferedReader, path: Path) -> tuple[int, bytes]:
    head = file.read(8)
    if len(head) < 8:
        raise UnreadableInput(f"{path}: truncated: the file ends within a PNG chunk. Copy or scan it anew.")
    return big_endian(head[:4]), head[4:]
