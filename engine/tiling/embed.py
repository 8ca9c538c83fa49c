"""Metadata in its place inside JPEG, PNG and JPEG 2000 files, byte for byte as it was found.

JPEG   JFIF 1.02; EXIF 2.32 section 4.5; XMP part 3 section 1.1.3; Photoshop File Formats (IPTC)
PNG    third edition, sections 11.3.2 (eXIf) and 11.3.3 (text); the raw profile of ImageMagick and ExifTool for IPTC
JP2    ITU-T T.800, annex I; the UUIDs of ExifTool and Exiv2 for EXIF and IPTC, XMP part 3 section 1.1.4
"""

import struct
import zlib
from typing import BinaryIO

from engine.errors import OutputUnsupported
from engine.geometry import Size
from engine.metadata import Metadata, iptc_resource

JPEG_AT, PNG_AT = 2, 33
"""Where the blocks go: behind the start of a JPEG, behind the IHDR of a PNG."""

_MAX_SEGMENT_BYTES = 65_533
_MM_PER_INCH = 25.4
_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_EXIF_UUID = b"JpgTiffExif->JP2"
_IPTC_UUID = bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38")
_JPEG_PREFIXES = {
    "EXIF": (0xE1, b"Exif\0\0"),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
    "IPTC": (0xED, b"Photoshop 3.0\0"),
}


class Inserting:
    """A file to write to, into which `block` goes in front of byte `at`."""

    def __init__(self, file: BinaryIO, *, at: int, block: bytes) -> None:
        self._file, self._left, self._block = file, at, block

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if self._block and len(data) >= self._left:
            self._file.write(data[: self._left])
            self._file.write(self._block)
            self._file.write(data[self._left :])
            self._block = b""
        else:
            self._left -= len(data)
            self._file.write(data)
        return len(data)


def check_jpeg(metadata: Metadata) -> None:
    """Raises OutputUnsupported for a block that does not fit in the one segment a JPEG has for it."""
    for name, block in (("EXIF", metadata.exif), ("XMP", metadata.xmp), ("IPTC", metadata.iptc)):
        length = 0 if block is None else len(block) + len(_JPEG_PREFIXES[name][1]) + (13 if name == "IPTC" else 0)
        if length > _MAX_SEGMENT_BYTES:
            raise OutputUnsupported(
                f"the {name} block takes {length:,} bytes, a JPEG has room for {_MAX_SEGMENT_BYTES:,}. "
                "Choose png or tiff, or give --strip-metadata."
            )


def check_png(metadata: Metadata) -> None:
    """Raises OutputUnsupported for a profile that libpng would not read back."""
    icc = metadata.icc
    if icc is not None and (stated := int.from_bytes(icc[:4], "big")) != len(icc):
        raise OutputUnsupported(
            f"the ICC profile has {len(icc):,} bytes and states {stated:,}, which PNG readers refuse. "
            "Choose tiff, or assign a sound profile."
        )


def jpeg_segments(metadata: Metadata, size: Size) -> bytes:
    """JFIF with the resolution in whole pixels per inch, then EXIF (exact resolution), XMP, IPTC."""
    y, x = (round(value * _MM_PER_INCH) for value in metadata.resolution_px_per_mm or (0, 0))
    density = (1, x, y) if 0 < min(y, x) <= max(y, x) <= 0xFFFF else (0, 1, 1)
    found = _segment(0xE0, b"JFIF\0\x01\x02" + struct.pack(">BHH", *density) + b"\0\0")
    iptc = None if metadata.iptc is None else iptc_resource(metadata.iptc)
    blocks = {"EXIF": metadata.corrected_exif(size), "XMP": metadata.xmp, "IPTC": iptc}
    for name, block in blocks.items():
        marker, prefix = _JPEG_PREFIXES[name]
        found += b"" if block is None else _segment(marker, prefix + block)
    return found


def png_chunks(metadata: Metadata, size: Size) -> bytes:
    """eXIf, XMP and IPTC. The resolution has a chunk of its own, and an EXIF block only where the input had one."""
    found, block = b"", None if metadata.exif is None else metadata.corrected_exif(size)
    if block is not None:
        found += _chunk(b"eXIf", block)
    if metadata.xmp is not None:
        found += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)
    if metadata.iptc is not None:
        resource = iptc_resource(metadata.iptc)
        digits = resource.hex()
        lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
        text = f"\niptc\n{len(resource):8}\n{lines}\n".encode()
        found += _chunk(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text))
    return found


def jp2_with(encoded: bytes, metadata: Metadata, size: Size, *, channels: int) -> list[memoryview | bytes]:
    """The parts of a JP2 file: the given one with its profile, alpha channel, resolution and metadata stated."""
    view = memoryview(encoded)
    boxes = _boxes(view)
    header = boxes[b"jp2h"]
    inner = _boxes(header)
    stated = _box(b"ihdr", bytes(inner[b"ihdr"])) + (_box(b"bpcc", bytes(inner[b"bpcc"])) if b"bpcc" in inner else b"")
    icc = metadata.icc
    stated += _box(b"colr", bytes(inner[b"colr"]) if icc is None else b"\x02\0\0" + icc)
    if channels in (2, 4):
        colours = [(index, 0, index + 1) for index in range(channels - 1)]
        stated += _box(b"cdef", struct.pack(f">H{3 * channels}H", channels, *sum(colours, ()), channels - 1, 1, 0))
    if metadata.resolution_px_per_mm is not None:
        sides = b"".join(_per_metre(value) for value in metadata.resolution_px_per_mm)
        exponents = bytes(2)
        stated += _box(b"res ", _box(b"resc", sides + exponents))
    found = _box(b"jP  ", bytes(boxes[b"jP  "])) + _box(b"ftyp", bytes(boxes[b"ftyp"])) + _box(b"jp2h", stated)
    block = None if metadata.exif is None else metadata.corrected_exif(size)
    for uuid, data in ((_EXIF_UUID, block), (_XMP_UUID, metadata.xmp), (_IPTC_UUID, metadata.iptc)):
        found += b"" if data is None else _box(b"uuid", uuid + data)
    pixels = boxes[b"jp2c"]
    return [found, struct.pack(">I4s", len(pixels) + 8, b"jp2c"), pixels]


def _per_metre(px_per_mm: float) -> bytes:
    """Numerator and denominator of pixels per metre, 16 bits each."""
    per_metre = px_per_mm * 1000
    divisor = max(1, min(0xFFFF, int(0xFFFF / per_metre)))
    return struct.pack(">HH", min(0xFFFF, max(1, round(per_metre * divisor))), divisor)


def _boxes(data: memoryview) -> dict[bytes, memoryview]:
    found: dict[bytes, memoryview] = {}
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = len(data) if length == 0 else at + length
        found.setdefault(kind, data[at + 8 : end])
        at = end
    return found


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data) + 8, kind) + data


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
