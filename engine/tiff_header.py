"""One picture of a TIFF or BigTIFF file, as its tags describe it, and whether all of its bytes are there.

Written from TIFF revision 6.0 (1992) and the BigTIFF design (libtiff). libtiff itself forgives cut off files and shows
the first of several pages; a scan to be restored must not be guessed at, so this refuses them. Directories that are
reduced pictures of others (pyramid levels, thumbnails) or masks of them are no pages.
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size, ceil_div
from engine.picture_header import Header, listed

_MAX_DIRECTORIES = 512
_MAX_ENTRIES = 4096
_MAX_SEGMENTS = 1 << 20
_MAX_VALUES = 64
"""Of all tags but those of strips, tiles and palettes."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UINT_CODES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _COLOURS = 273, 277, 278, 279, 284, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _INKS, _EXTRA, _FORMAT = 322, 323, 324, 325, 332, 338, 339

_NONE, _JPEG, _ZSTD = 1, 7, 50000
_COMPRESSIONS = (_NONE, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, _ZSTD)
_FAX = (2, 3, 4)
_COLOUR_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
_PALETTE, _CMYK, _YCBCR = 3, 5, 6
_PHOTOMETRIC_NAMES = {4: "a transparency mask", 8: "CIE Lab", 9: "ICC Lab", 10: "ITU Lab", 32803: "a raw CFA"}
_NOT_A_PAGE = 1 | 4
_INTEGER, _FLOAT = 1, 3
_PREMULTIPLIED, _STRAIGHT = 1, 2
_CMYK_INKS = 1
_COLOUR_TAGS = {301: "TransferFunction", 318: "WhitePoint", 319: "PrimaryChromaticities"}
_GEO_TAGS = {33550, 33920, 33922, 34264, 34735, 34736, 34737, 42112, 42113}
_KEPT_TAGS = frozenset(
    (*range(254, 260), *range(262, 267), *range(269, 275), *range(277, 286), *range(288, 294), 296, 305, 306)
).union(
    (*range(315, 318), 320, *range(322, 329), *range(330, 335), *range(336, 342), 347, *range(512, 522)),
    (*range(529, 533), 700, 18246, 18249, 33432, 33723, 34377, 34665, 34675, 34853, *range(40091, 40096), 40965),
)
"""Tags of the layout and the samples, those that `engine.metadata` carries, and those it tells of itself."""


class _Entry(NamedTuple):
    """One tag: its values lie in `data`, or in the file from `offset` on."""

    kind: int
    num_values: int
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class _Directory:
    reader: "_Reader"
    index: int
    entries: dict[int, _Entry]

    def values(self, tag: int, most: int = _MAX_VALUES) -> NDArray[np.uint64]:
        """The unsigned integers of a tag; none where it is absent, of another type, or has more than `most`."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _UINT_CODES or not 0 < entry.num_values <= most:
            return np.empty(0, np.uint64)
        code = np.dtype(self.reader.order + _UINT_CODES[entry.kind])
        num_bytes = entry.num_values * code.itemsize
        raw = entry.data[:num_bytes] or self.reader.take(entry.offset, num_bytes)
        return np.frombuffer(raw, code).astype(np.uint64)

    def one(self, tag: int, default: int = 0) -> int:
        values = self.values(tag, 1 << 16)
        return int(values[0]) if len(values) else default

    def count(self, tag: int) -> int:
        entry = self.entries.get(tag)
        return 0 if entry is None else entry.num_values

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def size(self) -> Size:
        return Size(self.one(_HEIGHT), self.one(_WIDTH))

    @property
    def tiled(self) -> bool:
        return _TILE_OFFSETS in self.entries

    @property
    def segment_size(self) -> Size:
        if self.tiled:
            return Size(self.one(_TILE_HEIGHT), self.one(_TILE_WIDTH))
        return Size(max(1, min(self.one(_STRIP_ROWS, self.size.h), self.size.h)), self.size.w)

    @property
    def separate_planes(self) -> bool:
        return self.one(_PLANAR, 1) == 2

    @property
    def is_page(self) -> bool:
        return not self.one(_SUBFILE) & _NOT_A_PAGE

    def row_bytes(self, width_px: int) -> int:
        samples = 1 if self.separate_planes else self.one(_SAMPLES, 1)
        return ceil_div(width_px * samples * self.one(_BITS, 1), 8)


@dataclass(frozen=True, slots=True)
class _Samples:
    """What the values of a directory are."""

    channels: int
    """After a palette is expanded to RGB and CMYK is converted to it."""
    dtype: str
    conversion: str = ""
    palette: tuple[tuple[int, int, int], ...] = ()


def read_header(file: BufferedReader, path: Path, *, page: int | None) -> Header:
    """The header of one page, counted from 0; of the only one where `page` is None.

    Raises UnsupportedInput for what is not restored, UnreadableInput where bytes are missing.
    """
    directories = _Reader(file, path).directories()
    chosen = _chosen(path, directories, page)
    if min(chosen.size.h, chosen.size.w) < 1:
        raise UnreadableInput(f"{path}: a TIFF of {chosen.size} px: its header is damaged. Copy or scan it anew.")
    samples = _check_samples(chosen)
    num_bytes = os.fstat(file.fileno()).st_size
    for directory in directories:
        if directory is chosen or not directory.is_page:
            _check_segments(directory, num_bytes)
    needs_tifffile = (
        (chosen.separate_planes and chosen.tiled)
        or chosen.one(_COMPRESSION) == _ZSTD
        or bool(samples.palette)
        or samples.conversion == "premultiplied"
    )
    return Header(
        "tiff",
        chosen.size,
        samples.channels,
        samples.dtype,
        _working_bytes(chosen, streamed=not needs_tifffile),
        conversion=samples.conversion,
        directory=chosen.index,
        needs_tifffile=needs_tifffile,
        palette=samples.palette,
        left_out=_left_out(chosen.entries.keys()),
    )


def _left_out(tags: Iterable[int]) -> tuple[str, ...]:
    others = set(tags) - _KEPT_TAGS
    colour = [_COLOUR_TAGS[tag] for tag in others & _COLOUR_TAGS.keys()]
    names = [str(tag) for tag in others - _COLOUR_TAGS.keys() - _GEO_TAGS]
    found = [f"the TIFF colour tags {listed(colour)}"] * bool(colour)
    found += ["the place on the earth (GeoTIFF)"] * bool(others & _GEO_TAGS)
    found += [f"the TIFF tags {listed(names)}"] * bool(names)
    return tuple(found)


def _chosen(path: Path, directories: "list[_Directory]", page: int | None) -> _Directory:
    pages = [directory for directory in directories if directory.is_page]
    if not pages:
        _refuse(path, f"{len(directories)} reduced pictures or masks and no page", "save the picture alone")
    if page is None and len(pages) > 1:
        _refuse(path, f"{len(pages)} pages", f"choose one with --page 0 to {len(pages) - 1}, or split it into files")
    if page is not None and not 0 <= page < len(pages):
        _refuse(path, f"{len(pages)} pages", f"page {page} is asked for; the first is 0, the last {len(pages) - 1}")
    return pages[page or 0]


def _check_samples(chosen: _Directory) -> _Samples:
    path, photometric = chosen.path, chosen.one(_PHOTOMETRIC, -1)
    samples, compression = chosen.one(_SAMPLES, 1), chosen.one(_COMPRESSION, _NONE)
    if photometric not in _COLOUR_CHANNELS:
        name = _PHOTOMETRIC_NAMES.get(photometric, f"colour model {photometric}")
        _refuse(path, name, "grey, RGB and CMYK are restored; convert it to RGB")
    if compression not in _COMPRESSIONS:
        _refuse(path, f"compression {compression}", "save it uncompressed or with LZW, Deflate or Zstandard")
    if photometric == _CMYK and chosen.one(_INKS, _CMYK_INKS) != _CMYK_INKS:
        _refuse(path, "inks other than CMYK", "convert it to RGB")
    if photometric == _YCBCR and compression != _JPEG:
        _refuse(path, "YCbCr without JPEG compression", "convert it to RGB")
    if chosen.separate_planes and compression == _JPEG and photometric == _YCBCR:
        _refuse(path, "YCbCr in separate planes", "save it with interleaved channels")
    bits, is_float = _check_bits(chosen, photometric, samples, compression)
    conversion = "float" if is_float else "cmyk" if photometric == _CMYK else ""
    if _check_alpha(chosen, photometric, samples) == _PREMULTIPLIED:
        if is_float:
            _refuse(path, "floating-point alpha multiplied into the colours", "save it with straight alpha")
        conversion = "premultiplied"
    dtype = "uint8" if bits <= 8 else "uint16"
    if photometric == _PALETTE:
        palette = _deep_palette(chosen, bits)
        return _Samples(3, "uint16" if palette else dtype, palette=palette)
    return _Samples(3 if photometric == _CMYK else samples, dtype, conversion)


def _check_bits(chosen: _Directory, photometric: int, samples: int, compression: int) -> tuple[int, bool]:
    """Bits per sample, and whether they are floating point."""
    path, formats = chosen.path, {int(value) for value in chosen.values(_FORMAT)} or {_INTEGER}
    bits = [int(value) for value in chosen.values(_BITS)] or [1]
    allowed = (8,) if photometric == _YCBCR or compression == _JPEG else (8, 16)
    allowed = (*allowed, 1) if photometric in (0, 1) and samples == 1 else allowed
    is_float = formats == {_FLOAT}
    if is_float:
        allowed = (32,) if photometric in (1, 2) and compression != _JPEG else ()
    elif formats != {_INTEGER}:
        _refuse(path, "signed or other numbers", "convert it to 8 or 16 bit unsigned")
    if len(set(bits)) != 1 or bits[0] not in allowed or (compression in _FAX and bits[0] != 1):
        kind = " floating-point" if is_float else ""
        _refuse(path, f"{'/'.join(map(str, bits[:8]))}{kind} bits per channel", "convert it to 8 or 16 bit")
    return bits[0], is_float


def _check_alpha(chosen: _Directory, photometric: int, samples: int) -> int:
    """The kind of the alpha channel, 0 where there is none."""
    extra = samples - _COLOUR_CHANNELS[photometric]
    if extra not in (0, 1) or (extra and photometric in (_PALETTE, _CMYK, _YCBCR)):
        remedy = "grey and RGB with at most one alpha channel are restored, CMYK without; remove the rest"
        _refuse(chosen.path, f"{samples} channels", remedy)
    if not extra:
        return 0
    kinds = [int(value) for value in chosen.values(_EXTRA)]
    if kinds not in ([_PREMULTIPLIED], [_STRAIGHT]):
        what = "a channel of unknown meaning" if kinds == [0] else "more channels than its colour model has"
        _refuse(chosen.path, what, "save it with straight (unassociated) alpha or without")
    return kinds[0]


def _deep_palette(chosen: _Directory, bits: int) -> tuple[tuple[int, int, int], ...]:
    """The colours where libtiff would cut them to 8 bit, else none: it expands 8-bit and 16-bit indices itself."""
    colours = chosen.values(_COLOURS, 3 << 16)
    if len(colours) != 3 << bits:
        raise UnreadableInput(
            f"{chosen.path}: a palette of {3 << bits} values is needed, it has {len(colours)}. Copy it anew."
        )
    low = colours & 0xFF
    if bits == 16 or bool(((low == 0) | (low == colours >> 8)).all()):
        return ()
    if colours.max() < 256:
        _refuse(chosen.path, f"a palette of colours up to {int(colours.max())} of 65535", "save it as RGB")
    return tuple((int(r), int(g), int(b)) for r, g, b in colours.reshape(3, -1).T)


def _check_segments(directory: _Directory, num_bytes: int) -> None:
    """Raises UnreadableInput unless every strip or tile is there, whole, and long enough where that is known."""
    path, size, segment = directory.path, directory.size, directory.segment_size
    if min(size.h, size.w, segment.h, segment.w) < 1:
        raise UnreadableInput(f"{path}: strips or tiles of {segment} px: the header is damaged. Copy or scan it anew.")
    planes = directory.one(_SAMPLES, 1) if directory.separate_planes else 1
    needed = ceil_div(size.h, segment.h) * ceil_div(size.w, segment.w) * planes
    if needed > _MAX_SEGMENTS:
        _refuse(path, f"{needed:,} strips or tiles, the limit is {_MAX_SEGMENTS:,}", "save it in larger ones")
    tags = (_TILE_OFFSETS, _TILE_BYTES) if directory.tiled else (_STRIP_OFFSETS, _STRIP_BYTES)
    counts = [directory.count(tag) for tag in tags]
    offsets, lengths = (directory.values(tag, needed) for tag in tags)
    if counts != [needed, needed] or len(offsets) != needed or len(lengths) != needed or not lengths.all():
        found = min(counts[1], int(np.count_nonzero(lengths)) if counts[1] == needed else counts[1])
        raise UnreadableInput(f"{path}: {needed} strips or tiles are needed, {found} have data. Copy it anew.")
    end = int(offsets.max()) + int(lengths[int(offsets.argmax())])
    if max(int(lengths.max()), int(offsets.max())) > num_bytes or int((offsets + lengths).max()) > num_bytes:
        raise UnreadableInput(f"{path}: truncated: {end} bytes are needed, it has {num_bytes}. Copy or scan it anew.")
    if directory.one(_COMPRESSION, _NONE) == _NONE:
        rows = np.full(needed, segment.h)
        if not directory.tiled and size.h % segment.h:
            rows[ceil_div(size.h, segment.h) - 1 :: ceil_div(size.h, segment.h)] = size.h % segment.h
        if (lengths < (rows * directory.row_bytes(segment.w)).astype(np.uint64)).any():
            raise UnreadableInput(f"{path}: a strip or tile is shorter than its pixels. Copy or scan it anew.")


def _working_bytes(chosen: _Directory, *, streamed: bool) -> int:
    """The longest compressed strip, or one row of tiles, decoded: what a reader must hold at once."""
    segment = chosen.segment_size
    if chosen.tiled or not streamed:
        planes = chosen.one(_SAMPLES, 1) if chosen.separate_planes else 1
        columns = ceil_div(chosen.size.w, segment.w)
        return columns * segment.h * chosen.row_bytes(segment.w) * planes
    # large strips are decoded line by line, from all of their compressed bytes
    return 0 if chosen.one(_COMPRESSION, _NONE) == _NONE else int(chosen.values(_STRIP_BYTES, _MAX_SEGMENTS).max())


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

    def check(self, end: int) -> None:
        """Raises UnreadableInput where the file is shorter."""
        if end > self.num_bytes:
            raise UnreadableInput(
                f"{self.path}: truncated: {end} bytes are needed, it has {self.num_bytes}. Copy it anew."
            )

    def take(self, offset: int, num_bytes: int) -> bytes:
        self.check(offset + num_bytes)
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
            entries, offset = self.entries(offset)
            found.append(_Directory(self, len(found), entries))
        if not found:
            raise UnreadableInput(f"{self.path}: a TIFF without a picture: its header is damaged. Copy it anew.")
        return found

    def entries(self, offset: int) -> tuple[dict[int, _Entry], int]:
        """One directory and the offset of the next (0 when it is the last)."""
        count_bytes, entry_bytes, link_bytes = (8, 20, 8) if self.big else (2, 12, 4)
        num = self.uint(self.take(offset, count_bytes))
        if num > _MAX_ENTRIES:
            _refuse(self.path, f"{num:,} tags, the limit is {_MAX_ENTRIES:,}", "save it anew")
        data = self.take(offset + count_bytes, num * entry_bytes + link_bytes)
        entries: dict[int, _Entry] = {}
        layout, inline_bytes = self.order + ("HHQ8s" if self.big else "HHL4s"), link_bytes
        for tag, kind, count, inline in struct.iter_unpack(layout, data[:-link_bytes]):
            if tag not in entries:
                entries[tag] = self.entry(kind, count, inline, inline_bytes)
        return entries, self.uint(data[num * entry_bytes :])

    def entry(self, kind: int, count: int, inline: bytes, inline_bytes: int) -> _Entry:
        length = count * _TYPE_BYTES.get(kind, 1)
        if length <= inline_bytes:
            return _Entry(kind, count, inline[:length], 0)
        offset = self.uint(inline)
        self.check(offset + length)
        return _Entry(kind, count, b"", offset)
