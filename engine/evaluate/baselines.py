"""Floors that a network has to beat: classical inpainting and bicubic resampling.

`bicubic_down` and `bicubic_up` repeat MATLAB's imresize (Keys' kernel with a = -0.5, antialiased when shrinking,
mirrored borders) in float64, because the published super-resolution numbers were made with it.
"""

from typing import TypeAlias, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.geometry import ceil_div

_Pixel = TypeVar("_Pixel", np.uint8, np.uint16)
_Weights: TypeAlias = tuple[NDArray[np.intp], NDArray[np.float64]]

_KERNEL_WIDTH_PX = 4.0


def telea(image: NDArray[_Pixel], mask: NDArray[np.bool_], *, radius_px: float = 3) -> NDArray[_Pixel]:
    """Fill the missing pixels of an `(h, w, c)` image by fast marching (Telea 2004)."""
    return _inpainted(image, mask, cv2.INPAINT_TELEA, radius_px)


def navier_stokes(image: NDArray[_Pixel], mask: NDArray[np.bool_], *, radius_px: float = 3) -> NDArray[_Pixel]:
    """Fill the missing pixels of an `(h, w, c)` image by fluid dynamics (Bertalmio et al. 2001)."""
    return _inpainted(image, mask, cv2.INPAINT_NS, radius_px)


def bicubic_up(image: NDArray[_Pixel], scale: int) -> NDArray[_Pixel]:
    """An `(h, w, c)` image `scale` times larger: `(h * scale, w * scale, c)`, rounded and clipped to its type."""
    _check_scale(scale)
    h, w = image.shape[:2]
    return _resized(image, _weights(h, h * scale, scale), _weights(w, w * scale, scale))


def bicubic_down(image: NDArray[_Pixel], scale: int) -> NDArray[_Pixel]:
    """An `(h, w, c)` image `scale` times smaller, sides rounded up, antialiased, rounded and clipped to its type."""
    _check_scale(scale)
    h, w = image.shape[:2]
    return _resized(image, _weights(h, ceil_div(h, scale), 1 / scale), _weights(w, ceil_div(w, scale), 1 / scale))


def _check_scale(scale: int) -> None:
    if scale < 1:
        raise ValueError(f"a scale is a whole number of 1 or more, got {scale}")


def _inpainted(image: NDArray[_Pixel], mask: NDArray[np.bool_], method: int, radius_px: float) -> NDArray[_Pixel]:
    if image.ndim != 3 or mask.shape != image.shape[:2]:
        raise ValueError(f"an (h, w, c) image and its (h, w) mask are needed, got {image.shape} and {mask.shape}")
    hole = mask.astype(np.uint8)
    channels = [
        cv2.inpaint(np.ascontiguousarray(image[..., c]), hole, radius_px, method) for c in range(image.shape[2])
    ]
    return np.stack(channels, axis=-1).astype(image.dtype, copy=False)


def _resized(image: NDArray[_Pixel], rows: _Weights, columns: _Weights) -> NDArray[_Pixel]:
    resized = _along_rows(image.astype(np.float64), rows)
    resized = _along_rows(resized.swapaxes(0, 1), columns).swapaxes(0, 1)
    return np.clip(np.floor(resized + 0.5), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def _along_rows(plane: NDArray[np.float64], weights: _Weights) -> NDArray[np.float64]:
    """Weighted sums of rows; one tap at a time, so the working set stays that of the result."""
    index, weight = weights
    out = np.zeros((index.shape[0], *plane.shape[1:]))
    for tap in range(index.shape[1]):
        out += weight[:, tap, None, None] * plane[index[:, tap]]
    return out


def _weights(num_in: int, num_out: int, scale: float) -> _Weights:
    """Source rows and weights of every output row, as MATLAB's imresize computes them."""
    stretch = max(1.0, 1 / scale)
    width = _KERNEL_WIDTH_PX * stretch
    centre = (np.arange(num_out, dtype=np.float64) + 0.5) / scale - 0.5
    first = np.ceil(centre - width / 2).astype(np.intp)
    index = first[:, None] + np.arange(int(np.ceil(width)) + 1)
    weight = _keys(np.asarray((centre[:, None] - index) / stretch, np.float64))
    weight /= weight.sum(axis=1, keepdims=True)
    mirrored = index % (2 * num_in)
    return np.minimum(mirrored, 2 * num_in - 1 - mirrored), weight


def _keys(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel (1981) with a = -0.5, support 2."""
    x = np.abs(distance)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
