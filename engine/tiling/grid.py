"""How an output is divided: levels of a pyramid, shards that are written whole, chunks that are read.

Everything is anchored at the upper left corner of the whole picture and found by arithmetic; no list of shards exists
anywhere, because a picture may have a hundred thousand of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from engine.geometry import Box, Size, ceil_div, round_up

SHARD_PX = 2048


@dataclass(frozen=True, slots=True, order=True)
class ShardKey:
    """The place of one shard: pyramid level (0 is the full size), row and column of shards on it."""

    level: int
    iy: int
    ix: int

    @property
    def name(self) -> str:
        """Short and unique within one picture, such as ``0/3.5``."""
        return f"{self.level}/{self.iy}.{self.ix}"


@dataclass(frozen=True, slots=True)
class Grid:
    """The division of a picture of `size` pixels. A shard is a whole number of chunks, both sides in pixels.

    `chunk_px` is even, so that halving a level never averages across the border of two chunks.
    """

    size: Size
    chunk_px: int = 512
    shard_px: int = SHARD_PX

    def __post_init__(self) -> None:
        if self.size.h < 1 or self.size.w < 1:
            raise ValueError(f"a grid needs at least one pixel, got {self.size}")
        if self.chunk_px < 2 or self.chunk_px % 2 or self.shard_px < 1 or self.shard_px % self.chunk_px:
            raise ValueError(f"shards of {self.shard_px} px are not a whole number of even chunks ({self.chunk_px} px)")

    @property
    def level_sizes(self) -> tuple[Size, ...]:
        """Sizes in pixels, full size first, each half of the one before (rounded up), until one chunk holds it."""
        sizes = [self.size]
        while sizes[-1].long_side > self.chunk_px:
            sizes.append(sizes[-1].divided(2))
        return tuple(sizes)

    def level_size(self, level: int) -> Size:
        """Size in pixels of one level."""
        return self.level_sizes[level]

    def shard_shape(self, level: int) -> Size:
        """Height and width of every shard of a level in pixels, before clipping: small levels get smaller shards."""
        size = self.level_size(level)
        return Size(
            min(self.shard_px, round_up(size.h, self.chunk_px)), min(self.shard_px, round_up(size.w, self.chunk_px))
        )

    def chunk_shape(self, level: int) -> Size:
        """Height and width of every chunk of a level in pixels; both divide the shard's."""
        shard = self.shard_shape(level)
        return Size(min(self.chunk_px, shard.h), min(self.chunk_px, shard.w))

    def num_shards_of(self, level: int) -> int:
        """Shards of one level."""
        rows, columns = self._counts(level)
        return rows * columns

    @property
    def num_shards(self) -> int:
        """Shards of all levels together."""
        return sum(self.num_shards_of(level) for level in range(len(self.level_sizes)))

    def keys(self, level: int) -> Iterator[ShardKey]:
        """The shards of a level, row by row."""
        rows, columns = self._counts(level)
        return (ShardKey(level, iy, ix) for iy in range(rows) for ix in range(columns))

    def all_keys(self) -> Iterator[ShardKey]:
        """The shards of all levels, full size first: every shard comes after those it is made from."""
        return chain.from_iterable(self.keys(level) for level in range(len(self.level_sizes)))

    def keys_in(self, box: Box, *, level: int) -> Iterator[ShardKey]:
        """The shards of a level that have a pixel inside `box` (pixels of that level), row by row."""
        inside = box.intersection(Box.of(self.level_size(level)))
        shard = self.shard_shape(level)
        if inside.empty:
            return iter(())
        rows = range(inside.y0 // shard.h, ceil_div(inside.y1, shard.h))
        columns = range(inside.x0 // shard.w, ceil_div(inside.x1, shard.w))
        return (ShardKey(level, iy, ix) for iy in rows for ix in columns)

    def box(self, key: ShardKey) -> Box:
        """The pixels of the key's level that a shard owns; the last row and column are clipped to the picture."""
        shard = self.shard_shape(key.level)
        whole = Box(0, 0, shard.h, shard.w).shifted(key.iy * shard.h, key.ix * shard.w)
        clipped = whole.intersection(Box.of(self.level_size(key.level)))
        if clipped.empty or key.iy < 0 or key.ix < 0:
            raise ValueError(f"no shard {key.name} in a picture of {self.size}")
        return clipped

    def _counts(self, level: int) -> tuple[int, int]:
        size, shard = self.level_size(level), self.shard_shape(level)
        return ceil_div(size.h, shard.h), ceil_div(size.w, shard.w)
