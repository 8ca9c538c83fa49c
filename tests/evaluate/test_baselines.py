import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from engine.evaluate.baselines import bicubic_down, bicubic_up, navier_stokes, telea
from engine.evaluate.metrics import psnr

FILLS = [telea, navier_stokes]


def _pillow(plane, size):
    """Pillow's BICUBIC in floating point: in bytes it rounds between the two axes."""
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_resampling_equals_pillow_away_from_the_border(scale):
    """Pillow's BICUBIC is the same kernel, antialiased; only its borders differ."""
    image = skimage.data.astronaut()[:240, :192]
    down = bicubic_down(image, scale)
    up = bicubic_up(down, scale)
    for ours, source, margin in ((down, image, 4), (up, down, 4 * scale)):
        inner = slice(margin, -margin)
        for channel in range(3):
            pillow = _pillow(source[..., channel], ours.shape[1::-1])[inner, inner].clip(0, 255)
            assert np.abs(ours[inner, inner, channel] - pillow).max() <= 0.501


def _keys(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@pytest.mark.parametrize(("num_in", "scale"), [(3, 4), (7, 2), (1, 8), (13, 0.5), (9, 0.25), (2, 0.25)])
def test_borders_are_mirrored_as_imresize_does(num_in, scale, rng):
    row = rng.integers(0, 256, num_in)
    mirrored = [*row, *row[::-1]]
    stretch = max(1.0, 1 / scale)
    expected = []
    for out in range(int(np.ceil(num_in * scale))):
        centre = (out + 0.5) / scale - 0.5
        taps = range(int(np.floor(centre - 2 * stretch)) - 1, int(np.ceil(centre + 2 * stretch)) + 2)
        weights = np.array([_keys((centre - tap) / stretch) for tap in taps])
        values = np.array([mirrored[tap % (2 * num_in)] for tap in taps])
        expected.append(np.clip(np.floor((weights @ values) / weights.sum() + 0.5), 0, 255))
    image = np.repeat(row.astype(np.uint8)[None, :, None], 5, axis=0)
    resized = bicubic_up(image, int(scale)) if scale > 1 else bicubic_down(image, int(1 / scale))
    assert resized[0, :, 0].tolist() == pytest.approx(expected, abs=1)
    assert np.mean(resized[0, :, 0] == expected) >= 0.9


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_flat_stays_flat_and_the_type_is_kept(dtype):
    image = np.full((9, 14, 4), np.iinfo(dtype).max - 3, dtype)
    assert np.array_equal(bicubic_up(image, 4), np.full((36, 56, 4), image[0, 0, 0], dtype))
    assert np.array_equal(bicubic_down(image, 4), np.full((3, 4, 4), image[0, 0, 0], dtype))


def test_overshoot_is_clipped_and_not_wrapped():
    image = np.zeros((8, 8, 1), np.uint8)
    image[:, 4:] = 255
    up = bicubic_up(image, 4)
    assert up[:, :14].max() < 30
    assert up[:, 18:].min() > 225


def test_a_scale_below_one_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        bicubic_up(np.zeros((4, 4, 3), np.uint8), 0)


def _hole(h, w):
    mask = np.zeros((h, w), bool)
    mask[20:26, 30:60] = True
    return mask


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_known_pixels_stay_and_the_hole_is_filled_plausibly(fill, channels):
    clean = np.dstack([skimage.data.astronaut()[:80, :120], np.full((80, 120), 200, np.uint8)])[..., :channels].copy()
    mask = _hole(80, 120)
    damaged = clean.copy()
    damaged[mask] = 0
    filled = fill(damaged, mask)
    assert filled.shape == clean.shape
    assert np.array_equal(filled[~mask], clean[~mask])
    if channels == 3:
        assert psnr(filled, clean, where=mask) > psnr(damaged, clean, where=mask) + 6


@pytest.mark.parametrize("fill", FILLS)
def test_sixteen_bits_stay_sixteen_bits(fill):
    image = np.full((80, 120, 3), 40_000, np.uint16)
    mask = _hole(80, 120)
    image[mask] = 0
    filled = fill(image, mask)
    assert filled.dtype == np.uint16
    assert np.abs(filled.astype(int) - 40_000).max() <= 256


@pytest.mark.parametrize(("fill", "method"), [(telea, cv2.INPAINT_TELEA), (navier_stokes, cv2.INPAINT_NS)])
def test_the_fill_is_opencvs_on_all_channels_together(fill, method):
    image = skimage.data.astronaut()[:80, :120].copy()
    mask = _hole(80, 120)
    assert np.array_equal(fill(image, mask), cv2.inpaint(image, mask.astype(np.uint8), 3, method))


@pytest.mark.parametrize("fill", FILLS)
def test_a_mask_of_another_size_is_refused(fill):
    with pytest.raises(ValueError, match="mask"):
        fill(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), bool))
