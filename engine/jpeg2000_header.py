"""A JPEG 2000's boxes, image size marker and tile-parts: ITU-T T.800, annexes A and I (JP2), bare codestreams too."""

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size, ceil_div
from engine.picture_header import Header, big_endian, read_exactly

CODESTREAM = b"\xff\x4f\xff\x51"
_MAX_BOXES = 256
_MAX_BOX_BYTES = 8 << 20
"""Of all boxes but the codestream: real profiles and XMP stay far below."""
_MAX_TILE_PARTS = 1 << 16
_COLOUR_SPACES = {16: 3, 17: 1}
"""Enumerated sRGB and grey: their number of colours."""
_COLOUR_NAMES = {12: "CMYK", 14: "CIE Lab", 18: "sYCC", 20: "e-sRGB", 21: "ROMM RGB", 24: "e-sYCC"}
_ICC_COLOURS = {b"GRAY": 1, b"RGB ": 3}
_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


@dataclass(frozen=True, slots=True)
class Boxes:
    """What a JP2 file says around its codestream."""

    codestream: tuple[int, int]
    """Its first byte and the one behind its last."""
    num_colours: int | None = None
    """None where nothing says it: a bare codestream."""
    icc: bytes = b""
    xmp: bytes = b""
    resolution_px_per_mm: tuple[float, float] | None = None
    """(y, x)"""
    alpha: bool = False
    premultiplied: bool = False


@dataclass(frozen=True, slots=True)
class _Codestream:
    size: Size
    channels: int
    bits: int


def read_header(file: BufferedReader, path: Path) -> Header:
    """Raises UnsupportedInput for what is not restored, UnreadableInput where tile-parts are missing."""
    boxes = read_boxes(file, path)
    stored = _read_codestream(file, path, *boxes.codestream)
    colours = boxes.num_colours or (1 if stored.channels == 1 else 3)
    if stored.channels != colours + boxes.alpha:
        _refuse(
            path,
            f"{stored.channels} channels where {colours + boxes.alpha} have a meaning",
            "grey and RGB with at most one alpha channel are restored; remove the rest",
        )
    dtype = "uint8" if stored.bits <= 8 else "uint16"
    conversion = "" if stored.bits in (8, 16) else "bits"
    if boxes.premultiplied:
        if conversion:
            _refuse(path, f"alpha multiplied into {stored.bits}-bit colours", "save it with straight alpha")
        conversion = "premultiplied"
    # OpenJPEG holds 4 bytes a sample, the whole file, and the picture it gives
    itemsize = 1 if dtype == "uint8" else 2
    held = stored.size.num_pixels * stored.channels * (4 + itemsize) + os.fstat(file.fileno()).st_size
    return Header(
        "jpeg2000",
        stored.size,
        stored.channels,
        dtype,
        held,
        conversion=conversion,
        stored_bits=stored.bits,
        resolution_px_per_mm=boxes.resolution_px_per_mm,
    )


def read_boxes(file: BufferedReader, path: Path) -> Boxes:
    """The boxes of a JP2 file; those of a bare codestream say nothing."""
    num_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    if file.read(4) == CODESTREAM:
        return Boxes((0, num_bytes))
    return _Reader(file, path).read(num_bytes)


class _Reader:
    def __init__(self, file: BufferedReader, path: Path) -> None:
        self.file, self.path = file, path
        self.num_boxes = 0
        self.colours: int | None = None
        self.icc = self.xmp = b""
        self.alpha = self.premultiplied = False
        self.resolution: tuple[float, float] | None = None
        self.codestream: tuple[int, int] | None = None

    def read(self, num_bytes: int) -> Boxes:
        self.walk(0, num_bytes)
        if self.codestream is None or self.colours is None:
            self.damaged("its header or its codestream is missing")
        return Boxes(
            self.codestream,
            self.colours,
            self.icc,
            self.xmp,
            self.resolution,
            self.alpha,
            self.premultiplied,
        )

    def walk(self, start: int, end: int) -> None:
        while start + 8 <= end:
            self.num_boxes += 1
            if self.num_boxes > _MAX_BOXES:
                _refuse(self.path, f"more than {_MAX_BOXES} boxes", "save it anew")
            self.file.seek(start)
            head = self.file.read(16)
            length, kind, body = big_endian(head[:4]), head[4:8], start + 8
            if length == 1:
                length, body = big_endian(head[8:16]), start + 16
            length = length or end - start
            if length < body - start or start + length > end:
                raise UnreadableInput(
                    f"{self.path}: truncated: {start + length} bytes are needed, it has {end}. Copy it anew."
                )
            self.box(kind, body, start + length)
            start += length

    def box(self, kind: bytes, start: int, end: int) -> None:
        if kind in (b"jp2h", b"res "):
            return self.walk(start, end)
        if kind == b"jp2c":
            if self.codestream is None:  # JPX may hold more; JP2 readers show the first
                self.codestream = (start, end)
            return None
        if kind in (b"colr", b"cdef", b"uuid", b"resc", b"resd"):
            if end - start > _MAX_BOX_BYTES:
                _refuse(
                    self.path,
                    f"{end - start:,} bytes beside the pixels, the limit is {_MAX_BOX_BYTES:,}",
                    "save it without",
                )
            self.file.seek(start)
            return self.field(kind, self.file.read(end - start))
        if kind == b"pclr":
            _refuse(self.path, "a palette", "convert it to RGB")
        if kind in (b"mp4 ", b"moov"):
            _refuse(self.path, "a film", "save the frame that is meant")
        return None

    def field(self, kind: bytes, body: bytes) -> None:
        if kind == b"colr":
            self.colour(body)
        elif kind == b"cdef":
            self.channels(body)
        elif kind == b"uuid" and body[:16] == _XMP:
            self.xmp = body[16:]
        elif kind == b"resc" or (kind == b"resd" and self.resolution is None):
            self.resolution = _resolution(body) or self.resolution

    def colour(self, body: bytes) -> None:
        """The first colour specification counts, as in annex I."""
        if self.colours is not None:
            return
        method, space = body[:1], big_endian(body[3:7])
        if method == b"\1":
            if space not in _COLOUR_SPACES:
                _refuse(self.path, _COLOUR_NAMES.get(space, f"colour space {space}"), "convert it to sRGB or grey")
            self.colours = _COLOUR_SPACES[space]
        elif method in (b"\2", b"\3") and body[39:43] == b"acsp" and body[19:23] in _ICC_COLOURS:
            self.icc, self.colours = body[3:], _ICC_COLOURS[body[19:23]]
        else:
            _refuse(self.path, "a colour specification other than sRGB, grey or a profile of them", "convert it to RGB")

    def channels(self, body: bytes) -> None:
        """Colours in their order, then at most one alpha for the whole picture."""
        entries = list(struct.iter_unpack(">HHH", body[2 : 2 + 6 * big_endian(body[:2])]))
        for num, (channel, kind, meaning) in enumerate(entries):
            last = num == len(entries) - 1
            if channel == num and kind == 0 and meaning == num + 1:
                continue
            if channel == num and last and kind in (1, 2) and meaning == 0:
                self.alpha, self.premultiplied = True, kind == 2
                continue
            _refuse(self.path, "channels in an order or of a kind of its own", "save grey or RGB, alpha last")

    def damaged(self, what: str) -> NoReturn:
        raise UnreadableInput(f"{self.path}: a damaged JPEG 2000: {what}. Copy or scan it anew.")


def _resolution(body: bytes) -> tuple[float, float] | None:
    """(y, x) pixels per mm, from fractions of pixels per metre."""
    if len(body) < 10:
        return None
    y_num, y_den, x_num, x_den, y_exp, x_exp = struct.unpack(">HHHHbb", body[:10])
    if 0 in (y_num, y_den, x_num, x_den):
        return None
    return y_num / y_den * 10.0**y_exp / 1000, x_num / x_den * 10.0**x_exp / 1000


def _read_codestream(file: BufferedReader, path: Path, start: int, end: int) -> _Codestream:
    """The SIZ marker, and a walk over the tile-parts to the end of the codestream."""
    file.seek(start)
    head = read_exactly(file, 42)
    if not head or head[:4] != CODESTREAM:
        raise UnreadableInput(f"{path}: the JPEG 2000 header is damaged or cut off. Copy or scan it anew.")
    x1, y1, x0, y0, tile_w, tile_h, tile_x0, tile_y0 = struct.unpack(">8I", head[8:40])
    channels = big_endian(head[40:42])
    size = Size(h=y1 - y0, w=x1 - x0)
    if min(size.h, size.w, tile_w, tile_h) < 1 or tile_x0 > x0 or tile_y0 > y0 or x0 >= tile_x0 + tile_w:
        raise UnreadableInput(f"{path}: no JPEG 2000 has {size} px in such tiles. Copy or scan it anew.")
    if channels > 4:
        _refuse(path, f"{channels} channels", "grey and RGB with at most one alpha channel are restored")
    described = read_exactly(file, 3 * channels)
    if not described or big_endian(head[4:6]) != 38 + 3 * channels:
        raise UnreadableInput(f"{path}: the JPEG 2000 header is damaged or cut off. Copy or scan it anew.")
    depths, steps = described[::3], set(described[1::3] + described[2::3])
    if max(depths) & 0x80:
        _refuse(path, "signed numbers", "convert it to 8 or 16 bit unsigned")
    if len(set(depths)) != 1 or depths[0] + 1 > 16 or steps != {1}:
        bits = "/".join(str(depth + 1) for depth in depths)
        _refuse(path, f"{bits} bits in steps of {max(steps)} px", "save every channel whole, with up to 16 bit")
    tiles = ceil_div(x1 - tile_x0, tile_w) * ceil_div(y1 - tile_y0, tile_h)
    if tiles > _MAX_TILE_PARTS - 1:
        raise UnreadableInput(f"{path}: {tiles:,} tiles, no JPEG 2000 has more than 65,535. Copy or scan it anew.")
    _check_tile_parts(file, path, start, end, tiles)
    return _Codestream(size, channels, depths[0] + 1)


def _check_tile_parts(file: BufferedReader, path: Path, start: int, end: int, tiles: int) -> None:
    """Raises UnreadableInput unless every tile has a part and the codestream reaches its end."""
    offset, seen = _first_tile_part(file, path, start), set[int]()
    for _ in range(_MAX_TILE_PARTS):
        file.seek(offset)
        head = file.read(12)
        if head[:2] == b"\xff\xd9" and offset + 2 <= end:
            break
        if head[:2] != b"\xff\x90" or len(head) < 12 or offset + 12 > end:
            raise UnreadableInput(f"{path}: truncated or damaged at byte {offset} of {end}. Copy or scan it anew.")
        tile = big_endian(head[4:6])
        if tile >= tiles:
            raise UnreadableInput(f"{path}: a part of tile {tile} of {tiles}: it is damaged. Copy or scan it anew.")
        seen.add(tile)
        length = big_endian(head[6:10])
        if length == 0:  # the last part: up to the end
            file.seek(end - 2)
            if file.read(2) != b"\xff\xd9":
                raise UnreadableInput(f"{path}: truncated: no end of the codestream at byte {end}. Copy it anew.")
            break
        if length < 14:
            raise UnreadableInput(f"{path}: damaged at byte {offset} of {end}. Copy or scan it anew.")
        offset += length
    if len(seen) != tiles:
        raise UnreadableInput(f"{path}: {tiles} tiles are needed, {len(seen)} are there. Copy or scan it anew.")


def _first_tile_part(file: BufferedReader, path: Path, start: int) -> int:
    """The offset behind the main header's markers."""
    offset = start + 2
    for _ in range(1000):
        file.seek(offset)
        head = file.read(4)
        if head[:2] == b"\xff\x90":
            return offset
        if len(head) < 4 or head[0] != 0xFF or big_endian(head[2:]) < 2:
            break
        offset += 2 + big_endian(head[2:])
    raise UnreadableInput(f"{path}: the JPEG 2000 header is damaged or cut off. Copy or scan it anew.")


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise UnsupportedInput(f"{path}: a JPEG 2000 with {what}; {remedy}.")
