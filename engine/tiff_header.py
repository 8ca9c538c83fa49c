"""The first picture of a TIFF or BigTIFF file, as its tags describe it, and whether all of its bytes are there.

Written from TIFF revision 6.0 (1992) and the BigTIFF design (libtiff). libtiff itself forgives cut off files, several
pages and alpha that is multiplied into the colours; a scan to be restored must not be guessed at, so this refuses them.
"""

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import numpy as np

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size, ceil_div

_MAX_DIRECTORIES = 64
_MAX_SEGMENTS = 1 << 24
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UINT_CODES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339

_NONE, _JPEG = 1, 7
_COMPRESSIONS = (_NONE, 2, 3, 4, 5, _JPEG, 8, 32773, 32946)
_FAX = (2, 3, 4)
_COLOUR_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}
_PALETTE, _YCBCR = 3, 6
_PHOTOMETRIC_NAMES = {
    4: "a transparency mask",
    5: "CMYK",
    8: "CIE Lab",
    9: "ICC Lab",
    10: "ITU Lab",
    32803: "a raw CFA",
}
_STRAIGHT_ALPHA = 2
_EXTRA_NAMES = {0: "a channel of unknown meaning", 1: "alpha multiplied into the colours"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The stored pixels of the first directory."""

    size: Size
    channels: int
    """After a palette is expanded to RGB."""
    dtype: str
    working_bytes: int
    """The longest compressed strip, or one row of tiles, decoded: what a reader must hold at once."""


@dataclass(frozen=True, slots=True)
class _Directory:
    path: Path
    tags: dict[int, tuple[int, ...]]
    """The values of every tag whose type is an unsigned integer and that this module asks for."""

    def one(self, tag: int, default: int = 0) -> int:
        values = self.tags.get(tag, ())
        return values[0] if values else default

    @property
    def size(self) -> Size:
        return Size(self.one(_HEIGHT), self.one(_WIDTH))

    @property
    def tiled(self) -> bool:
        return _TILE_OFFSETS in self.tags

    @property
    def segment_size(self) -> Size:
        if self.tiled:
            return Size(self.one(_TILE_HEIGHT), self.one(_TILE_WIDTH))
        return Size(max(1, min(self.one(_STRIP_ROWS, self.size.h), self.size.h)), self.size.w)

    @property
    def separate_planes(self) -> bool:
        return self.one(_PLANAR, 1) == 2

    def row_bytes(self, width_px: int) -> int:
        samples = 1 if self.separate_planes else self.one(_SAMPLES, 1)
        return ceil_div(width_px * samples * self.one(_BITS, 1), 8)


def read_layout(file: BufferedReader, path: Path) -> Layout:
    """Raises UnsupportedInput for what is not restored, UnreadableInput where bytes are missing."""
    directories = _Reader(file, path).directories()
    first = directories[0]
    if first.one(_SUBFILE) & 1 or any(not later.one(_SUBFILE) & 1 for later in directories[1:]):
        _refuse(path, f"{len(directories)} pages", "one page is restored; split it into files")
    if min(first.size.h, first.size.w) < 1:
        raise UnreadableInput(f"{path}: a TIFF of {first.size} px: its header is damaged. Copy or scan it anew.")
    channels = _check_samples(first)
    num_bytes = os.fstat(file.fileno()).st_size
    for directory in directories:
        _check_segments(directory, num_bytes)
    dtype = "uint16" if first.one(_BITS, 1) == 16 else "uint8"
    return Layout(first.size, channels, dtype, _working_bytes(first))


def _check_samples(first: _Directory) -> int:
    """The number of channels of the expanded picture."""
    path, photometric, bits = first.path, first.one(_PHOTOMETRIC, -1), first.tags.get(_BITS, (1,))
    samples, compression = first.one(_SAMPLES, 1), first.one(_COMPRESSION, _NONE)
    if photometric not in _COLOUR_CHANNELS:
        name = _PHOTOMETRIC_NAMES.get(photometric, f"colour model {photometric}")
        _refuse(path, name, "grey and RGB are restored; convert it to RGB")
    if compression not in _COMPRESSIONS:
        _refuse(path, f"compression {compression}", "save it uncompressed or with LZW or Deflate")
    if set(first.tags.get(_FORMAT, (1,))) != {1}:
        _refuse(path, "floating-point or signed numbers", "convert it to 8 or 16 bit unsigned")
    extra = samples - _COLOUR_CHANNELS[photometric]
    allowed = (8,) if photometric in (_PALETTE, _YCBCR) or compression == _JPEG else (8, 16)
    allowed = (*allowed, 1) if photometric in (0, 1) and samples == 1 else allowed
    if len(set(bits)) != 1 or bits[0] not in allowed or (compression in _FAX and bits[0] != 1):
        _refuse(path, f"{'/'.join(map(str, bits))} bits per channel", "convert it to 8 or 16 bit")
    if extra not in (0, 1) or (extra and photometric in (_PALETTE, _YCBCR)):
        _refuse(
            path, f"{samples} channels", "grey and RGB with at most one alpha channel are restored; remove the rest"
        )
    if extra and first.tags.get(_EXTRA) != (_STRAIGHT_ALPHA,):
        what = _EXTRA_NAMES.get(first.one(_EXTRA), "more channels than its colour model has")
        _refuse(path, what, "save it with straight (unassociated) alpha or without")
    if photometric == _YCBCR and compression != _JPEG:
        _refuse(path, "YCbCr without JPEG compression", "convert it to RGB")
    if first.separate_planes and first.tiled:
        _refuse(path, "tiles in separate planes", "save it with interleaved channels")
    return 3 if photometric == _PALETTE else samples


def _check_segments(directory: _Directory, num_bytes: int) -> None:
    """Raises UnreadableInput unless every strip or tile is there, whole, and long enough where that is known."""
    path, size, segment = directory.path, directory.size, directory.segment_size
    if min(size.h, size.w, segment.h, segment.w) < 1:
        raise UnreadableInput(f"{path}: strips or tiles of {segment} px: the header is damaged. Copy or scan it anew.")
    offsets = np.array(directory.tags.get(_TILE_OFFSETS if directory.tiled else _STRIP_OFFSETS, ()), np.uint64)
    lengths = np.array(directory.tags.get(_TILE_BYTES if directory.tiled else _STRIP_BYTES, ()), np.uint64)
    planes = directory.one(_SAMPLES, 1) if directory.separate_planes else 1
    needed = ceil_div(size.h, segment.h) * ceil_div(size.w, segment.w) * planes
    if len(offsets) != needed or len(lengths) != needed or not lengths.all():
        raise UnreadableInput(
            f"{path}: {needed} strips or tiles are needed, {int(np.count_nonzero(lengths))} have data. Copy it anew."
        )
    end = int(offsets.max()) + int(lengths[int(offsets.argmax())])
    if int(lengths.max()) > num_bytes or int((offsets + lengths).max()) > num_bytes:
        raise UnreadableInput(f"{path}: truncated: {end} bytes are needed, it has {num_bytes}. Copy or scan it anew.")
    if directory.one(_COMPRESSION, _NONE) == _NONE:
        rows = np.full(needed, segment.h)
        if not directory.tiled and size.h % segment.h:
            rows[ceil_div(size.h, segment.h) - 1 :: ceil_div(size.h, segment.h)] = size.h % segment.h
        if (lengths < (rows * directory.row_bytes(segment.w)).astype(np.uint64)).any():
            raise UnreadableInput(f"{path}: a strip or tile is shorter than its pixels. Copy or scan it anew.")


def _working_bytes(first: _Directory) -> int:
    segment = first.segment_size
    if first.tiled:
        return ceil_div(first.size.w, segment.w) * segment.h * first.row_bytes(segment.w)
    # large strips are decoded line by line, from all of their compressed bytes
    return 0 if first.one(_COMPRESSION, _NONE) == _NONE else max(first.tags[_STRIP_BYTES])


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise UnsupportedInput(f"{path}: a TIFF with {what}; {remedy}.")


class _Reader:
    """Walks the directories of one file; every offset in it is checked against the file's length."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self.file, self.path = file, path
        self.num_bytes = os.fstat(file.fileno()).st_size
        head = self.take(0, 8)
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = self.uint(head[2:4]) == 43
        self.start = self.uint(self.take(8, 8)) if self.big else self.uint(head[4:8])

    def take(self, offset: int, num_bytes: int) -> bytes:
        if offset + num_bytes > self.num_bytes:
            raise UnreadableInput(
                f"{self.path}: truncated: {offset + num_bytes} bytes are needed, it has {self.num_bytes}. Copy it anew."
            )
        self.file.seek(offset)
        return self.file.read(num_bytes)

    def uint(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")

    def directories(self) -> list[_Directory]:
        found: list[_Directory] = []
        offset, seen = self.start, set[int]()
        while offset:
            if offset in seen or len(found) == _MAX_DIRECTORIES:
                _refuse(self.path, f"more than {len(found)} pages, or pages in a circle", "split it into files")
            seen.add(offset)
            directory, offset = self.directory(offset)
            found.append(directory)
        if not found:
            raise UnreadableInput(f"{self.path}: a TIFF without a picture: its header is damaged. Copy it anew.")
        return found

    def directory(self, offset: int) -> tuple[_Directory, int]:
        """One directory and the offset of the next (0 when it is the last)."""
        count_bytes, entry_bytes, link_bytes = (8, 20, 8) if self.big else (2, 12, 4)
        num = self.uint(self.take(offset, count_bytes))
        entries = self.take(offset + count_bytes, num * entry_bytes + link_bytes)
        tags: dict[int, tuple[int, ...]] = {}
        for at in range(0, num * entry_bytes, entry_bytes):
            tag, values = self.entry(entries[at : at + entry_bytes])
            tags.setdefault(tag, values)
        return _Directory(self.path, tags), self.uint(entries[num * entry_bytes :])

    def entry(self, data: bytes) -> tuple[int, tuple[int, ...]]:
        tag, kind = struct.unpack(self.order + "HH", data[:4])
        inline_bytes = 8 if self.big else 4
        count, inline = self.uint(data[4:-inline_bytes]), data[-inline_bytes:]
        length = count * _TYPE_BYTES.get(kind, 1)
        if length > inline_bytes:
            offset = self.uint(inline)
            self.take(offset + length, 0)
        if kind not in _UINT_CODES or not 0 < count <= _MAX_SEGMENTS or tag not in _READ_TAGS:
            return tag, ()
        raw = inline[:length] if length <= inline_bytes else self.take(self.uint(inline), length)
        return tag, tuple(np.frombuffer(raw, self.order + _UINT_CODES[kind]).tolist())


_READ_TAGS = {
    *(
        _SUBFILE,
        _WIDTH,
        _HEIGHT,
        _BITS,
        _COMPRESSION,
        _PHOTOMETRIC,
        _STRIP_OFFSETS,
        _SAMPLES,
        _STRIP_ROWS,
        _STRIP_BYTES,
    ),
    *(_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _FORMAT),
}
