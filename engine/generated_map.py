"""The map of generated pixels: a mask in the size of the output."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div
from engine.metadata import Metadata
from engine.staged import Pixels
from engine.tiling.export import export
from engine.tiling.plan import Plan

GENERATED = "generated"
"""Its name among the outputs of a picture."""
SUFFIX = ".generated.png"

_GENERATED = 255
_READ_PIXELS = 1 << 22


class MaskReader(Protocol):
    """What `engine.mask.Mask` is."""

    def read(self, box: Box) -> NDArray[np.bool_]:
        """`(h, w)` of a box inside the picture, True = missing."""
        ...


@dataclass(frozen=True, slots=True)
class Generated:
    """How much of a picture was not there before."""

    missing_px: int
    """Input pixels."""
    region_px: int
    """Input pixels that were restored: all of them, or those of the box asked for."""


def write_generated_map(mask: MaskReader, plan: Plan, path: Path) -> Generated:
    """A grey PNG of the output's size: 255 where any input pixel under an output pixel was missing, else 0.

    At scale 1 it is the mask, at scale s the mask with every pixel repeated s times. Written in strips, then moved into
    place. Raises StorageError, and OutputTooLarge above what a PNG can hold.
    """
    region = restored_region(plan)
    rows = max(1, _READ_PIXELS // region.size.w)
    tops = range(region.y0, region.y1, rows)
    strips = (Box(y, region.x0, min(y + rows, region.y1), region.x1) for y in tops)
    missing_px = sum(int(np.count_nonzero(mask.read(strip))) for strip in strips)

    def read(_level: int, box: Box) -> Pixels:
        covered = _covered(mask, box, region=region, target=plan.size)
        return np.where(covered, np.uint8(_GENERATED), np.uint8(0))[..., None]

    sizes = [plan.size]
    export(read, level_sizes=sizes, channels=1, dtype="uint8", fmt="png", path=path, metadata=Metadata())
    return Generated(missing_px, region.size.num_pixels)


def restored_region(plan: Plan) -> Box:
    """The input pixels of a plan."""
    y, x, h, w = (int(number) for number in str(plan.parameters["box"]).split(","))
    return Box(y, x, y + h, x + w)


def _covered(mask: MaskReader, box: Box, *, region: Box, target: Size) -> NDArray[np.bool_]:
    """`(h, w)` of an output box: whether any missing input pixel lies under each output pixel."""
    (y0, y1), (x0, x1) = (
        _under(box.y0, box.y1, region.size.h, target.h),
        _under(box.x0, box.x1, region.size.w, target.w),
    )
    under = Box(int(y0[0]), int(x0[0]), int(y1[-1]), int(x1[-1]))
    if under.size.num_pixels > _READ_PIXELS and box.size.num_pixels > 1:  # a reduction: many lie under one
        halves = [_covered(mask, half, region=region, target=target) for half in box.halves()]
        return np.concatenate(halves, axis=0 if box.size.h >= box.size.w else 1)
    missing = mask.read(under.shifted(region.y0, region.x0))
    return _any_between(_any_between(missing, y0 - under.y0, y1 - under.y0).T, x0 - under.x0, x1 - under.x0).T


def _under(first: int, last: int, source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For output pixels first to last of one axis: the first input pixel under each, and the one behind the last."""
    starts = [at * source // target for at in range(first, last)]  # Python's integers: the products may pass 2^63
    ends = [ceil_div((at + 1) * source, target) for at in range(first, last)]
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _any_between(values: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(len(starts), w)`: whether any of the rows starts to ends is True."""
    counts = np.zeros((values.shape[0] + 1, values.shape[1]), np.int32)
    np.cumsum(values, axis=0, dtype=np.int32, out=counts[1:])
    return counts[ends] > counts[starts]
