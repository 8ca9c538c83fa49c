"""EXIF blocks, field by field: read, corrected in place, taken out of a TIFF and put into one.

A block is a small TIFF of its own (EXIF 2.32, section 4.5; TIFF 6.0, section 2). Fields are carried as bytes with their
type: a library that turns them into numbers and text and back again loses umlauts, types and maker notes. Nothing here
trusts an offset or a count: a field that reaches outside its file is skipped, and no pointer is followed twice.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from engine.geometry import Size

IMAGE_WIDTH, IMAGE_HEIGHT, ORIENTATION = 0x100, 0x101, 0x112
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x11A, 0x11B, 0x128
EXIF_POINTER, GPS_POINTER, INTEROP_POINTER = 0x8769, 0x8825, 0xA005
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003
_STRIP_AT, _STRIP_BYTES, _JPEG_AT, _JPEG_BYTES = 0x111, 0x117, 0x201, 0x202

ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 2, 3, 4, 5, 7, 16
_KIND_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WORD_BYTES = _KIND_BYTES | {5: 4, 10: 4}
"""What a swap of the byte order turns around: a rational is two numbers."""
_MAX_FIELDS = 512
_MM_PER_INCH = Fraction(254, 10)
_INCH = 2
_MM_PER_UNIT = {_INCH: _MM_PER_INCH, 3: Fraction(10)}
"""ResolutionUnit; 1 is none."""

Order: TypeAlias = str
"""`<` little-endian (II) or `>` big-endian (MM)."""


class ExifError(ValueError):
    """There is no directory, or no field, that can be read."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field's values as stored, in the byte order of the block."""

    kind: int
    """TIFF type, 1 to 18."""
    data: bytes

    @property
    def count(self) -> int:
        return len(self.data) // _KIND_BYTES[self.kind]

    def swapped(self) -> "Field":
        """The same values in the other byte order."""
        width = _WORD_BYTES[self.kind]
        return self if width == 1 else Field(self.kind, np.frombuffer(self.data, f"u{width}").byteswap().tobytes())


@dataclass(frozen=True, slots=True)
class Exif:
    """The directories of a block, pointers taken out; a thumbnail's is left behind."""

    order: Order
    main: dict[int, Field] = field(default_factory=dict[int, Field])
    exif: dict[int, Field] = field(default_factory=dict[int, Field])
    gps: dict[int, Field] = field(default_factory=dict[int, Field])
    interop: dict[int, Field] = field(default_factory=dict[int, Field])

    def in_order(self, order: Order) -> "Exif":
        if order == self.order:
            return self
        parts = ({tag: item.swapped() for tag, item in part.items()} for part in self.parts)
        return Exif(order, *parts)

    @property
    def parts(self) -> tuple[dict[int, Field], ...]:
        return self.main, self.exif, self.gps, self.interop


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a field lies."""

    kind: int
    at: int
    """Of its 12 (BigTIFF: 20) bytes in the directory."""
    value_at: int
    num_bytes: int


class Reader:
    """The directories of a TIFF or of an EXIF block; `take(offset, num_bytes)` answers with at most that many bytes."""

    def __init__(self, take: Callable[[int, int], bytes]) -> None:
        self.take = take
        head = take(0, 16)
        if head[:2] not in (b"II", b"MM") or len(head) < 8:
            raise ExifError(f"it starts with {head[:4]!r}")
        self.order: Order = "<" if head[:2] == b"II" else ">"
        self.big = self.uint(head[2:4]) == 43
        self.start = self.uint(head[8:16]) if self.big else self.uint(head[4:8])

    def uint(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")

    def directory(self, at: int) -> tuple[dict[int, Entry], int]:
        """The fields that lie inside the file (the first of each tag), and where the link to the next directory is."""
        count_bytes, entry_bytes = (8, 20) if self.big else (2, 12)
        num = self.uint(self.take(at, count_bytes))
        body = self.take(at + count_bytes, num * entry_bytes) if 0 < num <= _MAX_FIELDS else b""
        if at < 8 or not body or len(body) < num * entry_bytes:
            raise ExifError(f"{num} fields at byte {at}")
        found: dict[int, Entry] = {}
        for start in range(0, len(body), entry_bytes):
            tag, kind = struct.unpack_from(self.order + "HH", body, start)
            where, inline_bytes = at + count_bytes + start, 8 if self.big else 4
            num_bytes = self.uint(body[start + 4 : start + 4 + inline_bytes]) * _KIND_BYTES.get(kind, 0)
            inside = num_bytes <= inline_bytes
            last = self.uint(body[start + 4 + inline_bytes : start + entry_bytes])
            value_at = where + 4 + inline_bytes if inside else last
            if num_bytes and (inside or self.take(value_at + num_bytes - 1, 1)):
                found.setdefault(tag, Entry(kind, where, value_at, num_bytes))
        return found, at + count_bytes + len(body)

    def value(self, entry: Entry) -> bytes:
        return self.take(entry.value_at, entry.num_bytes)

    def pointed(self, entries: Mapping[int, Entry], tag: int) -> dict[int, Entry]:
        """The directory that a pointer field leads to; empty where there is none, or none that can be read."""
        if tag not in entries:
            return {}
        try:
            return self.directory(self.uint(self.value(entries[tag])))[0]
        except ExifError:
            return {}

    def fields(self, entries: Mapping[int, Entry]) -> dict[int, Field]:
        pointers = (EXIF_POINTER, GPS_POINTER, INTEROP_POINTER)
        return {tag: Field(item.kind, self.value(item)) for tag, item in entries.items() if tag not in pointers}


def parse(block: bytes) -> Exif:
    """The fields of a block. Raises ExifError where there are none that can be read."""
    reader = _of_block(block)
    main, _ = reader.directory(reader.start)
    exif = reader.pointed(main, EXIF_POINTER)
    parts = (main, exif, reader.pointed(main, GPS_POINTER), reader.pointed(exif, INTEROP_POINTER))
    found = Exif(reader.order, *(reader.fields(part) for part in parts))
    if not any(found.parts):
        raise ExifError("it has no field")
    return found


def check(block: bytes) -> None:
    """Raises ExifError for a block that cannot be read, or whose directories lie over each other."""
    parse(block)
    parse(corrected(block, size=Size(1, 1), resolution_px_per_mm=(1.0, 1.0)))


def _of_block(block: bytes | bytearray) -> Reader:
    reader = Reader(lambda at, num_bytes: bytes(block[at : at + num_bytes]))
    if reader.big:
        raise ExifError("it is a BigTIFF")
    return reader


def serialise(exif: Exif, at: int, *, big: bool = False, kept: Mapping[int, bytes] | None = None) -> bytes:
    """The directories with their values, to be stored at byte `at` (even); the first directory comes first.

    `kept`: entries of the first directory as they are stored in the file already; they are copied.
    """
    main, kept = dict(exif.main), kept or {}
    inner = dict(exif.exif)
    pointer = Field(LONG8 if big else LONG, bytes(8 if big else 4))
    main |= {EXIF_POINTER: pointer} if inner or exif.interop else {}
    main |= {GPS_POINTER: pointer} if exif.gps else {}
    inner |= {INTEROP_POINTER: pointer} if exif.interop else {}
    exif_at = at + len(_directory(main, at, exif.order, big, kept))
    gps_at = exif_at + (len(_directory(inner, exif_at, exif.order, big)) if inner else 0)
    interop_at = gps_at + (len(_directory(exif.gps, gps_at, exif.order, big)) if exif.gps else 0)
    for fields, tag, where in ((main, EXIF_POINTER, exif_at), (main, GPS_POINTER, gps_at)):
        if tag in fields:
            fields[tag] = Field(pointer.kind, struct.pack(exif.order + ("Q" if big else "I"), where))
    if exif.interop:
        inner[INTEROP_POINTER] = Field(pointer.kind, struct.pack(exif.order + ("Q" if big else "I"), interop_at))
    data = _directory(main, at, exif.order, big, kept)
    for fields in (inner, exif.gps, exif.interop):
        data += _directory(fields, at + len(data), exif.order, big) if fields else b""
    return data


def block_of(exif: Exif) -> bytes:
    """A block of its own."""
    return (b"II*\0\x08\0\0\0" if exif.order == "<" else b"MM\0*\0\0\0\x08") + serialise(exif, 8)


def _directory(
    fields: Mapping[int, Field], at: int, order: Order, big: bool, kept: Mapping[int, bytes] | None = None
) -> bytes:
    kept = {tag: entry for tag, entry in (kept or {}).items() if tag not in fields}
    count, word, inline_bytes, entry_bytes = ("Q", "Q", 8, 20) if big else ("H", "I", 4, 12)
    tags = sorted({*fields, *kept})
    head, values = struct.pack(order + count, len(tags)), b""
    values_at = at + len(head) + len(tags) * entry_bytes + inline_bytes
    padding = -values_at % 2
    values += bytes(padding)
    for tag in tags:
        if tag in kept:
            head += kept[tag]
            continue
        item = fields[tag]
        head += struct.pack(order + "HH" + word, tag, item.kind, item.count)
        if len(item.data) <= inline_bytes:
            head += item.data.ljust(inline_bytes, b"\0")
        else:
            head += struct.pack(order + word, values_at + len(values))
            values += item.data + bytes(len(item.data) % 2)
    return head + bytes(inline_bytes) + values


def corrected(block: bytes, *, size: Size, resolution_px_per_mm: tuple[float, float] | None) -> bytes:
    """The block with what the output changed: orientation, pixel dimensions, resolution (y, x), and no thumbnail.

    Fields are overwritten where they lie and none is moved, so that offsets inside a maker note stay right.
    """
    data = bytearray(block)
    reader = _of_block(data)
    main, link_at = reader.directory(reader.start)
    exif = reader.pointed(main, EXIF_POINTER)
    others = (exif, reader.pointed(main, GPS_POINTER), reader.pointed(exif, INTEROP_POINTER))
    kept = [(entry.value_at, entry.num_bytes) for part in (main, *others) for entry in part.values()]
    kept += [(entry.at, 12) for part in others for entry in part.values()]
    kept += [(0, 8), (reader.start, link_at + 4 - reader.start)]
    _put(data, reader, main, ORIENTATION, 1)
    for entries, x, y in ((main, IMAGE_WIDTH, IMAGE_HEIGHT), (exif, _PIXEL_X, _PIXEL_Y)):
        _put(data, reader, entries, x, size.w)
        _put(data, reader, entries, y, size.h)
    if resolution_px_per_mm is not None:
        _put(data, reader, main, RESOLUTION_UNIT, 2)
        for tag, value in zip((Y_RESOLUTION, X_RESOLUTION), resolution_px_per_mm, strict=True):
            if tag in main and main[tag].kind == RATIONAL and main[tag].num_bytes == 8:
                at = main[tag].value_at
                data[at : at + 8] = rational(value, reader.order)
    _cut_thumbnail(data, reader, link_at, kept)
    return bytes(data)


def rational(px_per_mm: float, order: Order) -> bytes:
    """Pixels per inch as a TIFF RATIONAL."""
    per_inch = (Fraction(px_per_mm) * _MM_PER_INCH).limit_denominator(10_000)
    numerator, denominator = min(per_inch.numerator, 0xFFFFFFFF), per_inch.denominator
    return struct.pack(order + "II", numerator, denominator)


def resolution(fields: Mapping[int, Field], order: Order) -> tuple[float, float] | None:
    """(y, x) pixels per mm; None where a directory states none, or one that is a ratio without a unit."""
    unit = fields.get(RESOLUTION_UNIT, Field(SHORT, struct.pack(order + "H", _INCH)))
    per_mm = _MM_PER_UNIT.get(int.from_bytes(unit.data[:2], "little" if order == "<" else "big"))
    sides: list[float] = []
    for item in (fields.get(Y_RESOLUTION), fields.get(X_RESOLUTION)):
        if per_mm is None or item is None or item.kind != RATIONAL or item.count != 1:
            return None
        numerator, denominator = struct.unpack(order + "II", item.data)
        if 0 in (numerator, denominator):
            return None
        sides.append(float(Fraction(numerator, denominator) / per_mm))
    return sides[0], sides[1]


def resolution_fields(resolution_px_per_mm: tuple[float, float], order: Order) -> dict[int, Field]:
    y, x = (Field(RATIONAL, rational(value, order)) for value in resolution_px_per_mm)
    return {X_RESOLUTION: x, Y_RESOLUTION: y, RESOLUTION_UNIT: Field(SHORT, struct.pack(order + "H", 2))}


def _put(data: bytearray, reader: Reader, entries: Mapping[int, Entry], tag: int, value: int) -> None:
    """Overwrites a number that is there: as SHORT where it fits and was one, else as LONG; both lie in the entry."""
    if tag in entries:
        entry = entries[tag]
        kind = SHORT if entry.kind == SHORT and value < 1 << 16 else LONG
        stored = struct.pack(reader.order + "H", value).ljust(4, b"\0") if kind == SHORT else None
        stored = stored or struct.pack(reader.order + "I", value)
        data[entry.at : entry.at + 12] = struct.pack(reader.order + "HHI", tag, kind, 1) + stored


def _cut_thumbnail(data: bytearray, reader: Reader, link_at: int, kept: list[tuple[int, int]]) -> None:
    """Unlinks the second directory, and blanks it and its picture; cut off where nothing follows."""
    second_at = reader.uint(reader.take(link_at, 4))
    data[link_at : link_at + 4] = bytes(4)
    try:
        entries, end = reader.directory(second_at)
    except ExifError:
        return
    spans = [(entry.value_at, entry.num_bytes) for entry in entries.values()]
    for at_tag, bytes_tag in ((_JPEG_AT, _JPEG_BYTES), (_STRIP_AT, _STRIP_BYTES)):
        if at_tag in entries and bytes_tag in entries:
            at, num_bytes = (reader.uint(reader.value(entries[tag])) for tag in (at_tag, bytes_tag))
            spans.append((at, num_bytes))
    spans.append((second_at, end + 4 - second_at))
    spans = [span for span in spans if not any(_overlap(span, other) for other in kept)]
    for at, num_bytes in spans:
        part = len(data[at : at + num_bytes])
        data[at : at + part] = bytes(part)
    while last := [at for at, num_bytes in spans if at < len(data) <= at + num_bytes]:
        del data[max(last) :]


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]
