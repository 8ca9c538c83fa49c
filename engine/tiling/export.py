"""A finished picture as TIFF, PNG or JPEG, streamed tile by tile: the memory needed does not grow with its height.

TIFF holds the exact pixels in 512 px tiles, Deflate with a horizontal predictor, BigTIFF where it could pass 4 GB. PNG
and JPEG are encoded row by row from a temporary uncompressed TIFF beside the target, because the tiles come first.
"""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyvips
import tifffile

from engine import vips
from engine.errors import OutputTooLarge, OutputUnsupported, StorageError
from engine.geometry import Box, Size, round_up
from engine.metadata import Metadata
from engine.staged import Pixels
from engine.store import fsync_folder, make_folders, storage_errors

SUFFIX: dict[str, str] = {"ome-zarr": ".zarr", "tiff": ".tif", "png": ".png", "jpeg": ".jpg"}

_MAX_SIDE_PX = {"tiff": 2**31 - 1, "png": 1_000_000, "jpeg": 65_500}
"""What the usual readers accept: libtiff's signed sides, libpng's and libjpeg's own limits (65,535 in the standard)."""
_TILE_PX = 512
_CLASSIC_TIFF_BYTES = (1 << 32) - (1 << 27)
_DEFAULT_PX_PER_MM = 72 / 25.4


@dataclass(frozen=True, slots=True)
class _Sheet:
    """What a file holds besides its pixels."""

    read: Callable[[Box], Pixels]
    size: Size
    channels: int
    dtype: str
    metadata: Metadata

    @property
    def tile(self) -> Size:
        """Not much larger than the picture, which libvips would refuse; TIFF asks for multiples of 16."""
        return Size(min(_TILE_PX, round_up(self.size.h, 16)), min(_TILE_PX, round_up(self.size.w, 16)))

    @property
    def num_bytes(self) -> int:
        return self.size.num_pixels * self.channels * np.dtype(self.dtype).itemsize


def check_format(fmt: str, *, size: Size, channels: int, dtype: str) -> None:
    """Raises OutputTooLarge or OutputUnsupported, with the remedy, for a picture that a format cannot hold."""
    if fmt not in SUFFIX:
        raise OutputUnsupported(f"there is no format '{fmt}'; choose {', '.join(SUFFIX)}.")
    limit_px = _MAX_SIDE_PX.get(fmt, size.long_side)
    if size.long_side > limit_px:
        raise OutputTooLarge(
            f"the output is {size} px, a side of a {fmt.upper()} is at most {limit_px:,} px. Choose ome-zarr or tiff."
        )
    if fmt == "jpeg" and channels in (2, 4):
        raise OutputUnsupported(
            f"JPEG holds 1 or 3 channels, the output has {channels} with alpha. Choose png or tiff."
        )
    if fmt == "jpeg" and dtype != "uint8":
        raise OutputUnsupported("JPEG holds 8 bits a channel, the output has 16. Choose png or tiff.")


def export(
    read: Callable[[Box], Pixels],
    *,
    size: Size,
    channels: int,
    dtype: str,
    fmt: str,
    path: Path,
    metadata: Metadata,
) -> None:
    """Writes the whole picture to `path` ("tiff", "png" or "jpeg") and moves it into place when it is on the disk.

    `read` gives `(h, w, c)` of any box inside the picture; it is asked for boxes of at most 512 px, in rows.
    On any error nothing is left. Raises what `check_format` raises, StorageError and its kinds.
    """
    check_format(fmt, size=size, channels=channels, dtype=dtype)
    sheet = _Sheet(read, size, channels, dtype, metadata)
    with storage_errors(path, needed_bytes=sheet.num_bytes):
        make_folders(path.parent)
        with _partial(path) as partial:
            if fmt == "tiff":
                _write_tiff(partial, sheet, compression="adobe_deflate")
            elif fmt in ("png", "jpeg"):
                with _partial(path) as flat:
                    _write_tiff(flat, _with_resolution(sheet), compression=None)
                    _encode(flat, partial, fmt=fmt)
            else:
                raise OutputUnsupported(f"{fmt} is written by the canvas itself; export to tiff, png or jpeg.")
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            fsync_folder(path.parent)


@contextmanager
def _partial(path: Path) -> Generator[Path]:
    """A name beside `path` that is gone at the end, unless the file was moved."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
    finally:
        with suppress(OSError):  # the first error is the one worth telling
            partial.unlink(missing_ok=True)


def _with_resolution(sheet: _Sheet) -> _Sheet:
    """libvips writes a resolution into every PNG and JPEG; 72 dpi is what readers assume where there is none."""
    resolution = sheet.metadata.resolution_px_per_mm or (_DEFAULT_PX_PER_MM, _DEFAULT_PX_PER_MM)
    return replace(sheet, metadata=replace(sheet.metadata, resolution_px_per_mm=resolution))


def _write_tiff(path: Path, sheet: _Sheet, *, compression: str | None) -> None:
    resolution = sheet.metadata.resolution_px_per_mm
    with tifffile.TiffWriter(path, bigtiff=sheet.num_bytes > _CLASSIC_TIFF_BYTES) as writer:
        writer.write(
            _tiles(sheet),
            shape=(sheet.size.h, sheet.size.w, sheet.channels)[: 2 if sheet.channels == 1 else 3],
            dtype=sheet.dtype,
            photometric="rgb" if sheet.channels >= 3 else "minisblack",
            planarconfig=None if sheet.channels == 1 else "contig",
            extrasamples=["unassalpha"] if sheet.channels in (2, 4) else None,
            tile=(sheet.tile.h, sheet.tile.w),
            compression=compression,
            compressionargs=None if compression is None else {"level": 1},
            predictor=compression is not None,
            iccprofile=sheet.metadata.icc,
            resolution=None if resolution is None else (resolution[1] * 10, resolution[0] * 10),
            resolutionunit=None if resolution is None else "CENTIMETER",
            metadata=None,
            software=False,
            maxworkers=1,  # more workers read ahead without a bound
        )


def _tiles(sheet: _Sheet) -> Iterator[Pixels]:
    """Row by row; those at the right and the lower edge are filled up with zeros."""
    for y in range(0, sheet.size.h, _TILE_PX):
        for x in range(0, sheet.size.w, _TILE_PX):
            box = Box(y, x, min(y + _TILE_PX, sheet.size.h), min(x + _TILE_PX, sheet.size.w))
            pixels = sheet.read(box)
            if pixels.shape != (box.size.h, box.size.w, sheet.channels) or pixels.dtype != sheet.dtype:
                raise ValueError(f"{box} was read as {pixels.shape} {pixels.dtype}")
            tile = np.zeros((sheet.tile.h, sheet.tile.w, sheet.channels), sheet.dtype)
            tile[: box.size.h, : box.size.w] = pixels
            yield tile[..., 0] if sheet.channels == 1 else tile


def _encode(flat: Path, path: Path, *, fmt: str) -> None:
    with flat.open("rb") as stored, path.open("xb") as file:
        image, target = vips.load(stored, "tiff"), vips.FileTarget(file)
        keep = pyvips.ForeignKeep.ICC
        try:
            if fmt == "png":
                sub = pyvips.ForeignPngFilter.SUB
                image.pngsave_target(target.target, compression=1, filter=sub, keep=keep)
            else:
                keep |= pyvips.ForeignKeep.EXIF  # where libvips puts the resolution of a JPEG
                image.jpegsave_target(target.target, Q=95, subsample_mode="off", keep=keep)
        except pyvips.Error as error:
            raise target.error or StorageError(
                f"{path}: it could not be encoded ({error}). Run the command again."
            ) from error
