"""Damage that lies on a picture and can be seen: what films and prints collect, and what is gone from them.

Films' artefacts come from a folder of pictures with an alpha channel, such as FilmDamageSimulator's: its alpha says how
much each pixel is covered. Cracks, scratches, spots and torn corners are drawn. Seeded and pure. Pictures are (h, w, 3)
uint8, masks (h, w) bool, covers (h, w) float32 in [0, 1].
"""

from collections.abc import Sequence
from math import cos, pi, sin

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.errors import TrainingError
from engine.geometry import Size
from engine.train import damage
from engine.train.colour import LUMA
from engine.train.degradation import compressed
from engine.train.sources import Encoded

COVERED = 0.1
"""From this cover on a pixel counts as damaged."""
_CLEAN, _DRAWN = 0.15, 0.25
"""Shares of the pictures on which nothing lies, and of the covers that are drawn."""
_MOST_COVERED = 0.3
"""Of a picture, by one artefact."""
_GREY, _COPIED = 0.3, 0.4
_DRAWN_KINDS = (damage.cracks, damage.scratches, damage.spots, damage.blobs, damage.missing_corner)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Overlays:
    """The covers of pictures with an alpha channel, each decoded on first use; the folder is the kind."""

    def __init__(self, found: Sequence[Encoded]) -> None:
        self._found = found
        kinds = [one.name.rpartition("/")[0] for one in found]
        self._of_kind = [[n for n, of in enumerate(kinds) if of == kind] for kind in sorted(set(kinds))]
        self._decoded: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self._found)

    def draw(self, rng: np.random.Generator) -> Pixels:
        """(h, w) uint8 of one: every other time of any, else of a kind, and then of those of that kind."""
        if rng.random() < 0.5:
            index = int(rng.integers(len(self._found)))
        else:
            index = int(rng.choice(self._of_kind[int(rng.integers(len(self._of_kind)))]))
        if index not in self._decoded:
            rgba = self._found[index].decode(cv2.IMREAD_UNCHANGED)
            if rgba.ndim != 3 or rgba.shape[2] != 4:
                raise TrainingError(
                    f"{self._found[index].name}: {rgba.shape[2:] or 1} channels instead of 4, of which the last is the "
                    "cover; remove it"
                )
            self._decoded[index] = np.ascontiguousarray(rgba[..., 3])
        return self._decoded[index]


def overlaid(picture: Pixels, side_px: int, overlays: Overlays, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """A picture with damage on it, enlarged to `side_px`, and where that is."""
    x = picture.astype(np.float32)
    if rng.random() < _GREY:
        x = np.repeat(x @ LUMA, 3).reshape(x.shape)
    cover = np.zeros(x.shape[:2], np.float32)
    if rng.random() >= _CLEAN:
        for _ in range(1 + int(rng.poisson(0.7))):
            if len(overlays) == 0 or rng.random() < _DRAWN:
                mine, colour = _drawn(cover.shape, rng), _solid(rng)
            else:
                mine, colour = _placed(overlays.draw(rng), cover.shape, rng), _film(rng)
            if np.mean(mine > COVERED) > _MOST_COVERED:  # nothing is left that it could be told from
                continue
            x += mine[..., None] * (colour - x)
            cover = np.maximum(cover, mine)
    if len(x) != side_px:
        size = (side_px, side_px)
        way = cv2.INTER_CUBIC if rng.random() < 0.7 else cv2.INTER_LINEAR
        x = cv2.resize(x, size, interpolation=way).astype(np.float32)
        cover = cv2.resize(cover, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
    if rng.random() < _COPIED:
        x = _copied(x, rng)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8), cover > COVERED


def _placed(cover: Pixels, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """An artefact turned, scaled and shifted so that some of it lies in a crop of this shape."""
    factor = 0.6 * 5.0 ** rng.random()
    flipped = np.ascontiguousarray(cover[:, :: int(rng.choice([-1, 1]))])
    if factor < 1:
        flipped = cv2.resize(flipped, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        factor = 1.0
    angle = rng.uniform(0, 2 * pi)
    turn = factor * np.array([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]])
    ys, xs = np.nonzero(flipped > COVERED * 255)
    if len(ys) == 0:
        return np.zeros(shape[:2], np.float32)
    chosen = int(rng.integers(len(ys)))
    h, w = shape[:2]
    shift = rng.uniform(0, 1, 2) * (w, h) - turn @ np.array([xs[chosen], ys[chosen]])
    placed = cv2.warpAffine(flipped, np.column_stack([turn, shift]), (w, h), flags=cv2.INTER_LINEAR)
    return (placed.astype(np.float32) / 255 * np.float32(rng.uniform(0.8, 1.0))).astype(np.float32)


def _film(rng: np.random.Generator) -> Floats:
    """The colour of an artefact: white on prints, black where the film itself is seen, seldom another."""
    kind = rng.random()
    if kind < 0.7:
        return np.full(3, rng.uniform(225, 255), np.float32)
    if kind < 0.9:
        return np.full(3, rng.uniform(0, 40), np.float32)
    return rng.uniform(0, 255, 3).astype(np.float32)


def _drawn(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """A crack, scratches, spots, a stain or a torn corner, with an edge of a pixel or two."""
    kind = _DRAWN_KINDS[int(rng.integers(len(_DRAWN_KINDS)))]
    mask = kind(Size(*shape[:2]), seed=int(rng.integers(2**31))).astype(np.float32)
    sigma = float(rng.uniform(0.0, 1.2))
    return mask if sigma < 0.3 else cv2.GaussianBlur(mask, (0, 0), sigma).astype(np.float32)


def _solid(rng: np.random.Generator) -> Floats:
    """The colour of what is gone: saturated, for only that can be told from the picture."""
    return np.full(3, float(rng.choice([255.0, 0.0])), np.float32)


def _copied(x: Floats, rng: np.random.Generator) -> Floats:
    """A little noise, faded contrast, JPEG."""
    x = x * np.float32(rng.uniform(0.75, 1.0)) + np.float32(rng.uniform(0, 40))
    x = x + rng.normal(0, rng.uniform(0, 6), x.shape).astype(np.float32)
    return compressed(x, int(rng.integers(60, 99)))
