"""A finished picture as TIFF, PNG, JPEG, JPEG 2000 or a IIIF folder: there whole and durably, or not at all.

All but JPEG 2000 are streamed tile by tile: the memory needed does not grow with the height. PNG, JPEG and IIIF are
encoded row by row from a temporary uncompressed TIFF beside the target, because the tiles come first.
"""

import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast
from uuid import uuid4

import imagecodecs
import numpy as np
import pyvips

from engine import vips
from engine.errors import OutputTooLarge, OutputUnsupported, StorageError
from engine.geometry import Box, Size
from engine.metadata import Metadata
from engine.staged import Pixels
from engine.store import fsync_folder, make_folders, remove_replaced, storage_errors
from engine.tiling import embed
from engine.tiling.iiif import write_iiif
from engine.tiling.tiff_export import COMPRESSIONS, TILE_PX, Sheet, write_tiff

SUFFIX: dict[str, str] = {
    "ome-zarr": ".zarr",
    "tiff": ".tif",
    "png": ".png",
    "jpeg": ".jpg",
    "jp2": ".jp2",
    "iiif": ".iiif",
}
FOLDERS = ("ome-zarr", "iiif")
"""Formats that are a folder, not a file."""
TIFF_COMPRESSIONS = tuple(COMPRESSIONS)
IIIF_BASE = "http://localhost:8000"

_MAX_SIDE_PX = {"tiff": 2**31 - 1, "png": 1_000_000, "jpeg": 65_500, "jp2": 2**31 - 1, "iiif": 10_000_000}
"""What the usual readers accept: libtiff's signed sides, libpng's and libjpeg's own limits (65,535 in the standard),
libvips' own."""
_MAX_JP2_BYTES = 512 << 20
_DEFAULT_PX_PER_MM = 72 / 25.4


def check_format(
    fmt: str,
    *,
    size: Size,
    channels: int,
    dtype: str,
    metadata: Metadata | None = None,
    tiff_compression: str = "deflate",
) -> None:
    """Raises OutputTooLarge or OutputUnsupported, with the remedy, for what a format cannot hold."""
    if fmt not in SUFFIX:
        raise OutputUnsupported(f"there is no format '{fmt}'; choose {', '.join(SUFFIX)}.")
    if fmt == "tiff" and tiff_compression not in COMPRESSIONS:
        raise OutputUnsupported(
            f"there is no TIFF compression '{tiff_compression}'; choose {', '.join(TIFF_COMPRESSIONS)}."
        )
    limit_px = _MAX_SIDE_PX.get(fmt, size.long_side)
    if size.long_side > limit_px:
        raise OutputTooLarge(
            f"the output is {size} px, a side of a {fmt.upper()} is at most {limit_px:,} px. Choose ome-zarr or tiff."
        )
    num_bytes = size.num_pixels * channels * np.dtype(dtype).itemsize
    if fmt == "jp2" and num_bytes > _MAX_JP2_BYTES:
        raise OutputTooLarge(
            f"the output is {size} px, {num_bytes:,} bytes; JPEG 2000 is encoded in memory, up to "
            f"{_MAX_JP2_BYTES:,} bytes. Choose ome-zarr or tiff."
        )
    if fmt == "jpeg" and channels in (2, 4):
        raise OutputUnsupported(
            f"JPEG holds 1 or 3 channels, the output has {channels} with alpha. Choose png or tiff."
        )
    if fmt == "jpeg" and dtype != "uint8":
        raise OutputUnsupported("JPEG holds 8 bits a channel, the output has 16. Choose png or tiff.")
    if fmt == "jpeg" and metadata is not None:
        embed.check_jpeg(metadata)
    if fmt == "png" and metadata is not None:
        embed.check_png(metadata)


def export(
    read_level: Callable[[int, Box], Pixels],
    *,
    level_sizes: Sequence[Size],
    channels: int,
    dtype: str,
    fmt: str,
    path: Path,
    metadata: Metadata,
    tiff_compression: str = "deflate",
    iiif_base: str = IIIF_BASE,
) -> None:
    """Writes the whole picture to `path` (every format but "ome-zarr") and moves it into place when it is on the disk.

    `read_level` gives `(h, w, c)` of any box inside a level; it is asked for boxes of at most 512 px, in rows, level 0
    first, and only TIFF asks for more than level 0. `iiif_base`: the address below which the folder will be served.
    On any error nothing is left. Raises what `check_format` raises, StorageError and its kinds.
    """
    size = level_sizes[0]
    check_format(fmt, size=size, channels=channels, dtype=dtype, metadata=metadata, tiff_compression=tiff_compression)
    sheet = Sheet(read_level, tuple(level_sizes), channels, dtype, metadata)
    with storage_errors(path, needed_bytes=sheet.num_bytes):
        make_folders(path.parent)
        with partial_beside(path) as partial:
            if fmt == "tiff":
                write_tiff(partial, sheet, compression=tiff_compression)
            elif fmt == "jp2":
                _write_jp2(partial, sheet)
            elif fmt in ("png", "jpeg", "iiif"):
                with partial_beside(path) as flat:
                    write_tiff(flat, _flat(sheet), compression="none")
                    if fmt == "iiif":
                        write_iiif(flat, partial, identifier=f"{iiif_base.rstrip('/')}/{path.name}")
                    else:
                        _encode(flat, partial, sheet, fmt=fmt)
            else:
                raise OutputUnsupported(f"{fmt} is written by the canvas itself; export to another format.")
            _move_into_place(partial, path)


@contextmanager
def partial_beside(path: Path) -> Generator[Path]:
    """A name beside `path` that is gone at the end, unless what has it was moved."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
    finally:
        with suppress(OSError):  # the first error is the one worth telling
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)


def _move_into_place(partial: Path, path: Path) -> None:
    """Flushes a file, or a folder and all in it, and gives it its name; what had the name before is gone then."""
    if partial.is_dir():
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                _fsync(Path(folder, name))
            fsync_folder(Path(folder))
        if os.path.lexists(path):
            os.rename(path, path.with_name(f"{path.name}.{uuid4().hex}.replaced"))
    else:
        _fsync(partial)
    os.replace(partial, path)
    fsync_folder(path.parent)
    remove_replaced(path)


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flat(sheet: Sheet) -> Sheet:
    """The full size alone, with the two things that libvips carries on: the profile, and a resolution.

    It writes a resolution into every PNG; 72 dpi is what readers assume where there is none.
    """
    resolution = sheet.metadata.resolution_px_per_mm or (_DEFAULT_PX_PER_MM, _DEFAULT_PX_PER_MM)
    metadata = Metadata(icc=sheet.metadata.icc, resolution_px_per_mm=resolution)
    return replace(sheet, level_sizes=sheet.level_sizes[:1], metadata=metadata)


def _encode(flat: Path, path: Path, sheet: Sheet, *, fmt: str) -> None:
    with flat.open("rb") as stored, path.open("xb") as file:
        image = vips.load(stored, "tiff")
        at, block = (
            (embed.PNG_AT, embed.png_chunks(sheet.metadata, sheet.size))
            if fmt == "png"
            else (embed.JPEG_AT, embed.jpeg_segments(sheet.metadata, sheet.size))
        )
        target = vips.FileTarget(cast("BinaryIO", embed.Inserting(file, at=at, block=block)))
        keep = pyvips.ForeignKeep.ICC
        try:
            if fmt == "png":
                sub = pyvips.ForeignPngFilter.SUB
                image.pngsave_target(target.target, compression=1, filter=sub, keep=keep)
            else:
                image.jpegsave_target(target.target, Q=95, subsample_mode="off", keep=keep)
        except pyvips.Error as error:
            raise target.error or StorageError(
                f"{path}: it could not be encoded ({error}). Run the command again."
            ) from error


def _write_jp2(path: Path, sheet: Sheet) -> None:
    """Lossless (the reversible 5/3 wavelet), from the whole picture in memory."""
    size = sheet.size
    pixels: Pixels = np.empty((size.h, size.w, sheet.channels), sheet.dtype)
    for y in range(0, size.h, TILE_PX):
        for x in range(0, size.w, TILE_PX):
            box = Box(y, x, min(y + TILE_PX, size.h), min(x + TILE_PX, size.w))
            pixels[box.slices] = sheet.read_box(0, box)
    encoded = imagecodecs.jpeg2k_encode(
        pixels[..., 0] if sheet.channels == 1 else pixels, level=0, reversible=True, codecformat="jp2", numthreads=1
    )
    del pixels
    with path.open("xb") as file:
        for part in embed.jp2_with(bytes(encoded), sheet.metadata, size, channels=sheet.channels):
            file.write(part)
