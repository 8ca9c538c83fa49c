"""Every level is the rounded 2x2 mean of the one before, borders and odd sides included."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StorageError
from engine.geometry import Box, Size
from engine.tiling.canvas import Canvas
from engine.tiling.execute import run
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard, halve


def naive_half(picture: np.ndarray) -> np.ndarray:
    """(h, w, c), one pixel at a time, in Python's own whole numbers."""
    h, w, channels = picture.shape
    half = np.empty(((h + 1) // 2, (w + 1) // 2, channels), picture.dtype)
    for y, x, c in np.ndindex(half.shape):
        rows, columns = (2 * y, min(2 * y + 1, h - 1)), (2 * x, min(2 * x + 1, w - 1))
        total = sum(int(picture[row, column, c]) for row in rows for column in columns)
        half[y, x, c] = (total + 2) // 4
    return half


def build(picture: np.ndarray, out: Path, *, chunk_px: int, shard_px: int) -> Canvas:
    size = Size(*picture.shape[:2])
    grid = Grid(size, chunk_px, shard_px)
    plan = Plan("scan", size, picture.shape[2], str(picture.dtype), grid, "a", "none", "lite", "b", {}, 0, 0)
    canvas = Canvas.open(plan, out)
    half = HalveShard(canvas)
    for _ in run(canvas, grid.all_keys(), lambda key: half(key) if key.level else picture[grid.box(key).slices]):
        pass
    return canvas


@pytest.mark.parametrize(
    ("h", "w", "channels", "dtype"),
    [
        (67, 101, 3, "uint8"),
        (64, 64, 1, "uint16"),
        (1, 75, 4, "uint8"),
        (75, 1, 1, "uint16"),
        (33, 65, 3, "uint16"),
        (31, 63, 2, "uint8"),
        (17, 16, 3, "uint8"),
    ],
)
def test_levels_equal_the_naive_reference(tmp_path, rng, h, w, channels, dtype):
    picture = rng.integers(0, np.iinfo(dtype).max + 1, (h, w, channels), dtype)
    with build(picture, tmp_path, chunk_px=8, shard_px=16) as canvas:
        expected = picture
        assert len(canvas.grid.level_sizes) > 1
        for level, size in enumerate(canvas.grid.level_sizes):
            actual = canvas.read(Box.of(size), level=level)
            np.testing.assert_array_equal(actual, expected, err_msg=f"level {level}")
            expected = naive_half(expected)


def test_shards_larger_than_their_parents_chunks(tmp_path, rng):
    """A level that fits one small shard, made from two of the level before."""
    picture = rng.integers(0, 256, (75, 90, 3), np.uint8)
    with build(picture, tmp_path, chunk_px=16, shard_px=64) as canvas:
        assert canvas.grid.shard_shape(1) == Size(48, 48)
        np.testing.assert_array_equal(canvas.read(Box(0, 0, 38, 45), level=1), naive_half(picture))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["uint8", "uint16"]), st.integers(0, 2**32 - 1))
def test_halve(h, w, dtype, seed):
    planes = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (2, h, w), dtype)
    expected = naive_half(planes.transpose(1, 2, 0)).transpose(2, 0, 1)
    np.testing.assert_array_equal(halve(planes), expected)
    assert halve(planes).dtype == dtype


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_does_not_overflow_and_halves_round_up(dtype):
    top = np.iinfo(dtype).max
    assert halve(np.full((1, 2, 2), top, dtype)) == top
    assert halve(np.array([[[0, 1], [1, 0]]], dtype)) == 1
    assert halve(np.array([[[0, 0], [1, 0]]], dtype)) == 0


def test_a_missing_parent_is_an_error_not_black(tmp_path):
    picture = np.full((64, 64, 1), 200, np.uint8)
    with build(picture, tmp_path, chunk_px=16, shard_px=32) as canvas:
        canvas.object_path(ShardKey(0, 1, 0)).unlink()
        with pytest.raises(StorageError, match=r"0/1\.0"):
            HalveShard(canvas)(ShardKey(1, 0, 0))
