import math

import numpy as np
import pytest
import skimage.data
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from engine.evaluate.metrics import gmsd, gradient_energy, luma, psnr, psnr_y, ssim_y


@pytest.fixture(params=[(96, 128), (61, 75)], ids=["even", "odd"])
def pair(request, rng):
    """A photograph and a blurred, noisy copy of it."""
    h, w = request.param
    clean = skimage.data.astronaut()[100 : 100 + h, 150 : 150 + w]
    blurred = (clean.astype(float) + np.roll(clean, 1, axis=1) + np.roll(clean, 1, axis=0)) / 3
    noisy = np.clip(blurred + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
    return clean, noisy


def test_luma_is_bt601_studio_swing():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_psnr_equals_skimage(pair):
    clean, noisy = pair
    assert psnr(clean, noisy) == pytest.approx(peak_signal_noise_ratio(clean, noisy, data_range=255))


@pytest.mark.parametrize("crop_px", [0, 4])
def test_psnr_y_equals_skimage_on_the_inner_luma(pair, crop_px):
    a, b = (luma(p)[crop_px : p.shape[0] - crop_px, crop_px : p.shape[1] - crop_px] for p in pair)
    assert psnr_y(*pair, crop_px=crop_px) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255))


@pytest.mark.parametrize("crop_px", [0, 4])
def test_ssim_y_equals_skimage(pair, crop_px):
    a, b = (luma(p)[crop_px : p.shape[0] - crop_px, crop_px : p.shape[1] - crop_px] for p in pair)
    expected = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim_y(*pair, crop_px=crop_px) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("crop_px", [0, 4])
def test_ssim_y_counts_only_the_windows_of_the_mask(pair, rng, crop_px):
    a, b = (luma(p) for p in pair)
    _, full = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    where = rng.random(a.shape) < 0.2
    margin = crop_px + 5
    inside = np.zeros_like(where)
    inside[margin:-margin, margin:-margin] = True
    assert ssim_y(*pair, crop_px=crop_px, where=where) == pytest.approx(full[where & inside].mean(), abs=1e-9)


def test_gradient_energy_of_a_slope():
    """Luma rises by 219 / 255 a level: 2 levels a pixel across, 3 down."""
    y, x = np.mgrid[:30, :40]
    slope = np.repeat((2 * x + 3 * y)[..., None], 3, axis=2).astype(np.uint8)
    where = np.zeros(slope.shape[:2], bool)
    where[5:20, 10:30] = True
    assert gradient_energy(slope, where=where) == pytest.approx((4 + 9) * (219 / 255) ** 2)


def _gmsd_as_published(a, b):
    """The authors' MATLAB, line by line: conv2(., ., 'same') starts at (2, 2) of the full result for a 2x2 kernel."""
    prewitt = np.array([[1, 0, -1], [1, 0, -1], [1, 0, -1]]) / 3
    gradients = []
    for picture in (a, b):
        average = convolve2d(luma(picture), np.full((2, 2), 0.25), mode="full")[1:, 1:]
        half = average[::2, ::2]
        gx = convolve2d(half, prewitt, mode="same")
        gy = convolve2d(half, prewitt.T, mode="same")
        gradients.append(np.sqrt(gx**2 + gy**2))
    first, second = gradients
    quality_map = (2 * first * second + 170) / (first**2 + second**2 + 170)
    return np.sqrt(((quality_map - quality_map.mean()) ** 2).sum() / (quality_map.size - 1))


def test_gmsd_equals_the_published_formula(pair):
    assert gmsd(*pair) == pytest.approx(_gmsd_as_published(*pair), abs=1e-9)


def test_equal_pictures_are_perfect(pair):
    clean, _ = pair
    assert psnr(clean, clean) == math.inf
    assert psnr_y(clean, clean) == math.inf
    assert ssim_y(clean, clean) == pytest.approx(1)
    assert gmsd(clean, clean) == 0


def test_psnr_counts_only_the_pixels_of_the_mask(pair):
    clean, noisy = pair
    where = np.zeros(clean.shape[:2], bool)
    where[10:20, 30:50] = True
    expected = peak_signal_noise_ratio(clean[10:20, 30:50], noisy[10:20, 30:50], data_range=255)
    assert psnr(clean, noisy, where=where) == pytest.approx(expected)
    assert psnr(clean, np.where(where[..., None], clean, noisy), where=where) == math.inf


@pytest.mark.parametrize("metric", [psnr, psnr_y, ssim_y, gmsd])
@pytest.mark.parametrize(
    "other",
    [
        np.zeros((32, 31, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint16),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((32, 32), np.uint8),
    ],
    ids=["size", "16-bit", "alpha", "plane"],
)
def test_pictures_that_do_not_match_are_refused(metric, other):
    with pytest.raises(ValueError, match="pictures are compared"):
        metric(np.zeros((32, 32, 3), np.uint8), other)


def test_sizes_and_masks_that_leave_nothing_are_refused():
    small = np.zeros((12, 12, 3), np.uint8)
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr_y(small, small, crop_px=6)
    with pytest.raises(ValueError, match="11 px"):
        ssim_y(small, small, crop_px=1)
    with pytest.raises(ValueError, match="more than 4 pixels"):
        gmsd(small[:2, :2], small[:2, :2])
    with pytest.raises(ValueError, match="no pixel"):
        psnr(small, small, where=np.zeros((12, 12), bool))
    with pytest.raises(ValueError, match="the mask is"):
        psnr(small, small, where=np.ones((12, 11), bool))
