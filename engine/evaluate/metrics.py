"""Full-reference metrics of `(h, w, 3)` uint8 pictures, computed in float64.

Every function raises ValueError where the pictures differ in shape, are not uint8 RGB, or are too small.
"""

from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

PEAK = 255.0

_Image: TypeAlias = NDArray[np.uint8]
_Plane: TypeAlias = NDArray[np.float64]

_SSIM_WINDOW_PX = 11
_SSIM_SIGMA_PX = 1.5
_SSIM_C1 = (0.01 * PEAK) ** 2
_SSIM_C2 = (0.03 * PEAK) ** 2
_GMSD_C = 170.0


def luma(rgb: _Image) -> _Plane:
    """ITU-R BT.601 Y in studio swing, 16..235, not rounded: MATLAB's rgb2ycbcr before its cast, as papers report it."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"a picture is (h, w, 3) uint8, got {rgb.shape} {rgb.dtype}")
    return 16.0 + rgb.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255.0)


def psnr(a: _Image, b: _Image, *, where: NDArray[np.bool_] | None = None) -> float:
    """PSNR over RGB in dB, infinite where equal; `where` is an `(h, w)` mask of the pixels that count."""
    _check_pair(a, b)
    difference = a.astype(np.float64) - b
    if where is None:
        return _decibels(difference)
    _check_mask(where, a.shape[:2])
    return _decibels(difference[where])


def psnr_y(a: _Image, b: _Image, *, crop_px: int = 0) -> float:
    """PSNR over `luma` in dB, without a border of `crop_px` (papers crop the scale factor)."""
    return _decibels(np.subtract(*_cropped_lumas(a, b, crop_px)))


def ssim_y(a: _Image, b: _Image, *, crop_px: int = 0, where: NDArray[np.bool_] | None = None) -> float:
    """Mean SSIM over `luma` (Wang et al. 2004): window 11x11, Gaussian of sigma 1.5 px, valid positions; 1 is best.

    `where` is an `(h, w)` mask of the window centres that count.
    """
    y_a, y_b = _cropped_lumas(a, b, crop_px)
    if min(y_a.shape) < _SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs sides of {_SSIM_WINDOW_PX} px or more after the crop, got {y_a.shape}")
    mean_a, mean_b = _windowed_mean(y_a), _windowed_mean(y_b)
    variance_a = _windowed_mean(y_a * y_a) - mean_a * mean_a
    variance_b = _windowed_mean(y_b * y_b) - mean_b * mean_b
    covariance = _windowed_mean(y_a * y_b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _SSIM_C1) / (mean_a * mean_a + mean_b * mean_b + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance_a + variance_b + _SSIM_C2)
    similarity = luminance * structure
    if where is None:
        return float(np.mean(similarity))
    _check_mask(where, a.shape[:2])
    margin = crop_px + _SSIM_WINDOW_PX // 2
    centres = where[margin : where.shape[0] - margin, margin : where.shape[1] - margin]
    _check_mask(centres, similarity.shape)
    return float(np.mean(similarity[centres]))


def gmsd(a: _Image, b: _Image) -> float:
    """Gradient magnitude similarity deviation over `luma` (Xue et al. 2014): 2x2 average first, Prewitt, 0 is best."""
    y_a, y_b = _cropped_lumas(a, b, 0)
    if y_a.size <= 4:
        raise ValueError(f"GMSD needs more than 4 pixels, got {y_a.shape}")
    gradient_a, gradient_b = _gradient(_halved(y_a)), _gradient(_halved(y_b))
    similarity = (2 * gradient_a * gradient_b + _GMSD_C) / (gradient_a**2 + gradient_b**2 + _GMSD_C)
    return float(np.std(similarity, ddof=1))


def gradient_energy(a: _Image, *, where: NDArray[np.bool_]) -> float:
    """Mean squared gradient (central differences) of `luma` over the pixels of an `(h, w)` mask, in squared levels."""
    plane = luma(a)
    _check_mask(where, plane.shape)
    energy = sum(np.square(np.gradient(plane, axis=axis)) for axis in (0, 1))
    return float(np.mean(np.asarray(energy, np.float64)[where]))


def _check_mask(where: NDArray[np.bool_], shape: tuple[int, ...]) -> None:
    if where.shape != shape or where.dtype != np.bool_:
        raise ValueError(f"the mask is {where.shape} {where.dtype}, the picture needs {shape} bool")
    if not where.any():
        raise ValueError("the mask selects no pixel: there is nothing to measure")


def _check_pair(a: _Image, b: _Image) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 3 or a.shape[2] != 3:
        raise ValueError(f"two (h, w, 3) uint8 pictures are compared, got {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    if a.size == 0:
        raise ValueError("a picture without pixels cannot be measured")


def _decibels(difference: _Plane) -> float:
    error = float(np.mean(np.square(difference)))
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def _cropped_lumas(a: _Image, b: _Image, crop_px: int) -> tuple[_Plane, _Plane]:
    _check_pair(a, b)
    h, w = a.shape[:2]
    if crop_px < 0 or 2 * crop_px >= min(h, w):
        raise ValueError(f"a border of {crop_px} px leaves nothing of {w}x{h}")
    inner = slice(crop_px, h - crop_px), slice(crop_px, w - crop_px)
    return luma(a[inner]), luma(b[inner])


def _windowed_mean(plane: _Plane) -> _Plane:
    """The Gaussian mean at the positions where the window lies inside."""
    window = cv2.getGaussianKernel(_SSIM_WINDOW_PX, _SSIM_SIGMA_PX, cv2.CV_64F)
    margin = _SSIM_WINDOW_PX // 2
    return np.asarray(cv2.sepFilter2D(plane, cv2.CV_64F, window, window)[margin:-margin, margin:-margin], np.float64)


def _halved(plane: _Plane) -> _Plane:
    """Means of 2x2 blocks; an odd edge is averaged with zeros, as the authors' conv2(..., 'same') does."""
    h, w = plane.shape
    padded = np.pad(plane, ((0, h % 2), (0, w % 2)))
    return padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).mean(axis=(1, 3))


def _gradient(plane: _Plane) -> _Plane:
    """Prewitt gradient magnitude with zeros outside."""
    smooth, slope = np.full((3, 1), 1 / 3), np.array([[1.0], [0.0], [-1.0]])
    across = cv2.sepFilter2D(plane, cv2.CV_64F, slope, smooth, borderType=cv2.BORDER_CONSTANT)
    along = cv2.sepFilter2D(plane, cv2.CV_64F, smooth, slope, borderType=cv2.BORDER_CONSTANT)
    return np.hypot(across, along)
