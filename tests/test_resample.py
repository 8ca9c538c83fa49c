"""Area resampling against the definition: cover the target pixel, take the mean of what lies under it."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from engine.geometry import Box, Size
from engine.resample import resample_area, source_box


def shares(target: int, source: int) -> np.ndarray:
    """(target, source) shares, by fractions."""
    out = np.zeros((target, source))
    for i in range(target):
        low, high = Fraction(i * source, target), Fraction((i + 1) * source, target)
        for j in range(floor(low), ceil(high)):
            out[i, j] = float((min(high, j + 1) - max(low, j)) / (high - low))
    return out


def naive(pixels: np.ndarray, target: Size) -> np.ndarray:
    """(h, w, c) float64"""
    rows, columns = shares(target.h, pixels.shape[0]), shares(target.w, pixels.shape[1])
    return np.einsum("ij,jkc,lk->ilc", rows, pixels.astype(np.float64), columns)


SIZES = [(Size(8, 8), Size(4, 4)), (Size(9, 7), Size(4, 5)), (Size(40, 31), Size(13, 30)), (Size(5, 3), Size(1, 1))]


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pixels_are_area_means(source, target, dtype, rng):
    pixels = rng.integers(0, np.iinfo(dtype).max, (source.h, source.w, 3), dtype=dtype, endpoint=True)
    whole, got_box = Box.of(source), Box.of(target)
    got = resample_area(pixels, whole, got_box, source=source, target=target)
    assert got.dtype == pixels.dtype
    assert np.abs(got - naive(pixels, target)).max() <= 0.5 + np.iinfo(dtype).max * 1e-6


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_a_box_needs_only_its_source_box(source, target, rng):
    """Bit for bit the same, from just those pixels: this is what a shard of `--long-side` reads."""
    pixels = rng.integers(0, 256, (source.h, source.w, 3), dtype=np.uint8)
    whole = resample_area(pixels, Box.of(source), Box.of(target), source=source, target=target)
    for y in range(0, target.h, 3):
        for x in range(0, target.w, 4):
            box = Box(y, x, min(y + 3, target.h), min(x + 4, target.w))
            have = source_box(box, source=source, target=target)
            part = resample_area(pixels[have.slices], have, box, source=source, target=target)
            assert np.array_equal(part, whole[box.slices])


def test_the_source_box_is_what_is_touched_and_no_more():
    source, target = Size(100, 70), Size(33, 64)
    for box in (Box(0, 0, 1, 1), Box(7, 9, 12, 40), Box(32, 63, 33, 64)):
        have = source_box(box, source=source, target=target)
        rows = np.nonzero(shares(33, 100)[box.y0 : box.y1].any(0))[0]
        columns = np.nonzero(shares(64, 70)[box.x0 : box.x1].any(0))[0]
        assert have == Box(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def test_a_constant_stays_itself():
    pixels = np.full((50, 50, 1), 65535, np.uint16)
    assert (resample_area(pixels, Box(0, 0, 50, 50), Box(0, 0, 17, 31), source=Size(50, 50), target=Size(17, 31)) == 65535).all()
