"""Contextual residual aggregation (Yi et al. 2020, section 3.4) out of core.

The residual of a picture is what its guide cannot hold: picture - enlarged(known mean). Each damaged cell receives
the residuals of the cells it attends to, weighted. Cells do not overlap, so the sum is the same at every offset
inside a cell: it is taken one offset block at a time, each source pixel is read once, and the working set depends
on the number of cells, never on the size of the picture.
"""

import os
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div
from engine.guide import Guide, read_reflected, reflect, sample
from engine.image import Source, to_rgb_float
from engine.mask import Mask
from engine.models.cra_srgan.attention import CELL_PX
from engine.models.cra_srgan.handover import detail_gain
from engine.store import storage_errors

WORKING_SET_BYTES = 128 << 20

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Detail:
    """Aggregated residuals of the damaged cells, in a file of (Q, P, P, 3) float16; P native pixels a cell."""

    path: Path
    cell_px: int
    grid: Size
    """Cells of the picture."""
    index: Indices
    """(cells,) row in the file, -1 where a cell is not damaged."""

    @property
    def num_cells(self) -> int:
        return int((self.index >= 0).sum())

    def read(self, box: Box) -> Floats:
        """(h, w, 3) for a box inside the picture; zero outside damaged cells."""
        out = np.zeros((box.size.h, box.size.w, 3), np.float32)
        size = self.cell_px
        if self.num_cells == 0:
            return out
        patches = self.mapped("r")
        for iy in range(box.y0 // size, ceil_div(box.y1, size)):
            for ix in range(box.x0 // size, ceil_div(box.x1, size)):
                row = self.index[iy * self.grid.w + ix]
                if row < 0:
                    continue
                part = Box(iy * size, ix * size, (iy + 1) * size, (ix + 1) * size).intersection(box)
                out[part.shifted(-box.y0, -box.x0).slices] = patches[row][part.shifted(-iy * size, -ix * size).slices]
        return out

    def mapped(self, mode: Literal["r", "r+"]) -> "np.memmap[tuple[int, ...], np.dtype[np.float16]]":
        """The file as an array. Mapped anew for each use: pages that stay mapped count as memory."""
        shape = (self.num_cells, self.cell_px, self.cell_px, 3)
        return np.memmap(self.path, np.float16, mode, shape=shape)


def detail_bytes(num_damaged_cells: int, factor: int) -> int:
    """Scratch space of `aggregate`, in bytes."""
    return num_damaged_cells * (CELL_PX * factor) ** 2 * 3 * 2


def aggregate(source: Source, mask: Mask, guide: Guide, scratch: Path) -> Detail:
    """Gather, weigh and store the residuals of every damaged cell. Raises StorageError when the disk is full."""
    rows = guide.rows
    cells, sources = rows.cells.cpu().numpy(), rows.sources.cpu().numpy()
    weights = rows.weights.float().cpu().numpy() * np.float32(detail_gain(guide.factor))
    cell_px, grid = CELL_PX * guide.factor, guide.cells
    index = np.full(grid.num_pixels, -1, np.intp)
    index[cells] = np.arange(cells.size)
    detail = Detail(scratch / "detail.f16", cell_px, grid, index)
    if cells.size == 0 or guide.factor == 1:  # at the guide's own resolution nothing is left over
        return Detail(detail.path, cell_px, grid, np.full_like(index, -1))
    used, where = np.unique(sources, return_inverse=True)
    where = where.reshape(sources.shape)
    _allocate(detail)
    block_px = min(cell_px, max(8, isqrt(WORKING_SET_BYTES // (2 * 12 * max(used.size, cells.size)))))
    for y in range(0, cell_px, block_px):
        for x in range(0, cell_px, block_px):
            offset = Box(y, x, min(y + block_px, cell_px), min(x + block_px, cell_px))
            blocks = np.stack(
                [_residual(source, mask, guide, _place(int(cell), cell_px, grid, offset)) for cell in used]
            )
            _store(detail, offset, blocks, where, weights)
    return detail


def _place(cell: int, cell_px: int, grid: Size, offset: Box) -> Box:
    return offset.shifted(cell // grid.w * cell_px, cell % grid.w * cell_px)


def _residual(source: Source, mask: Mask, guide: Guide, box: Box) -> Floats:
    """Picture - enlarged known mean, zero where a pixel is missing; the picture is mirrored outside its borders."""
    ys, xs = reflect(box.y0, box.y1, source.size.h), reflect(box.x0, box.x1, source.size.w)
    pixels = to_rgb_float(read_reflected(source, box))
    residual = pixels - sample(guide.known_mean, guide.factor, ys, xs)
    residual[read_reflected(mask, box)] = 0
    return residual


def _allocate(detail: Detail) -> None:
    """The whole file, on the disk: a full disk must be an error here, not a fault in a mapped page."""
    num_bytes = detail_bytes(detail.num_cells, detail.cell_px // CELL_PX)
    with storage_errors(detail.path, needed_bytes=num_bytes), detail.path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)


def _store(detail: Detail, offset: Box, blocks: Floats, where: Indices, weights: Floats) -> None:
    ys, xs = offset.slices
    patches = detail.mapped("r+")
    for row in range(where.shape[0]):
        patches[row, ys, xs] = np.tensordot(weights[row], blocks[where[row]], 1)
    patches.flush()
