"""The global pass: the whole picture at guide size, once, for every tile.

The guide has at most `GUIDE_PX` pixels a side: the picture is reduced by the smallest whole factor that fits, each
guide pixel the mean of the known native pixels under it. A whole factor keeps every cell and every sample position
rational, so a tile samples the guide exactly as the whole picture does.
"""

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div
from engine.image import Pixels, Source, from_rgb_float, to_rgb_float
from engine.mask import Mask, no_mask
from engine.models.cra_srgan.attention import CELL_PX, AttentionRows
from engine.models.cra_srgan.handover import log_ratio
from engine.models.runner import TorchRunner

GUIDE_PX = 512
STRIP_ROWS = 256
"""Native rows read at a time, rounded to whole guide pixels."""

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Guide:
    """What every tile of a picture with holes may ask for."""

    factor: int
    """Native pixels per guide pixel."""
    size: Size
    """Of the guide."""
    known_mean: Floats
    """(h, w, 3) mean of the known pixels, the fill where none is known: what residuals are measured against."""
    fill: Floats
    """(h, w, 3) in about [0, 1]"""
    features: Floats
    """(h, w, G + 1), the log ratio last"""
    rows: AttentionRows

    @property
    def cells(self) -> Size:
        """Attention cells, the last ones possibly beyond the picture."""
        return self.size.divided(CELL_PX)


def reflect(start: int, stop: int, length: int) -> Indices:
    """Indices of start <= i < stop in a line mirrored without repeating its ends, as often as needed."""
    if length == 1:
        return np.zeros(stop - start, np.intp)
    period = 2 * (length - 1)
    folded = np.arange(start, stop) % period
    return np.minimum(folded, period - folded)


@overload
def read_reflected(source: Source, box: Box) -> Pixels: ...


@overload
def read_reflected(source: Mask, box: Box) -> Bools: ...


def read_reflected(source: Source | Mask, box: Box) -> Pixels | Bools:
    """The pixels of a box that may reach outside the picture, which is mirrored there."""
    ys, xs = reflect(box.y0, box.y1, source.size.h), reflect(box.x0, box.x1, source.size.w)
    inner = Box(int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1)
    pixels = source.read(inner)
    if inner == box:
        return pixels
    return pixels[np.ix_(ys - inner.y0, xs - inner.x0)]


def sample(plane: Floats, factor: int, ys: Indices, xs: Indices) -> Floats:
    """Guide values (h, w, C) at native rows `ys` and columns `xs`: bilinear between pixel centres."""
    if factor == 1:
        return plane[np.ix_(ys, xs)]
    low_y, high_y, part_y = _neighbours(ys, factor, plane.shape[0])
    low_x, high_x, part_x = _neighbours(xs, factor, plane.shape[1])
    lines = plane[low_y] + part_y[:, None, None] * (plane[high_y] - plane[low_y])
    return (lines[:, low_x] + part_x[None, :, None] * (lines[:, high_x] - lines[:, low_x])).astype(
        np.float32, copy=False
    )


def _neighbours(places: Indices, factor: int, length: int) -> tuple[Indices, Indices, Floats]:
    doubled = np.clip(2 * places + 1 - factor, 0, 2 * factor * (length - 1))  # 2 * factor * guide coordinate
    low = doubled // (2 * factor)
    part = ((doubled % (2 * factor)) / np.float32(2 * factor)).astype(np.float32)
    return low, np.minimum(low + 1, length - 1), part


def make_guide(source: Source, mask: Mask, runner: TorchRunner) -> Guide | None:
    """One pass over the picture; None where nothing is missing."""
    if not mask.any:
        return None
    factor = guide_factor(source.size)
    known_mean, share, variance = _means(source, mask, factor)
    size = source.size.divided(factor)
    fill, features, rows_found = runner.global_pass(known_mean, share, variance)
    ratio = np.full((size.h, size.w, 1), log_ratio(factor), np.float32)
    reference = np.where(share[..., None] < 1, known_mean, fill)
    return Guide(factor, size, reference, fill, np.concatenate([features, ratio], 2), rows_found)


def guide_factor(size: Size) -> int:
    """Native pixels per guide pixel."""
    return max(1, ceil_div(size.long_side, GUIDE_PX))


def overview(source: Source, guide: Guide | None) -> Pixels:
    """(h, w, c) The picture at guide size, its holes filled; opaque where it has alpha. The type is the picture's."""
    rgb = _means(source, no_mask(source.size), guide_factor(source.size))[0] if guide is None else guide.known_mean
    opaque = np.ones(rgb.shape[:2], np.float32) if source.channels in (2, 4) else None
    return from_rgb_float(rgb, channels=source.channels, dtype=source.dtype, alpha=opaque)


def _means(source: Source, mask: Mask, factor: int) -> tuple[Floats, Floats, Floats]:
    """As `_reduce`, of the whole picture."""
    size = source.size.divided(factor)
    known_mean = np.zeros((size.h, size.w, 3), np.float32)
    share = np.zeros((size.h, size.w), np.float32)
    variance = np.zeros((size.h, size.w), np.float32)
    step = max(1, STRIP_ROWS // factor)
    for top in range(0, size.h, step):
        rows = slice(top, min(top + step, size.h))
        box = Box(rows.start * factor, 0, rows.stop * factor, size.w * factor)
        known_mean[rows], share[rows], variance[rows] = _reduce(source, mask, box, factor)
    return known_mean, share, variance


def _reduce(source: Source, mask: Mask, box: Box, factor: int) -> tuple[Floats, Floats, Floats]:
    """Mean of the known pixels under each guide pixel of a strip, the missing share, and the known variance."""
    pixels = to_rgb_float(read_reflected(source, box))
    known = ~read_reflected(mask, box)
    h, w = box.size.h // factor, box.size.w // factor
    weight = known.astype(np.float32)[..., None]
    count = weight.reshape(h, factor, w, factor).sum((1, 3))
    mean, square = (
        (part * weight).reshape(h, factor, w, factor, 3).sum((1, 3)) / np.maximum(count, 1)[..., None]
        for part in (pixels, pixels**2)
    )
    variance = np.maximum(square - mean**2, 0).mean(2)
    return mean, 1 - count / np.float32(factor * factor), variance
