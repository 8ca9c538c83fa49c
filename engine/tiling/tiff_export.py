"""Tiled TIFF, streamed: the pixels through tifffile, then a last directory that also holds the metadata.

tifffile writes neither an EXIF nor a GPS directory. So the first directory is written once more at the end of the file,
with the fields and directories of the input, and the header points there; every pixel stays where it is (libtiff does
the same when it rewrites a directory).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from engine import exif
from engine.exif import Field, Reader
from engine.geometry import Box, Size, round_up
from engine.metadata import Metadata
from engine.staged import Pixels

TILE_PX = 512
COMPRESSIONS = {"none": None, "lzw": "lzw", "deflate": "adobe_deflate", "zstd": "zstd"}
"""What `tiff_compression` may be, and tifffile's name for it."""

_LEVELS = {"adobe_deflate": 1, "zstd": 3}  # more costs several times the time for a few per cent
_CLASSIC_BYTES = (1 << 32) - (1 << 27)
_XMP_TAG, _IPTC_TAG = 700, 33723
_ALLOTTED_TAGS = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 285), 292, 293, 296, 317, 318, 319, *range(322, 326), 330)
).union((338, 339, 347, *range(512, 522), *range(529, 533), _XMP_TAG, _IPTC_TAG, 34675))
"""What the pixels of this very file decide; the input's are not copied."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a file shall hold."""

    read_level: Callable[[int, Box], Pixels]
    level_sizes: Sequence[Size]
    """Full size first; one entry for a file without a pyramid."""
    channels: int
    dtype: str
    metadata: Metadata

    @property
    def size(self) -> Size:
        return self.level_sizes[0]

    @property
    def num_bytes(self) -> int:
        """Of the full size, uncompressed."""
        return self.size.num_pixels * self.channels * np.dtype(self.dtype).itemsize

    def read_box(self, level: int, box: Box) -> Pixels:
        """`(h, w, c)`; ValueError where the reader answers with something else."""
        pixels = self.read_level(level, box)
        if pixels.shape != (box.size.h, box.size.w, self.channels) or pixels.dtype != self.dtype:
            raise ValueError(f"{box} of level {level} was read as {pixels.shape} {pixels.dtype}")
        return pixels


def write_tiff(path: Path, sheet: Sheet, *, compression: str) -> None:
    """Full size and metadata in the first directory, the reduced levels in its SubIFDs.

    BigTIFF where the file could pass 4 GiB. One tile is held at a time.
    """
    metadata = sheet.metadata
    resolution = metadata.resolution_px_per_mm
    codec = COMPRESSIONS[compression]
    pyramid_bytes = sum(size.num_pixels for size in sheet.level_sizes) * sheet.num_bytes // sheet.size.num_pixels
    with tifffile.TiffWriter(path, bigtiff=pyramid_bytes > _CLASSIC_BYTES, byteorder="<") as writer:
        for level, size in enumerate(sheet.level_sizes):
            tile = tile_of(size)
            writer.write(
                _tiles(sheet, level),
                shape=(size.h, size.w, sheet.channels)[: 2 if sheet.channels == 1 else 3],
                dtype=sheet.dtype,
                photometric="rgb" if sheet.channels >= 3 else "minisblack",
                planarconfig=None if sheet.channels == 1 else "contig",
                extrasamples=["unassalpha"] if sheet.channels in (2, 4) else None,
                tile=(tile.h, tile.w),
                compression=codec,
                compressionargs={"level": _LEVELS[codec]} if codec in _LEVELS else None,
                predictor=codec is not None,
                iccprofile=metadata.icc if level == 0 else None,
                resolution=None if resolution is None or level else (resolution[1] * 10, resolution[0] * 10),
                resolutionunit=None if resolution is None or level else "CENTIMETER",
                subifds=len(sheet.level_sizes) - 1 if level == 0 else None,
                subfiletype=1 if level else 0,
                metadata=None,
                software=False,
                maxworkers=1,  # more workers read ahead without a bound
            )
    if metadata.exif is not None or metadata.xmp is not None or metadata.iptc is not None:
        with path.open("r+b") as file:
            _add_metadata(file, metadata, sheet.size)


def tile_of(size: Size) -> Size:
    """Not much larger than the picture, which libvips would refuse; TIFF asks for multiples of 16."""
    return Size(min(TILE_PX, round_up(size.h, 16)), min(TILE_PX, round_up(size.w, 16)))


def _tiles(sheet: Sheet, level: int) -> Iterator[Pixels]:
    """Row by row; those at the right and the lower edge are filled up with zeros."""
    size = sheet.level_sizes[level]
    tile_size = tile_of(size)
    for y in range(0, size.h, TILE_PX):
        for x in range(0, size.w, TILE_PX):
            box = Box(y, x, min(y + TILE_PX, size.h), min(x + TILE_PX, size.w))
            pixels = sheet.read_box(level, box)
            tile = np.zeros((tile_size.h, tile_size.w, sheet.channels), sheet.dtype)
            tile[: box.size.h, : box.size.w] = pixels
            yield tile[..., 0] if sheet.channels == 1 else tile


def _add_metadata(file: BinaryIO, metadata: Metadata, size: Size) -> None:
    """Appends the first directory anew, with EXIF, GPS, XMP and IPTC, and lets the header point to it."""

    def take(at: int, num_bytes: int) -> bytes:
        file.seek(at)
        return file.read(num_bytes)

    reader = Reader(take)
    entries, _ = reader.directory(reader.start)
    found = exif.Exif("<")
    if metadata.exif is not None:
        found = exif.parse(metadata.corrected_exif(size) or b"").in_order("<")
    for tag in _ALLOTTED_TAGS.intersection(found.main):
        del found.main[tag]
    for tag, kind, block in ((_XMP_TAG, 1, metadata.xmp), (_IPTC_TAG, exif.UNDEFINED, metadata.iptc)):
        if block is not None:
            found.main[tag] = Field(kind, block)
    entry_bytes = 20 if reader.big else 12
    kept = {tag: take(entry.at, entry_bytes) for tag, entry in entries.items()}
    end = file.seek(0, 2)
    at = round_up(end, 16)
    file.write(bytes(at - end) + exif.serialise(found, at, big=reader.big, kept=kept))
    file.seek(8 if reader.big else 4)
    file.write(struct.pack("<Q" if reader.big else "<I", at))
