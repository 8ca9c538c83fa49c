"""What a picture's file says besides its pixels: read once, carried to every output.

On the way out the orientation becomes 1 (it is applied to the pixels), pixel dimensions and resolution are rewritten,
and the thumbnail of the EXIF block goes, for it shows the old picture. All other EXIF fields, the XMP packet, the IPTC
record and the ICC profile stay as they are, byte for byte. `docs/files.md` has the table of fields and formats.
"""

import base64
import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Any, cast

import pyvips

from engine import exif
from engine.errors import UnsupportedInput
from engine.exif import Exif, ExifError, Field, Reader
from engine.geometry import Size
from engine.picture_header import Header

MAX_BLOCK_BYTES = 16 << 20
"""An ICC profile, EXIF block, XMP packet or IPTC record that is larger is refused: no camera or scanner writes one."""

_ICC_SPACES = {1: b"GRAY", 2: b"GRAY", 3: b"RGB ", 4: b"RGB "}
_XMP_TAG, _IPTC_TAG, _PHOTOSHOP_TAG = 700, 33723, 34377
_DESCRIPTIVE_TAGS = (269, 270, 271, 272, 285, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096))
"""Names, description, maker, software, date, artist, host, ratings, copyright, and the XP* texts of Windows."""
_IMAGE_DESCRIPTION = 270
_LAYOUT_WORDS = (b'{"shape"', b"shape=", b"ImageJ=", b"Aperio ", b"SCANIMAGE", b"<OME ", b"/OME/")
"""Descriptions by which readers find their way through the file they came in; in another file they would mislead."""
_PHOTOSHOP, _IPTC_RESOURCE = "Photoshop's image resources", 0x0404
_RAW_IPTC = "Raw profile type iptc"
_ARCHIVED = {"icc": "icc_profile", "exif": "exif", "xmp": "xmp", "iptc": "iptc"}
"""Each block's name in JSON."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Carried from the input to every output."""

    icc: bytes | None = None
    """The embedded profile, byte for byte; None where there is none, or one that is not for these channels."""
    exif: bytes | None = None
    """As found: a block that starts with its byte order, without the `Exif\\0\\0` that JPEG puts before it."""
    xmp: bytes | None = None
    """The packet as found."""
    iptc: bytes | None = None
    """The IPTC-IIM record as found (first byte 0x1C), without the Photoshop resource that JPEG puts around it."""
    resolution_px_per_mm: tuple[float, float] | None = None
    """(y, x), after orientation; None where the file states none."""
    left_out: tuple[str, ...] = ()
    """What the file holds and the outputs will not, in words for the user."""
    quoted: tuple[str, ...] = ()
    """Those of `left_out` that hold words of the file."""

    def stripped(self) -> "Metadata":
        """The profile alone, without which the colours would change; no word of the file is told any more."""
        blocks = {"EXIF": self.exif, "XMP": self.xmp, "IPTC": self.iptc, "resolution": self.resolution_px_per_mm}
        asked = [name for name, block in blocks.items() if block is not None]
        left_out = [what for what in self.left_out if what not in self.quoted]
        left_out += [f"PNG texts: {len(self.quoted)}"] * bool(self.quoted)
        left_out += [f"{', '.join(asked)}, as asked"] * bool(asked)
        return Metadata(icc=self.icc, left_out=tuple(left_out))

    def enlarged(self, factor: float) -> "Metadata":
        """For an output of `factor` times the side: more pixels in a millimetre of the same original."""
        if self.resolution_px_per_mm is None:
            return self
        y, x = self.resolution_px_per_mm
        return replace(self, resolution_px_per_mm=(y * factor, x * factor))

    def corrected_exif(self, size: Size) -> bytes | None:
        """The block for an output of `size` pixels; a small one where only a resolution is known."""
        if self.exif is not None:
            return exif.corrected(self.exif, size=size, resolution_px_per_mm=self.resolution_px_per_mm)
        if self.resolution_px_per_mm is None:
            return None
        return exif.block_of(Exif("<", main=exif.resolution_fields(self.resolution_px_per_mm, "<")))

    def archived(self, size: Size) -> dict[str, object]:
        """As JSON, for formats without a place of their own for it: base64 and sha256 of each block."""
        found: dict[str, object] = {}
        blocks = (self.icc, None if self.exif is None else self.corrected_exif(size), self.xmp, self.iptc)
        for key, block in zip(_ARCHIVED.values(), blocks, strict=True):
            if block is not None:
                found[key] = base64.b64encode(block).decode()
                found[f"{key}_sha256"] = hashlib.sha256(block).hexdigest()
        if self.resolution_px_per_mm is not None:
            found["resolution_px_per_mm"] = list(self.resolution_px_per_mm)
        return found

    @classmethod
    def from_archived(cls, found: Mapping[str, Any], *, name: str) -> "Metadata":
        """What `archived` wrote into the file `name`. Raises UnsupportedInput where a digest does not fit its block."""
        icc, block, xmp, iptc = (_from_base64(found, _ARCHIVED[key], name) for key in _ARCHIVED)
        sides = found.get("resolution_px_per_mm")
        resolution = None if sides is None else (float(sides[0]), float(sides[1]))
        return cls(icc, block, xmp, iptc, resolution)


def read_metadata(image: pyvips.Image, header: Header, file: BufferedReader, *, orientation: int) -> Metadata:
    """The metadata of a picture that libvips has opened.

    `file`: the same file, of which libvips tells too little where it is a TIFF; it is read without moving its position.
    Raises UnsupportedInput for a block of more than `MAX_BLOCK_BYTES`.
    """
    name = str(file.name)
    fields = set(image.get_fields())
    left_out, quoted = list(header.left_out), list[str]()
    resolution = header.resolution_px_per_mm
    if header.format == "tiff":
        block, xmp, iptc, resolution = _from_tiff(file, name, header.directory, left_out)
    else:
        block, xmp = _blob(image, fields, "exif-data", name), _blob(image, fields, "xmp-data", name)
        iptc = _iptc(image, fields, name, left_out)
        quoted = _texts(image, fields)
    block = _usable_exif(block, left_out)
    if block is not None and header.format != "tiff":  # as everywhere: EXIF is believed before its container
        found = exif.parse(block)
        resolution = exif.resolution(found.main, found.order) or resolution
    icc = _blob(image, fields, "icc-profile-data", name)
    if icc is None and header.has_profile:
        left_out.append(f"an ICC profile that is damaged, or not for {_colours(header.channels)} pictures")
    return Metadata(
        icc=_usable_profile(icc, header.channels, left_out),
        exif=block,
        xmp=_usable_xmp(xmp, left_out),
        iptc=iptc,
        resolution_px_per_mm=resolution if resolution is None or orientation < 5 else (resolution[1], resolution[0]),
        left_out=(*left_out, *quoted),
        quoted=tuple(quoted),
    )


def iptc_resource(iptc: bytes) -> bytes:
    """The record as the Photoshop image resource 0x0404 (Photoshop File Formats, "Image Resource Blocks")."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)


def _from_base64(found: Mapping[str, Any], key: str, name: str) -> bytes | None:
    if key not in found:
        return None
    try:
        block = base64.b64decode(found[key], validate=True)
    except (ValueError, TypeError) as error:
        raise UnsupportedInput(f"{name}: {key} cannot be read ({error}). Delete the attribute.") from error
    is_sha256, stated = hashlib.sha256(block).hexdigest(), str(found.get(f"{key}_sha256"))
    if is_sha256 != stated:
        raise UnsupportedInput(
            f"{name}: {key} has sha256 {is_sha256[:16]}…, {stated[:16]}… is stated: it was changed or damaged. "
            "Delete the attribute, or restore the picture again."
        )
    return block


def _blob(image: pyvips.Image, fields: set[str], field: str, name: str) -> bytes | None:
    if field not in fields:
        return None
    block = bytes(cast("bytes", image.get(field)))
    _check_length(len(block), field.removesuffix("-data"), name)
    return block or None


def _check_length(num_bytes: int, what: str, name: str) -> None:
    if num_bytes > MAX_BLOCK_BYTES:
        raise UnsupportedInput(
            f"{name}: its {what} block has {num_bytes:,} bytes, at most {MAX_BLOCK_BYTES:,} are carried. "
            "Save the picture without it."
        )


def _usable_profile(icc: bytes | None, channels: int, left_out: list[str]) -> bytes | None:
    if icc is None:
        return None
    if icc[36:40] == b"acsp" and icc[16:20] == _ICC_SPACES[channels]:
        return icc
    left_out.append(f"an ICC profile that is not for {_colours(channels)} pictures")
    return None


def _colours(channels: int) -> str:
    return "grey" if channels <= 2 else "RGB"


def _usable_exif(block: bytes | None, left_out: list[str]) -> bytes | None:
    if block is None:
        return None
    block = block.removeprefix(b"Exif\0\0")
    try:
        exif.check(block)
    except ExifError as error:
        left_out.append(f"an EXIF block that cannot be read ({error})")
        return None
    return block


def _usable_xmp(xmp: bytes | None, left_out: list[str]) -> bytes | None:
    if xmp is not None and b"HasExtendedXMP" in xmp:
        left_out.append("the extended part of an XMP packet of more than 64 KiB")
    return xmp


def _texts(image: pyvips.Image, fields: set[str]) -> list[str]:
    """PNG's text chunks have no counterpart in the other formats."""
    keys = sorted(field.split("-", 3)[3] for field in fields if field.startswith("png-comment-"))
    return [f"the PNG text '{key}'" for key in keys if key != _RAW_IPTC]


def _iptc(image: pyvips.Image, fields: set[str], name: str, left_out: list[str]) -> bytes | None:
    data = _blob(image, fields, "iptc-data", name)
    for field in fields:
        if field.startswith("png-comment-") and field.endswith(_RAW_IPTC):
            text = str(image.get(field)).split(maxsplit=2)  # the profile's name, its length, hexadecimal digits
            _check_length(len(text[-1]) // 2, "iptc", name)
            try:
                data = bytes.fromhex(text[-1])
            except ValueError:
                data = None
    if data is None or data[:1] == b"\x1c":
        return data
    resources = _resources(data.removeprefix(b"Photoshop 3.0\0"))
    if resources.keys() - {_IPTC_RESOURCE}:
        left_out.append(_PHOTOSHOP)
    return resources.get(_IPTC_RESOURCE) or None


def _resources(data: bytes) -> dict[int, bytes]:
    """Photoshop's image resources, the first of each kind."""
    found: dict[int, bytes] = {}
    at = 0
    while data[at : at + 4] == b"8BIM" and len(data) >= at + 12:
        kind, name_bytes = int.from_bytes(data[at + 4 : at + 6], "big"), 1 + data[at + 6]
        start = at + 6 + name_bytes + name_bytes % 2
        length = int.from_bytes(data[start : start + 4], "big")
        found.setdefault(kind, data[start + 4 : start + 4 + length])
        at = start + 4 + length + length % 2
    return found


def _from_tiff(
    file: BufferedReader, name: str, directory: int, left_out: list[str]
) -> tuple[bytes | None, bytes | None, bytes | None, tuple[float, float] | None]:
    """EXIF, XMP, IPTC and resolution (y, x) of one directory of a TIFF."""
    file_bytes = os.fstat(file.fileno()).st_size

    def take(at: int, num_bytes: int) -> bytes:
        return os.pread(file.fileno(), num_bytes, at) if at < file_bytes else b""

    try:
        reader = Reader(take)
        main, link_at = reader.directory(reader.start)
        for _ in range(directory):
            main, link_at = reader.directory(reader.uint(take(link_at, 8 if reader.big else 4)))
    except ExifError:  # the TIFF's own header check has said what there is to say
        return None, None, None, None
    inner = reader.pointed(main, exif.EXIF_POINTER)
    parts = [main, inner, reader.pointed(main, exif.GPS_POINTER), reader.pointed(inner, exif.INTEROP_POINTER)]
    parts[0] = {tag: entry for tag, entry in main.items() if tag in _DESCRIPTIVE_TAGS}
    _check_length(sum(entry.num_bytes for part in parts for entry in part.values()), "EXIF", name)
    blocks: list[bytes | None] = []
    for tag, what in ((_XMP_TAG, "XMP"), (_IPTC_TAG, "IPTC")):
        _check_length(main[tag].num_bytes if tag in main else 0, what, name)
        blocks.append(reader.value(main[tag]) if tag in main else None)
    found = Exif(reader.order, *(reader.fields(part) for part in parts))
    description = found.main.get(_IMAGE_DESCRIPTION, Field(exif.ASCII, b"")).data
    if any(word in description for word in _LAYOUT_WORDS):
        del found.main[_IMAGE_DESCRIPTION]
        left_out.append("a description of the layout of the file itself")
    if _PHOTOSHOP_TAG in main:
        left_out.append(_PHOTOSHOP)
    density = (exif.X_RESOLUTION, exif.Y_RESOLUTION, exif.RESOLUTION_UNIT)
    stated = reader.fields({tag: main[tag] for tag in density if tag in main and main[tag].num_bytes <= 8})
    resolution = exif.resolution(stated, found.order)
    if resolution is None and stated.get(exif.X_RESOLUTION) != stated.get(exif.Y_RESOLUTION):
        left_out.append("a shape of the pixels without a resolution")
    if not any(found.parts):
        return None, blocks[0], blocks[1], resolution
    found.main.update(stated)
    found.main[exif.ORIENTATION] = Field(exif.SHORT, struct.pack(found.order + "H", 1))
    return exif.block_of(found), blocks[0], blocks[1], resolution
