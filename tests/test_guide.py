"""The guide: one reduced picture, sampled at whole ratios so that a tile sees what the whole sees."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import engine.guide
from engine.geometry import Box, Size
from engine.guide import GUIDE_PX, make_guide, read_reflected, reflect, sample
from engine.image import ArrayPicture
from engine.mask import array_mask, no_mask
from engine.models.runner import TorchRunner
from tests.networks import TINY, random_model


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> TorchRunner:
    return TorchRunner(random_model(tmp_path_factory.mktemp("model"), TINY), precision="fp32", threads=1)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20])
def test_reflection_is_that_of_numpy(length):
    line = np.arange(length)
    expected = np.pad(line, 45, mode="reflect")
    assert np.array_equal(reflect(-45, length + 45, length), expected)
    assert np.array_equal(reflect(-3, length + 9, length), expected[42:-36])


def test_a_box_outside_the_picture_reads_the_mirror(rng):
    pixels = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    mirrored = np.pad(pixels, ((20, 20), (20, 20), (0, 0)), mode="reflect")
    for box in (Box(0, 0, 7, 5), Box(-3, -4, 2, 3), Box(-20, -20, 27, 25), Box(10, 9, 12, 20)):
        assert np.array_equal(read_reflected(ArrayPicture(pixels), box), mirrored[box.shifted(20, 20).slices])


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_samples_are_those_of_bilinear_enlargement(factor, rng):
    plane = rng.random((9, 6, 2), dtype=np.float32)
    wanted = F.interpolate(
        torch.from_numpy(plane).permute(2, 0, 1)[None], scale_factor=factor, mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    got = sample(plane, factor, np.arange(9 * factor), np.arange(6 * factor))
    assert np.abs(got - wanted.numpy()).max() < 1e-6


def test_a_sample_does_not_depend_on_its_neighbours(rng):
    """Bit for bit: this is why tiles agree on the guide."""
    plane = rng.random((40, 30, 4), dtype=np.float32)
    whole = sample(plane, 3, np.arange(120), np.arange(90))
    part = sample(plane, 3, np.arange(17, 59), np.arange(31, 90))
    assert np.array_equal(part, whole[17:59, 31:90])


def test_nothing_missing_needs_no_guide(runner):
    assert make_guide(ArrayPicture(np.zeros((9, 9, 3), np.uint8)), no_mask(Size(9, 9)), runner) is None


@pytest.mark.parametrize(("h", "w"), [(1, 1200), (300, 7), (GUIDE_PX, 40), (GUIDE_PX + 1, 40)])
def test_the_guide_is_never_larger_than_its_limit(h, w, runner):
    missing = np.zeros((h, w), bool)
    missing[h // 2, w // 2] = True
    guide = make_guide(ArrayPicture(np.full((h, w, 3), 99, np.uint8)), array_mask(missing), runner)
    assert guide is not None
    assert guide.size.long_side <= GUIDE_PX
    assert guide.size == Size(h, w).divided(guide.factor)
    assert max(h, w) / max(1, guide.factor - 1) > GUIDE_PX or guide.factor == 1  # no smaller factor would do
    assert guide.features.shape == (guide.size.h, guide.size.w, TINY.guide_channels + 1)


def test_the_mean_is_that_of_the_known_pixels(runner, rng, monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 16)
    pixels = rng.integers(0, 256, (45, 33, 3), dtype=np.uint8)
    missing = rng.random((45, 33)) < 0.4
    missing[0:3, 0:3] = True  # one guide pixel without any known pixel
    guide = make_guide(ArrayPicture(pixels), array_mask(missing), runner)
    assert guide is not None
    assert guide.factor == 3
    for y in range(guide.size.h):
        for x in range(guide.size.w):
            known = ~missing[3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
            if known.any():
                mean = pixels[3 * y : 3 * y + 3, 3 * x : 3 * x + 3][known].mean(0) / 255
                assert np.abs(guide.known_mean[y, x] - mean).max() < 1e-5
    assert np.array_equal(guide.known_mean[0, 0], guide.fill[0, 0])


def test_what_lies_under_the_mask_is_never_seen(runner, rng, monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 32)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    missing = rng.random((64, 64)) < 0.3
    other = pixels.copy()
    other[missing] = 255 - other[missing]
    one, two = (make_guide(ArrayPicture(p), array_mask(missing), runner) for p in (pixels, other))
    assert one is not None
    assert two is not None
    assert np.array_equal(one.fill, two.fill)
    assert np.array_equal(one.features, two.features)
    assert torch.equal(one.rows.sources, two.rows.sources)


def test_strips_change_nothing(runner, rng, monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 32)
    pixels = rng.integers(0, 256, (200, 60, 3), dtype=np.uint8)
    missing = rng.random((200, 60)) < 0.3
    one = make_guide(ArrayPicture(pixels), array_mask(missing), runner)
    monkeypatch.setattr(engine.guide, "STRIP_ROWS", 7)
    two = make_guide(ArrayPicture(pixels), array_mask(missing), runner)
    assert one is not None
    assert two is not None
    assert np.array_equal(one.known_mean, two.known_mean)
    assert np.array_equal(one.fill, two.fill)
    assert np.array_equal(one.features, two.features)
