"""Exact area resampling: an output pixel is the mean of the source area it covers."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div

STRIP_PX = 64
"""Target pixels taken together: their weights are a small dense matrix."""


def source_box(box: Box, *, source: Size, target: Size) -> Box:
    """The source pixels that touch a box of the target; both pictures cover the same area."""
    return Box(
        box.y0 * source.h // target.h,
        box.x0 * source.w // target.w,
        ceil_div(box.y1 * source.h, target.h),
        ceil_div(box.x1 * source.w, target.w),
    )


def resample_area(
    pixels: NDArray[np.uint8 | np.uint16], have: Box, box: Box, *, source: Size, target: Size
) -> NDArray[np.uint8 | np.uint16]:
    """The target's pixels (h, w, c) of `box` from the source's pixels of `have`; rounded half to even.

    Sums are of whole numbers in float64, exact below 2 ** 53 (16 bit: 137 gigapixels of source), so that no order of
    summation, and so no cut into shards, changes a pixel.
    """
    out = np.empty((box.size.h, box.size.w, pixels.shape[2]), pixels.dtype)
    for y0, y1, first, last in _strips(box.y0, box.y1, source.h, target.h):
        rows = _overlap(y0, y1, first, last, source.h, target.h)
        lines = np.tensordot(rows, pixels[first - have.y0 : last - have.y0].astype(np.float64), 1)
        for x0, x1, left, right in _strips(box.x0, box.x1, source.w, target.w):
            columns = _overlap(x0, x1, left, right, source.w, target.w)
            total = np.tensordot(lines[:, left - have.x0 : right - have.x0], columns, (1, 1))  # (h, c, w)
            mean = np.rint(total / float(source.num_pixels)).transpose(0, 2, 1)
            out[y0 - box.y0 : y1 - box.y0, x0 - box.x0 : x1 - box.x0] = mean
    return out


def _strips(start: int, stop: int, source: int, target: int) -> Iterator[tuple[int, int, int, int]]:
    """Parts of a line of the target, and the source pixels that touch each."""
    for low in range(start, stop, STRIP_PX):
        high = min(low + STRIP_PX, stop)
        yield low, high, low * source // target, ceil_div(high * source, target)


@lru_cache(maxsize=512)
def _overlap(start: int, stop: int, first: int, last: int, source: int, target: int) -> NDArray[np.float64]:
    """(stop - start, last - first) lengths that target and source pixels share, whole numbers; rows sum to `source`."""
    edges = np.arange(start, stop + 1, dtype=np.int64) * source  # in source pixels times `target`
    pixels = np.arange(first, last + 1, dtype=np.int64) * target
    overlap = np.minimum(edges[1:, None], pixels[None, 1:]) - np.maximum(edges[:-1, None], pixels[None, :-1])
    return np.maximum(overlap, 0).astype(np.float64)
