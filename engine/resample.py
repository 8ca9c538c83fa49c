"""Exact area resampling: an output pixel is the mean of the source area it covers."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div


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
    """The target's pixels (h, w, c) of `box` from the source's pixels of `have`; rounded half to even."""
    rows = _weights(box.y0, box.y1, have.y0, have.y1, source.h, target.h)
    columns = _weights(box.x0, box.x1, have.x0, have.x1, source.w, target.w)
    lines = np.tensordot(rows, pixels.astype(np.float32), 1)
    mixed = np.tensordot(columns, lines.transpose(1, 0, 2), 1).transpose(1, 0, 2)
    return np.rint(mixed).astype(pixels.dtype)


@lru_cache(maxsize=8)
def _weights(start: int, stop: int, have_start: int, have_stop: int, source: int, target: int) -> NDArray[np.float32]:
    """(stop - start, have) shares of source pixels in each target pixel; in integers until the last division."""
    edges = np.arange(start, stop + 1, dtype=np.int64) * source  # in source pixels times `target`
    pixels = np.arange(have_start, have_stop + 1, dtype=np.int64) * target
    overlap = np.minimum(edges[1:, None], pixels[None, 1:]) - np.maximum(edges[:-1, None], pixels[None, :-1])
    return (np.maximum(overlap, 0) / source).astype(np.float32)
