"""Area resampling against the definition: cover the target pixel, take the mean of what lies under it."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from engine.geometry import Box, Size
from engine.resample import resample_area, source_box


def shares(target: int, source: int) -> list[dict[int, Fraction]]:
    """For each target pixel the source pixels under it and their shares."""
    out = []
    for i in range(target):
        low, high = Fraction(i * source, target), Fraction((i + 1) * source, target)
        out.append({j: (min(high, j + 1) - max(low, j)) / (high - low) for j in range(floor(low), ceil(high))})
    return out


def naive(pixels: np.ndarray, target: Size) -> np.ndarray:
    """(h, w, c) by fractions, rounded half to even."""
    rows, columns = shares(target.h, pixels.shape[0]), shares(target.w, pixels.shape[1])
    out = np.empty((target.h, target.w, pixels.shape[2]), pixels.dtype)
    for y, x, c in np.ndindex(out.shape):
        parts = (v * u * int(pixels[j, i, c]) for j, v in rows[y].items() for i, u in columns[x].items())
        out[y, x, c] = round(sum(parts, Fraction(0)))
    return out


SIZES = [(Size(8, 8), Size(4, 4)), (Size(9, 7), Size(4, 5)), (Size(40, 31), Size(13, 30)), (Size(5, 3), Size(1, 1))]


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pixels_are_area_means(source, target, dtype, rng):
    pixels = rng.integers(0, np.iinfo(dtype).max, (source.h, source.w, 3), dtype=dtype, endpoint=True)
    whole, got_box = Box.of(source), Box.of(target)
    got = resample_area(pixels, whole, got_box, source=source, target=target)
    assert got.dtype == pixels.dtype
    assert np.array_equal(got, naive(pixels, target))


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
        rows = [j for line in shares(33, 100)[box.y0 : box.y1] for j in line]
        columns = [j for line in shares(64, 70)[box.x0 : box.x1] for j in line]
        assert have == Box(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def test_cuts_change_no_pixel_of_a_larger_picture(rng):
    source, target = Size(300, 333), Size(199, 250)
    pixels = rng.integers(0, 65536, (source.h, source.w, 3), dtype=np.uint16)
    whole = resample_area(pixels, Box.of(source), Box.of(target), source=source, target=target)
    for box in (Box(0, 0, 128, 128), Box(128, 128, 199, 250), Box(37, 101, 180, 102)):
        have = source_box(box, source=source, target=target)
        part = resample_area(pixels[have.slices], have, box, source=source, target=target)
        assert np.array_equal(part, whole[box.slices])


def test_a_constant_stays_itself():
    source, target = Size(50, 50), Size(17, 31)
    pixels = np.full((50, 50, 1), 65535, np.uint16)
    assert (resample_area(pixels, Box.of(source), Box.of(target), source=source, target=target) == 65535).all()
