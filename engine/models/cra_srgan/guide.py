"""The global half: one pass over the whole picture at guide resolution (at most 512 px a side).

Legend: B batch, h and w pixels of the guide. Pictures are (B, 3, h, w) in [0, 1]; `share` is (B, 1, h, w), the share
of native pixels missing under each guide pixel: 0 is known, 1 is a hole.
"""

from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import round_up
from engine.models.cra_srgan.attention import CELL_PX, AttentionRows, MultiScaleContextualAttention
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.layers import RESIDUAL_UNIT, GatedConv, GatedResidual, Recomputing, centred, zero_

JACOBI_STEPS = 16


@dataclass(frozen=True, slots=True)
class GlobalPass:
    """What the global half says of a picture."""

    base: Tensor
    """(B, 3, h, w) harmonic fill, what the networks start from."""
    coarse: Tensor
    """(B, 3, h, w)"""
    fill: Tensor
    """(B, 3, h, w) known pixels as given, holes refined."""
    features: Tensor
    """(B, G, h, w)"""
    rows: list[AttentionRows]
    """One per picture, on the grid of cells of `CELL_PX`."""


def harmonic_fill(picture: Tensor, hole: Tensor) -> Tensor:
    """Holes filled by a smooth surface: masked means downwards, then Laplace's equation upwards.

    picture (B, 3, h, w), hole (B, 1, h, w) of 0 and 1. At each level, coarse to fine, the hole starts from the
    level below and takes 16 Jacobi steps.
    """
    known = 1 - hole
    levels = [(picture * known, known)]
    while max(levels[-1][0].shape[-2:]) > 1:
        value, weight = levels[-1]
        total = F.avg_pool2d(value * weight, 2, ceil_mode=True)
        share = F.avg_pool2d(weight, 2, ceil_mode=True)
        levels.append((total / share.clamp(min=1e-8), (share > 0).to(share.dtype)))
    filled = levels[-1][0]
    for value, weight in reversed(levels[:-1]):
        below = F.interpolate(filled, size=value.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, value, below)
        around = _around_holes(weight)
        if around is not None:
            relaxed = _relaxed(filled[around], weight[around])
            filled = filled.clone()
            filled[around] = relaxed
    return filled


def _around_holes(weight: Tensor) -> tuple[EllipsisType, slice, slice] | None:
    """The smallest box of all pixels of weight 0 and their neighbours; None where there are none."""
    missing = (weight <= 0).any(0).any(0)
    rows, columns = missing.any(1).nonzero(), missing.any(0).nonzero()
    if not len(rows):
        return None
    ys, xs = (slice(max(0, int(at[0]) - 1), int(at[-1]) + 2) for at in (rows, columns))
    return ..., ys, xs


def _relaxed(filled: Tensor, weight: Tensor) -> Tensor:
    """16 Jacobi steps where the weight is 0. Beyond the borders lies what lies on them."""
    value = filled
    for _ in range(JACOBI_STEPS):
        padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        mean = (padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]) / 4
        filled = torch.where(weight > 0, value, mean)
    return filled


class GatedUNet(nn.Module):
    """Gated encoder from blocks of 2x2 pixels to cells of 8 px, dilated there, and a decoder back."""

    def __init__(self, inputs: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        half, quarter, eighth = widths
        self.at_half = nn.Sequential(GatedConv(4 * inputs, half), GatedResidual(half))
        self.at_quarter = nn.Sequential(
            GatedConv(half, quarter, stride=2), GatedResidual(quarter), GatedResidual(quarter)
        )
        self.at_eighth = nn.Sequential(
            GatedConv(quarter, eighth, stride=2), *(GatedResidual(eighth, dilation=d) for d in (2, 4, 8))
        )
        self.up_quarter = nn.Sequential(GatedConv(eighth + quarter, quarter), GatedResidual(quarter))
        self.up_half = nn.Sequential(GatedConv(quarter + half, half), GatedResidual(half))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) → features at a half, a quarter and an eighth of its size; h and w are multiples of 8."""
        half = self.at_half(F.pixel_unshuffle(x, 2))
        quarter = self.at_quarter(half)
        return half, quarter, self.at_eighth(quarter)

    def decode(self, half: Tensor, quarter: Tensor, eighth: Tensor) -> Tensor:
        """Features at half the size of the picture."""
        quarter = self.up_quarter(torch.cat([_enlarge(eighth, quarter), quarter], 1))
        return self.up_half(torch.cat([_enlarge(quarter, half), half], 1))


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class CoarseNet(nn.Module):
    """A first residual over the harmonic fill (Yi et al. 2020, section 3.2)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = GatedUNet(4, widths)
        self.leave = zero_(nn.Conv2d(widths[0], 4 * 3, 3, padding=1))

    def forward(self, picture: Tensor, share: Tensor) -> Tensor:
        found = self.net.decode(*self.net.encode(torch.cat([centred(picture), share], 1)))
        return RESIDUAL_UNIT * F.pixel_shuffle(self.leave(found), 2).float()


class RefineNet(nn.Module):
    """A second residual, with contextual attention between cells, and the features the tiles ask."""

    def __init__(self, widths: tuple[int, int, int], guide_channels: int, *, multi_scale: bool) -> None:
        super().__init__()
        self.net = GatedUNet(7, widths)
        sizes = (3, 5, 7) if multi_scale else (3,)
        self.attention = MultiScaleContextualAttention(widths[2], patch_sizes=sizes)
        self.merge = GatedConv(2 * widths[2], widths[2])
        self.leave = zero_(nn.Conv2d(widths[0], 4 * 3, 3, padding=1))
        self.features = zero_(nn.Conv2d(widths[0], 4 * guide_channels, 1))

    def forward(self, coarse: Tensor, share: Tensor, base: Tensor) -> tuple[Tensor, Tensor, list[AttentionRows]]:
        half, quarter, cells = self.net.encode(torch.cat([centred(coarse), share, centred(base)], 1))
        attended, rows = self.attention(cells, F.avg_pool2d(share, CELL_PX))
        found = self.net.decode(half, quarter, cells + self.merge(torch.cat([cells, attended], 1)))
        residual = RESIDUAL_UNIT * F.pixel_shuffle(self.leave(found), 2).float()
        return residual, F.pixel_shuffle(self.features(found), 2), rows


class GlobalHalf(Recomputing, nn.Module):
    """Coarse fill, refined fill, attention rows and features of the whole picture."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.coarse = CoarseNet(config.coarse_channels)
        self.refine = RefineNet(config.refine_channels, config.guide_channels, multi_scale=config.multi_scale)

    def forward(self, picture: Tensor, share: Tensor) -> GlobalPass:
        """`picture` holds the mean of the known native pixels; where `share` is 1 its values are ignored."""
        h, w = picture.shape[-2:]
        pad = (0, round_up(w, CELL_PX) - w, 0, round_up(h, CELL_PX) - h)
        picture, share = F.pad(picture, pad, mode="replicate"), F.pad(share, pad, mode="replicate")
        hole = (share >= 1).to(picture.dtype)
        base = harmonic_fill(picture.float(), hole.float())
        coarse = base + hole * self.part(self.coarse, base, share)
        residual, features, rows = self.part(self.refine, coarse, share, base)
        fill = coarse + hole * residual
        inner = (..., slice(0, h), slice(0, w))
        return GlobalPass(base[inner], coarse[inner], fill[inner], features[inner], rows)
