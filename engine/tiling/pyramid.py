"""The smaller levels of an output: each pixel is the mean of 2x2 pixels of the level before."""

from typing import Any, cast

import dask.array
import numpy as np

from engine.geometry import Box
from engine.tiling.canvas import AnyCanvas, Pixels
from engine.tiling.grid import ShardKey


class HalveShard:
    """Makes shards of level 1 and above from the finished shards (at most four) of the level before."""

    def __init__(self, canvas: AnyCanvas) -> None:
        self._canvas = canvas

    def __call__(self, key: ShardKey) -> Pixels:
        """The pixels (h, w, c) of the shard: means of 2x2, halves rounded up; an odd edge is repeated."""
        grid, level = self._canvas.grid, key.level - 1
        region = grid.box(key).scaled(2).intersection(Box.of(grid.level_size(level)))
        parents = list(grid.keys_in(region, level=level))
        array = self._canvas.array(level)
        # Parent by parent, each reduced before the next is read: a shard's corner is even, so no mean crosses them.
        planes = cast("Any", dask.array).from_zarr(array, chunks=array.shards)[:, *region.slices]
        half = planes.map_blocks(
            halve, dtype=planes.dtype, chunks=(planes.chunks[0], *(_halves(sides) for sides in planes.chunks[1:]))
        )
        with self._canvas.damage_named(parents):
            return cast("Pixels", half.compute(scheduler="synchronous")).transpose(1, 2, 0)


def halve(planes: Pixels) -> Pixels:
    """(c, h, w) to (c, ceil(h / 2), ceil(w / 2)): means of 2x2 in whole numbers, halves rounded up."""
    _, h, w = planes.shape
    if h % 2 or w % 2:
        planes = np.pad(planes, ((0, 0), (0, h % 2), (0, w % 2)), mode="edge")
    wide = np.uint16 if planes.dtype == np.uint8 else np.uint32  # holds the sum of four
    total = planes[:, 0::2, 0::2].astype(wide)
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        total += planes[:, dy::2, dx::2]
    total += 2
    total >>= 2
    return total.astype(planes.dtype)


def _halves(sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((side + 1) // 2 for side in sides)
