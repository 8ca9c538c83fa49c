"""The grid divides every level once, whatever the size."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.geometry import Box, Size
from engine.tiling.grid import Grid, ShardKey

sides = st.integers(1, 150)


@st.composite
def grids(draw):
    chunk_px = 2 * draw(st.integers(1, 20))
    return Grid(Size(draw(sides), draw(sides)), chunk_px, chunk_px * draw(st.integers(1, 5)))


@settings(deadline=None, max_examples=60)
@given(grids())
def test_shards_cover_every_pixel_of_every_level_once(grid):
    for level, size in enumerate(grid.level_sizes):
        covered = np.zeros((size.h, size.w), np.uint8)
        for key in grid.keys(level):
            covered[grid.box(key).slices] += 1
        assert (covered == 1).all()


@settings(deadline=None, max_examples=60)
@given(grids())
def test_keys_are_counted_ordered_and_unique(grid):
    keys = list(grid.all_keys())
    assert len(keys) == grid.num_shards
    assert keys == sorted(set(keys))
    assert len({key.name for key in keys}) == len(keys)


@settings(deadline=None, max_examples=60)
@given(grids())
def test_levels_halve_until_one_chunk_holds_the_picture(grid):
    levels = grid.level_sizes
    assert levels[0] == grid.size
    for before, after in pairwise(levels):
        assert before.long_side > grid.chunk_px
        assert after.h * 2 - before.h in (0, 1)
        assert after.w * 2 - before.w in (0, 1)
    assert levels[-1].long_side <= grid.chunk_px


@settings(deadline=None, max_examples=60)
@given(grids())
def test_shards_are_whole_chunks_and_no_larger_than_needed(grid):
    for level, size in enumerate(grid.level_sizes):
        shard, chunk = grid.shard_shape(level), grid.chunk_shape(level)
        for side, shard_px, chunk_px in ((size.h, shard.h, chunk.h), (size.w, shard.w, chunk.w)):
            assert shard_px % chunk_px == 0
            assert shard_px <= grid.shard_px
            assert shard_px - side < grid.chunk_px


@settings(deadline=None, max_examples=60)
@given(grids())
def test_a_shard_is_made_from_at_most_four(grid):
    for key in grid.all_keys():
        if key.level:
            region = grid.box(key).scaled(2).intersection(Box.of(grid.level_size(key.level - 1)))
            parents = list(grid.keys_in(region, level=key.level - 1))
            assert 1 <= len(parents) <= 4
            assert all(region.contains(grid.box(parent)) for parent in parents)


@settings(deadline=None, max_examples=60)
@given(grids(), st.data())
def test_keys_in_a_box_are_those_that_meet_it(grid, data):
    level = data.draw(st.integers(0, len(grid.level_sizes) - 1))
    y, x = st.integers(-20, grid.size.h + 20), st.integers(-20, grid.size.w + 20)
    box = Box(data.draw(y), data.draw(x), data.draw(y), data.draw(x))
    met = [key for key in grid.keys(level) if not grid.box(key).intersection(box).empty]
    assert list(grid.keys_in(box, level=level)) == met


def test_the_default_for_8k():
    grid = Grid(Size(8192, 8192))
    assert [size.h for size in grid.level_sizes] == [8192, 4096, 2048, 1024, 512]
    assert [grid.num_shards_of(level) for level in range(5)] == [16, 4, 1, 1, 1]
    assert [grid.shard_shape(level).h for level in range(5)] == [2048, 2048, 2048, 1024, 512]


def test_a_giant_costs_no_list():
    grid = Grid(Size(4_000_000, 4_000_000))
    keys = grid.keys(0)
    assert next(keys) == ShardKey(0, 0, 0)
    assert next(keys) == ShardKey(0, 0, 1)
    assert grid.num_shards_of(0) == 1954 * 1954


def test_a_key_names_its_place():
    assert ShardKey(0, 3, 5).name == "0/3.5"


@pytest.mark.parametrize("key", [ShardKey(0, 2, 0), ShardKey(0, 0, 2), ShardKey(0, -1, 0), ShardKey(0, 0, -1)])
def test_a_shard_outside_the_picture_is_refused(key):
    with pytest.raises(ValueError, match="no shard"):
        Grid(Size(64, 64), 16, 32).box(key)


@pytest.mark.parametrize(("chunk_px", "shard_px"), [(16, 40), (15, 30), (0, 0), (32, 16)])
def test_chunks_that_do_not_fit_are_refused(chunk_px, shard_px):
    with pytest.raises(ValueError, match="chunks"):
        Grid(Size(64, 64), chunk_px, shard_px)
