"""Irregular masks that look like damage: seeded, pure, the same bytes for the same seed.

Free-form strokes follow the random walk of DeepFillv2 (Yu et al. 2019, section 3.4); cracks, blobs, torn corners,
scratches and spots add what old photographs show. Every length is a fraction of the picture's side, so the mask of a
small crop looks like the mask of a large picture. All masks are `(h, w)` bool, True = missing.
"""

from collections.abc import Callable
from math import atan2, ceil, cos, floor, pi, sin, sqrt
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.geometry import Size

MIN_SIDE_PX = 16
LIGHT = (0.05, 0.15)
MEDIUM = (0.15, 0.30)
HEAVY = (0.30, 0.50)

_MAX_SHAPES = 160
_FILM_THRESHOLD = 0.1

_Mask: TypeAlias = NDArray[np.bool_]
_Plane: TypeAlias = NDArray[np.uint8]
_Points: TypeAlias = NDArray[np.float64]
_Draw: TypeAlias = Callable[[_Plane, np.random.Generator], None]


def strokes(size: Size, *, seed: int) -> _Mask:
    """One free-form brush stroke: a zigzag of 4 to 12 thick segments with round joints."""
    return _drawn_once(_draw_stroke, size, seed)


def cracks(size: Size, *, seed: int) -> _Mask:
    """One thin crack that wanders over the picture and branches up to three times."""
    return _drawn_once(_draw_crack, size, seed)


def blobs(size: Size, *, seed: int) -> _Mask:
    """One stain: a closed outline of smoothly varying radius."""
    return _drawn_once(_draw_blob, size, seed)


def missing_corner(size: Size, *, seed: int) -> _Mask:
    """One torn-off corner with a ragged edge."""
    return _drawn_once(_draw_corner, size, seed)


def scratches(size: Size, *, seed: int) -> _Mask:
    """A bundle of 1 to 4 long, thin, nearly parallel lines, some of them interrupted."""
    return _drawn_once(_draw_scratches, size, seed)


def spots(size: Size, *, seed: int) -> _Mask:
    """A scatter of 5 to 30 small ellipses."""
    return _drawn_once(_draw_spots, size, seed)


def damage_mask(size: Size, *, seed: int, share: tuple[float, float]) -> _Mask:
    """A mix of all kinds of damage whose missing share of the pixels lies within `share` = (least, most).

    Each mask draws a mix of its own, so some are all strokes and some are mostly cracks. The last shape is cut to the
    drawn share. Raises ValueError for a size below `MIN_SIDE_PX` or a share that no whole number of pixels meets.
    """
    _check_size(size)
    rng = np.random.default_rng(seed)
    target = _target_pixels(size, share, rng)
    weights = rng.dirichlet([weight for _, weight in _MIX])
    max_shapes = _MAX_SHAPES * size.long_side // min(size.h, size.w)
    mask, shape = np.zeros((2, size.h, size.w), np.uint8)
    num_missing = 0
    for kind in rng.choice(len(_MIX), size=max_shapes, p=weights):
        before = num_missing
        shape[:] = 0
        _MIX[kind][0](shape, rng)
        merged = cv2.bitwise_or(mask, shape)
        num_missing = cv2.countNonZero(merged)
        if num_missing >= target:
            return _with_part_of(mask, shape, target - before, rng)
        mask = merged.astype(np.uint8, copy=False)
    shape[:] = 1  # only small shapes were drawn: one round hole makes up what is left
    return _with_part_of(mask, shape, target - num_missing, rng)


def film_mask(cover: NDArray[np.uint8], size: Size, *, seed: int) -> _Mask:
    """What a scanned film artefact hides when it lies somewhere on a picture of `size`.

    `cover` is its alpha, `(h, w)`; what is above 0.1 is missing. The artefact is turned, flipped, scaled to 30-130 % of
    the picture's long side and placed with its centre inside the picture. Raises ValueError for another shape.
    """
    if cover.ndim != 2:
        raise ValueError(f"a cover is (h, w), got {cover.shape}")
    rng = np.random.default_rng(seed)
    alpha = np.ascontiguousarray(cover[:, :: int(rng.choice([-1, 1]))])
    factor = size.long_side / max(alpha.shape) * rng.uniform(0.3, 1.3)
    if factor < 1:  # averaging keeps a hair whole where sampling would break it into dots
        h, w = (max(1, round(n * factor)) for n in alpha.shape)
        alpha, factor = cv2.resize(alpha, (w, h), interpolation=cv2.INTER_AREA), 1.0
    angle = rng.uniform(0, 2 * pi)
    turn = factor * np.array([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]])
    middle = (np.array(alpha.shape[::-1]) - 1) / 2
    shift = rng.uniform(0, 1, 2) * (size.w, size.h) - turn @ middle
    placed = cv2.warpAffine(alpha, np.column_stack([turn, shift]), (size.w, size.h), flags=cv2.INTER_LINEAR)
    return np.asarray(placed) > _FILM_THRESHOLD * 255


def _target_pixels(size: Size, share: tuple[float, float], rng: np.random.Generator) -> int:
    least, most = ceil(share[0] * size.num_pixels), floor(share[1] * size.num_pixels)
    if not 0 <= least <= most <= size.num_pixels:
        raise ValueError(f"no number of pixels of a {size} picture lies within the share {share}")
    return int(rng.integers(least, most + 1))


def _with_part_of(mask: _Plane, shape: _Plane, num_pixels: int, rng: np.random.Generator) -> _Mask:
    """`mask` and the `num_pixels` new pixels of `shape` that lie nearest to one of them."""
    missing = mask != 0
    fresh = np.flatnonzero((shape != 0) & ~missing)
    if num_pixels < len(fresh):
        y, x = np.divmod(fresh.astype(np.int32), np.int32(mask.shape[1]))
        origin = int(rng.integers(len(fresh)))
        distance = np.hypot((y - y[origin]).astype(np.float32), (x - x[origin]).astype(np.float32))
        fresh = fresh[np.argsort(distance, kind="stable")[:num_pixels]]
    missing.reshape(-1)[fresh] = True
    return missing


def _drawn_once(draw: _Draw, size: Size, seed: int) -> _Mask:
    _check_size(size)
    plane = np.zeros((size.h, size.w), np.uint8)
    draw(plane, np.random.default_rng(seed))
    return plane != 0


def _check_size(size: Size) -> None:
    if min(size.h, size.w) < MIN_SIDE_PX:
        raise ValueError(f"a mask needs sides of {MIN_SIDE_PX} px or more, got {size}")


def _side_px(plane: _Plane) -> float:
    """The length that all others are fractions of; for a strip, not much above its short side."""
    h, w = plane.shape
    return min(sqrt(h * w), 2.0 * min(h, w))


def _width_px(plane: _Plane, rng: np.random.Generator, low: float, high: float) -> int:
    """A log-uniform width between two fractions of the side, at least one pixel."""
    return max(1, round(_side_px(plane) * low * (high / low) ** rng.random()))


def _point(plane: _Plane, rng: np.random.Generator) -> _Points:
    h, w = plane.shape
    return rng.uniform(0, 1, 2) * (w, h)


def _line(plane: _Plane, points: _Points, width_px: int) -> None:
    cv2.polylines(plane, [np.rint(points).astype(np.int32)], isClosed=False, color=1, thickness=width_px)


def _draw_stroke(plane: _Plane, rng: np.random.Generator) -> None:
    num, side = int(rng.integers(4, 13)), _side_px(plane)
    turns = rng.uniform(2 * pi / 5 - 2 * pi / 15, 2 * pi / 5 + 2 * pi / 15, num)
    turns[::2] *= -1
    angles = rng.uniform(0, 2 * pi) + turns
    lengths = np.clip(rng.normal(0.17, 0.08, num), 0.02, 0.34) * side
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
    h, w = plane.shape
    points = np.clip(_point(plane, rng) + np.cumsum(steps, axis=0), 0, (w, h))
    _line(plane, points, _width_px(plane, rng, 0.01, 0.04))


def _draw_crack(plane: _Plane, rng: np.random.Generator) -> None:
    start, middle = _point(plane, rng), np.array(plane.shape[::-1]) / 2
    inwards = atan2(middle[1] - start[1], middle[0] - start[0])
    starts = [(start, inwards + rng.normal(0, 0.6))]
    for branch in range(1 + int(rng.integers(0, 4))):
        start, heading = starts[int(rng.integers(len(starts)))]
        num = int(rng.integers(12, 40)) // (1 + branch)
        headings = heading + np.cumsum(rng.normal(0, 0.35, num))
        lengths = rng.uniform(0.01, 0.04, num) * _side_px(plane)
        steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) * lengths[:, None]
        points = start + np.cumsum(steps, axis=0)
        _line(plane, points, _width_px(plane, rng, 0.003, 0.01))
        fork = int(rng.integers(num))
        starts.append((points[fork], headings[fork] + float(rng.choice([-1.0, 1.0])) * rng.uniform(0.4, 1.2)))


def _draw_blob(plane: _Plane, rng: np.random.Generator) -> None:
    turn = np.linspace(0, 2 * pi, 48, endpoint=False)
    radius = np.ones(48)
    for wave in range(2, 7):
        radius += rng.normal(0, 0.35 / wave) * np.cos(wave * turn + rng.uniform(0, 2 * pi))
    radius = np.clip(radius, 0.2, 2.0) * _side_px(plane) * 0.02 * 6 ** rng.random()
    squeeze = rng.uniform(0.5, 1.0)
    points = _point(plane, rng) + np.stack([radius * np.cos(turn), radius * squeeze * np.sin(turn)], axis=1)
    cv2.fillPoly(plane, [np.rint(points).astype(np.int32)], color=1)


def _draw_corner(plane: _Plane, rng: np.random.Generator) -> None:
    h, w = plane.shape
    along_x, along_y = rng.uniform(0.08, 0.35, 2) * _side_px(plane)
    part = np.linspace(0, 1, 14)
    ragged = np.cumsum(rng.normal(0, 0.012, 14)) * _side_px(plane)
    edge = np.stack([along_x * (1 - part) + ragged, along_y * part + ragged], axis=1)
    edge[0, 1], edge[-1, 0] = -1, -1
    points = np.concatenate([edge, [[-1.0, -1.0]]])
    if rng.random() < 0.5:
        points[:, 0] = w - 1 - points[:, 0]
    if rng.random() < 0.5:
        points[:, 1] = h - 1 - points[:, 1]
    cv2.fillPoly(plane, [np.rint(points).astype(np.int32)], color=1)


def _draw_scratches(plane: _Plane, rng: np.random.Generator) -> None:
    heading, side = rng.normal(pi / 2, 0.12) if rng.random() < 0.7 else rng.uniform(0, pi), _side_px(plane)
    for _ in range(int(rng.integers(1, 5))):
        length, bend = rng.uniform(0.3, 1.2) * side, rng.normal(0, 0.03) * side
        part = np.linspace(-0.5, 0.5, 9)
        forward, sideways = part * length, bend * (1 - 4 * part**2)
        direction, normal = np.array([cos(heading), sin(heading)]), np.array([-sin(heading), cos(heading)])
        points = _point(plane, rng) + forward[:, None] * direction + sideways[:, None] * normal
        width_px = _width_px(plane, rng, 0.002, 0.01)
        gap = int(rng.integers(2, 8))
        pieces = (points[:gap], points[gap:]) if rng.random() < 0.5 else (points,)
        for piece in pieces:
            _line(plane, piece, width_px)


def _draw_spots(plane: _Plane, rng: np.random.Generator) -> None:
    side = _side_px(plane)
    for _ in range(int(rng.integers(5, 31))):
        x, y = _point(plane, rng)
        long_px = side * 0.002 * 8 ** rng.random()
        axes = (max(0, round(long_px)), max(0, round(long_px * rng.uniform(0.4, 1.0))))
        cv2.ellipse(plane, (int(x), int(y)), axes, rng.uniform(0, 180), 0, 360, color=1, thickness=-1)


# every kind with its weight in the Dirichlet draw of a mask's mix
_MIX: tuple[tuple[_Draw, float], ...] = (
    (_draw_stroke, 1.5),
    (_draw_crack, 0.7),
    (_draw_blob, 0.7),
    (_draw_corner, 0.2),
    (_draw_scratches, 0.4),
    (_draw_spots, 0.4),
)
