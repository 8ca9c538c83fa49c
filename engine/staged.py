"""Decoded pixels in a headerless file: written strip by strip, read box by box, in any EXIF orientation."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import StorageError, StorageFull
from engine.geometry import Box, Size
from engine.store import free_bytes, storage_errors

Pixels: TypeAlias = NDArray[np.uint8 | np.uint16]
"""`(h, w, c)`, c = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and straight alpha."""

_TRANSPOSED = (5, 6, 7, 8)
_UPSIDE_DOWN = (3, 4, 6, 7)
_MIRRORED = (2, 3, 7, 8)


@dataclass(frozen=True, slots=True)
class RawFile:
    """Interleaved rows in native byte order. Nothing of it stays mapped or open between two reads."""

    path: Path
    stored_size: Size
    """Before the orientation is applied."""
    channels: int
    dtype: str
    """"uint8" or "uint16"."""
    orientation: int = 1
    """EXIF 1 to 8: how the stored pixels must be turned (TIFF 6.0, tag 274)."""

    @property
    def size(self) -> Size:
        """After the orientation is applied."""
        return oriented(self.stored_size, self.orientation)

    @property
    def pixel_bytes(self) -> int:
        return self.channels * np.dtype(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        return self.stored_size.w * self.pixel_bytes

    @property
    def num_bytes(self) -> int:
        return self.stored_size.h * self.row_bytes

    def write(self, strips: Iterable[bytes]) -> None:
        """Writes the stored rows, in order. On any error nothing is left. Raises StorageFull before the first strip."""
        with storage_errors(self.path, needed_bytes=self.num_bytes):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(self.path.parent)
        if free < self.num_bytes:
            raise StorageFull(
                f"{self.path}: {self.num_bytes:,} bytes are needed for the decoded picture, {free:,} are free. "
                "Free some space or choose another folder."
            )
        try:
            with storage_errors(self.path, needed_bytes=self.num_bytes), self.path.open("wb") as file:
                for strip in strips:
                    file.write(strip)
                if file.tell() != self.num_bytes:
                    raise AssertionError(f"{file.tell()} bytes were staged instead of {self.num_bytes}")
        except BaseException:
            with suppress(OSError):  # the first error is the one worth telling
                self.path.unlink(missing_ok=True)
            raise

    def read(self, box: Box) -> Pixels:
        """`(h, w, c)` of a box inside the oriented picture; holds the box and, where it is turned, a copy of it."""
        check_inside(box, self.size)
        if self.orientation in _TRANSPOSED:
            box = Box(box.x0, box.y0, box.x1, box.y1)
        y0, y1, x0, x1 = box.y0, box.y1, box.x0, box.x1
        if self.orientation in _UPSIDE_DOWN:
            y0, y1 = self.stored_size.h - y1, self.stored_size.h - y0
        if self.orientation in _MIRRORED:
            x0, x1 = self.stored_size.w - x1, self.stored_size.w - x0
        pixels = self._read_stored(Box(y0, x0, y1, x1))
        pixels = pixels[::-1] if self.orientation in _UPSIDE_DOWN else pixels
        pixels = pixels[:, ::-1] if self.orientation in _MIRRORED else pixels
        return np.ascontiguousarray(pixels.swapaxes(0, 1) if self.orientation in _TRANSPOSED else pixels)

    def _read_stored(self, box: Box) -> Pixels:
        pixels: Pixels = np.empty((box.size.h, box.size.w, self.channels), self.dtype)
        whole_rows = box.size.w == self.stored_size.w
        with storage_errors(self.path), self.path.open("rb", buffering=0) as file:
            for row, part in enumerate([pixels] if whole_rows else pixels):
                file.seek((box.y0 + row) * self.row_bytes + box.x0 * self.pixel_bytes)
                self._fill(file, part.reshape(-1).view(np.uint8).data)
        return pixels

    def _fill(self, file: RawIOBase, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            num = file.readinto(view[filled:])
            if not num:
                raise StorageError(f"{self.path}: {len(view) - filled} staged bytes are gone. Run the command again.")
            filled += num


def oriented(size: Size, orientation: int) -> Size:
    """The size after an EXIF orientation is applied, or taken back."""
    return Size(size.w, size.h) if orientation in _TRANSPOSED else size


def check_inside(box: Box, size: Size) -> None:
    """Raises ValueError unless `box` is not empty and lies inside a picture of `size`."""
    if box.empty or not Box.of(size).contains(box):
        raise ValueError(f"{box} is empty or reaches outside the {size} picture")
