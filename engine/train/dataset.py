"""Training samples: seeded and pure, so that a run resumes at any step with the pictures it would have had.

Legend: B batch, H and W native pixels; tensors are (B, C, H, W) float32 in [0, 1].
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from zlib import crc32

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.errors import TrainingError
from engine.geometry import Size, ceil_div
from engine.models.cra_srgan.handover import reduce_known
from engine.train.colour import recoloured
from engine.train.damage import damage_mask, film_mask
from engine.train.degradation import degraded
from engine.train.overlays import Overlays, overlaid
from engine.train.sources import Encoded
from engine.train.stages import Draw, Stage

FILM, MOST_FILM = 0.15, 0.5
"""Share of the masks that are films' artefacts, and the most of a picture that these may cover."""
MOST_DECODED_BYTES = 2 << 30
"""Of the pictures that a process keeps decoded."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DamagedBatch:
    """Crops with holes, for the inpainting and the joint stage."""

    intact: Tensor
    """(B, 3, H, W) what should come out at scale 1."""
    missing: Tensor
    """(B, 1, H, W) 1 where a pixel is missing."""
    known_mean: Tensor
    """(B, 3, H / factor, W / factor)"""
    share: Tensor
    """(B, 1, H / factor, W / factor) share of missing native pixels."""
    factor: int
    """Native pixels per guide pixel."""
    above: list[Tensor]
    """The same crops at x2, x4 ... of the native size; empty where only inpainting is trained."""
    window_px: tuple[int, int]
    """(y, x) of the window the local half is trained on: a multiple of 8, with as much of the holes as was found."""

    def to(self, device: torch.device) -> "DamagedBatch":
        """The same batch on another device."""
        intact, missing = self.intact.to(device), self.missing.to(device)
        mean, share = self.known_mean.to(device), self.share.to(device)
        above = [target.to(device) for target in self.above]
        return DamagedBatch(intact, missing, mean, share, self.factor, above, self.window_px)


@dataclass(frozen=True, slots=True)
class ScaleBatch:
    """Intact crops at the input's size and at every size above it."""

    low: Tensor
    """(B, 3, H, W), rounded to 8 bits as a scan would be; or what bad copies have of them."""
    levels: list[Tensor]
    """(B, 3, 2 H, 2 W), (B, 3, 4 H, 4 W) ... each reduced from the original by antialiased bicubic."""

    def to(self, device: torch.device) -> "ScaleBatch":
        """The same batch on another device."""
        return ScaleBatch(self.low.to(device), [target.to(device) for target in self.levels])


@dataclass(frozen=True, slots=True)
class OverlaidBatch:
    """Crops on which hair, dust or scratches may lie, or of which parts are gone."""

    picture: Tensor
    """(B, 3, H, W)"""
    damaged: Tensor
    """(B, 1, H, W) 1 where it is damaged."""

    def to(self, device: torch.device) -> "OverlaidBatch":
        """The same batch on another device."""
        return OverlaidBatch(self.picture.to(device), self.damaged.to(device))


Batch = DamagedBatch | ScaleBatch | OverlaidBatch
"""What a step is made on; all kinds go to another device."""


class Pictures:
    """Training pictures, each decoded on first use and kept as long as there is room."""

    def __init__(
        self, found: Sequence[Encoded], *, overlays: Overlays | None = None, most_bytes: int = MOST_DECODED_BYTES
    ) -> None:
        """most_bytes: of those that stay decoded. Raises TrainingError where there are no pictures."""
        if not found:
            raise TrainingError("0 training pictures found, at least 1 needed; give --data a folder with pictures")
        self._found, self._most_bytes = found, most_bytes
        self._decoded: OrderedDict[int, Pixels] = OrderedDict()
        self._decoded_bytes = 0
        self._sides_px: dict[int, int] = {}
        self.overlays = Overlays([]) if overlays is None else overlays

    def __len__(self) -> int:
        return len(self._found)

    def short_side_px(self, index: int) -> int:
        if index not in self._sides_px:
            self._sides_px[index] = min(self[index].shape[:2])
        return self._sides_px[index]

    def __getitem__(self, index: int) -> Pixels:
        """(h, w, 3)"""
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        rgb = np.ascontiguousarray(self._found[index].decode(cv2.IMREAD_COLOR)[..., ::-1])
        self._decoded[index] = rgb
        self._decoded_bytes += rgb.nbytes
        while self._decoded_bytes > self._most_bytes and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return rgb


def batch_of(pictures: Pictures, stage: Stage, *, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
    """The batch of a step: the same whoever asks, whenever. Of several processes each has a part of its own."""
    number = crc32(stage.name.encode())  # keeps the stages' samples apart
    draw = _draw(stage, np.random.default_rng((seed, number, step, 1)))
    mine = (seed, number, step) if world == 1 else (seed, number, step, 2 + rank)
    return batch_from(pictures, stage, draw, seed=mine, size=ceil_div(draw.batch, world))


def batch_from(pictures: Pictures, stage: Stage, draw: Draw, *, seed: tuple[int, ...], size: int) -> Batch:
    """One of the kinds that a stage draws, of so many crops."""
    if stage.task == "detection":
        return overlaid_batch(pictures, seed=seed, batch=size, side_px=draw.side_px)
    if draw.factor == 0:
        return scale_batch(pictures, seed=seed, batch=size, low_px=draw.side_px, levels=draw.levels, bad=stage.degraded)
    return damaged_batch(
        pictures,
        seed=seed,
        batch=size,
        guide_px=draw.side_px,
        factor=draw.factor,
        window_px=stage.window_px,
        levels=draw.levels,
    )


def _draw(stage: Stage, rng: np.random.Generator) -> Draw:
    return stage.draws[int(rng.choice(len(stage.draws), p=[draw.probability for draw in stage.draws]))]


def crop_of(pictures: Pictures, rng: np.random.Generator, side_px: int, *, max_reduction: float) -> Pixels:
    """A square crop (side, side, 3), turned, mirrored and recoloured at random, reduced by up to `max_reduction`.

    Of a picture that is large enough: what is enlarged shows no detail to learn. Raises TrainingError.
    """
    picture = _large_enough(pictures, rng, side_px)
    h, w = int(picture.shape[0]), int(picture.shape[1])
    limit = max(1.0, min(max_reduction, min(h, w) / side_px))
    read_px = min(round(side_px * rng.uniform(1.0, limit)), h, w)
    y, x = int(rng.integers(h - read_px + 1)), int(rng.integers(w - read_px + 1))
    out: NDArray[np.uint8] = picture[y : y + read_px, x : x + read_px]
    if read_px != side_px:
        out = cv2.resize(out, (side_px, side_px), interpolation=cv2.INTER_AREA).astype(np.uint8)
    out = np.rot90(out, int(rng.integers(4)))
    return recoloured(np.ascontiguousarray(out[:, ::-1] if rng.random() < 0.5 else out), rng)


def _large_enough(pictures: Pictures, rng: np.random.Generator, side_px: int) -> Pixels:
    for index in rng.permutation(len(pictures)).tolist():
        if pictures.short_side_px(index) >= side_px:
            return pictures[index]
    raise TrainingError(
        f"0 of {len(pictures)} pictures hold a crop of {side_px} px; give larger ones, or a recipe with smaller crops"
    )


def to_tensor(crops: list[Pixels]) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, h, w) float32 in [0, 1]."""
    return torch.as_tensor(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def damaged_batch(
    pictures: Pictures,
    *,
    seed: tuple[int, ...],
    batch: int,
    guide_px: int,
    factor: int,
    window_px: int,
    levels: int = 0,
) -> DamagedBatch:
    """Crops of `guide_px * factor` pixels with 3 to 50 % of their pixels missing, or what a film's artefacts cover."""
    rng = np.random.default_rng(seed)
    side_px = guide_px * factor
    high = to_tensor([crop_of(pictures, rng, side_px << levels, max_reduction=2.5) for _ in range(batch)])
    low = float(rng.choice([0.03, 0.12, 0.27], p=[0.15, 0.45, 0.4]))
    masks = [_mask(pictures.overlays, Size(side_px, side_px), rng, (low, 1.8 * low)) for _ in range(batch)]
    intact = (reduce_bicubic(high, 1 << levels) * 255).round() / 255
    missing = torch.as_tensor(np.stack(masks))[:, None].float()
    known_mean, share = reduce_known(intact, missing, factor)
    window = _window(missing, rng, min(window_px, side_px))
    return DamagedBatch(intact, missing, known_mean, share, factor, _ladder(high, levels), window)


def _mask(overlays: Overlays, size: Size, rng: np.random.Generator, share: tuple[float, float]) -> NDArray[np.bool_]:
    """Drawn shapes, or what lies under a film's artefacts, where there are such, and leaves most of the picture."""
    seed = int(rng.integers(2**31))
    if len(overlays) and rng.random() < FILM:
        mask = film_mask(overlays.draw(rng), size, seed=seed)
        if 0 < mask.mean() < MOST_FILM:
            return mask
    return damage_mask(size, seed=seed, share=share)


def _ladder(high: Tensor, levels: int) -> list[Tensor]:
    """The targets at x2, x4 ... x(2 ** levels) of pictures that are `high` at the last."""
    return [reduce_bicubic(high, 1 << (levels - level)) for level in range(1, levels + 1)]


def _window(missing: Tensor, rng: np.random.Generator, window_px: int) -> tuple[int, int]:
    """The best of four random windows by missing pixels, on the grid of 8 px."""
    room = (missing.shape[-1] - window_px) // 8 + 1
    places = [(8 * int(rng.integers(room)), 8 * int(rng.integers(room))) for _ in range(4)]
    return max(places, key=lambda p: float(missing[..., p[0] : p[0] + window_px, p[1] : p[1] + window_px].sum()))


def reduce_bicubic(picture: Tensor, factor: int) -> Tensor:
    """Antialiased bicubic reduction: the operator of the `clean` cards."""
    if factor == 1:
        return picture
    size = (picture.shape[-2] // factor, picture.shape[-1] // factor)
    return F.interpolate(picture, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def overlaid_batch(pictures: Pictures, *, seed: tuple[int, ...], batch: int, side_px: int) -> OverlaidBatch:
    """Crops of `side_px` pixels, most of them damaged."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Pixels, NDArray[np.bool_]]] = []
    for _ in range(batch):
        enlarged = float(rng.choice([1.0, 4.0 ** rng.random()]))
        crop = crop_of(pictures, rng, ceil(side_px / enlarged), max_reduction=2.5)
        found.append(overlaid(crop, side_px, pictures.overlays, rng))
    damaged = torch.as_tensor(np.stack([mask for _, mask in found]))[:, None].float()
    return OverlaidBatch(to_tensor([picture for picture, _ in found]), damaged)


def scale_batch(
    pictures: Pictures, *, seed: tuple[int, ...], batch: int, low_px: int, levels: int, bad: bool = False
) -> ScaleBatch:
    """Crops of `low_px` pixels and their targets at x2 ... x(2 ** levels). `bad`: of copies of the crops."""
    rng = np.random.default_rng(seed)
    side_px = low_px << levels
    crops = [crop_of(pictures, rng, side_px, max_reduction=1.5) for _ in range(batch)]
    high = to_tensor(crops)
    if bad:
        low = to_tensor([degraded(crop, (low_px, low_px), rng) for crop in crops])
    else:
        low = (reduce_bicubic(high, 1 << levels) * 255).round() / 255
    return ScaleBatch(low, _ladder(high, levels))
