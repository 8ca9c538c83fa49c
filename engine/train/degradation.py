"""What scans and their copies went through: blur, resizing, noise and JPEG, twice (second-order degradation).

The kinds and ranges follow Real-ESRGAN (Wang et al. 2021, sections 3.1 to 3.3 and 4.1), without its sinc filters.
Seeded and pure: the same picture comes out for the same generator. Pictures are (h, w, 3) float32, 0 to 255.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

_KERNEL_SIDES_PX = tuple(range(7, 22, 2))
_ISOTROPIC = 0.6
"""Share of the blurs that are as wide as high."""
_GREY_NOISE = 0.4
_GAUSSIAN = 0.5
"""Share of the noise that does not grow with the light."""
_WAYS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


@dataclass(frozen=True, slots=True)
class Order:
    """How strong one of the two rounds may be; each pair is a range."""

    blurred: float
    """Share of the pictures that are blurred at all."""
    sigma_px: tuple[float, float]
    larger: float
    smaller: float
    """Shares of the pictures that are enlarged and reduced in between."""
    factor: tuple[float, float]
    noise: tuple[float, float]
    """Standard deviation, in levels."""
    shot: tuple[float, float]
    """Of shot noise: times the standard deviation that counted photons would have, one for each level."""
    quality: tuple[int, int]
    """Of JPEG."""


FIRST = Order(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0), (30, 95))
SECOND = Order(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), (30, 95))


def degraded(picture: Pixels, size_px: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """(H, W, 3) uint8 → (h, w, 3) uint8 of `size_px` = (h, w): what a bad copy has of it."""
    h, w = size_px
    x = picture.astype(np.float32)
    x = _compressed(_noisy(_resized(_blurred(x, FIRST, rng), FIRST, picture.shape[:2], rng), FIRST, rng), FIRST, rng)
    x = _noisy(_resized(_blurred(x, SECOND, rng), SECOND, size_px, rng), SECOND, rng)
    way = _WAYS[int(rng.integers(len(_WAYS)))]
    if rng.random() < 0.5:
        x = _compressed(cv2.resize(x, (w, h), interpolation=way).astype(np.float32), SECOND, rng)
    else:
        x = cv2.resize(_compressed(x, SECOND, rng), (w, h), interpolation=way).astype(np.float32)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _blurred(x: Floats, order: Order, rng: np.random.Generator) -> Floats:
    """By a Gaussian, often wider in one direction than in the other."""
    if rng.random() >= order.blurred:
        return x
    side = int(rng.choice(_KERNEL_SIDES_PX))
    wide, high = (float(rng.uniform(*order.sigma_px)) for _ in range(2))
    if rng.random() < _ISOTROPIC:
        high = wide
    angle = float(rng.uniform(0, np.pi))
    at = np.arange(side) - side // 2
    across, down = np.meshgrid(at, at)
    along = across * np.cos(angle) + down * np.sin(angle)
    beside = down * np.cos(angle) - across * np.sin(angle)
    kernel = np.exp(-0.5 * ((along / wide) ** 2 + (beside / high) ** 2))
    kernel /= kernel.sum()
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101).astype(np.float32)


def _resized(x: Floats, order: Order, of_px: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """To some share of the size `of_px` = (h, w)."""
    least, most = order.factor
    kind = rng.random()
    if kind < order.larger:
        factor = float(rng.uniform(1.0, most))
    elif kind < order.larger + order.smaller:
        factor = float(rng.uniform(least, 1.0))
    else:
        factor = 1.0
    h, w = (max(8, round(side * factor)) for side in of_px[:2])
    return cv2.resize(x, (w, h), interpolation=_WAYS[int(rng.integers(len(_WAYS)))]).astype(np.float32)


def _noisy(x: Floats, order: Order, rng: np.random.Generator) -> Floats:
    grey = rng.random() < _GREY_NOISE
    shape = (*x.shape[:2], 1 if grey else 3)
    if rng.random() < _GAUSSIAN:
        noise = rng.normal(0.0, float(rng.uniform(*order.noise)), shape)
    else:
        light = np.clip(x.mean(2, keepdims=True) if grey else x, 0, 255)
        noise = float(rng.uniform(*order.shot)) * (rng.poisson(light) - light)
    return np.clip(x + noise, 0, 255).astype(np.float32)


def _compressed(x: Floats, order: Order, rng: np.random.Generator) -> Floats:
    return compressed(x, int(rng.integers(order.quality[0], order.quality[1] + 1)))


def compressed(x: Floats, quality: int) -> Floats:
    """What JPEG of this quality leaves."""
    bgr = np.clip(np.rint(x[..., ::-1]), 0, 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
    assert done
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1].astype(np.float32)
