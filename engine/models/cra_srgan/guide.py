"""The global half: one pass over the whole picture at guide resolution (at most 512 px a side).

Legend: B batch, h and w pixels of the guide. Pictures are (B, 3, h, w) in [0, 1]; `share` is (B, 1, h, w), the share
of native pixels missing under each guide pixel: 0 is known, 1 is a hole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import round_up
from engine.models.cra_srgan.attention import CELL_PX, AttentionRows, MultiScaleContextualAttention
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.layers import GatedConv, zero_

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
        for _ in range(JACOBI_STEPS):
            padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
            mean = (padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]) / 4
            filled = torch.where(weight > 0, value, mean)
    return filled


class CoarseNet(nn.Module):
    """Gated U-Net with dilated convolutions in the middle (Yi et al. 2020, section 3.2): a first residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.at_full = nn.Sequential(GatedConv(4, w), GatedConv(w, w))
        self.at_half = nn.Sequential(GatedConv(w, 2 * w, stride=2), GatedConv(2 * w, 2 * w))
        self.at_quarter = nn.Sequential(
            GatedConv(2 * w, 4 * w, stride=2),
            *(GatedConv(4 * w, 4 * w, dilation=dilation) for dilation in (2, 4, 8)),
        )
        self.up_half = GatedConv(6 * w, 2 * w)
        self.up_full = GatedConv(3 * w, w)
        self.leave = zero_(nn.Conv2d(w, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        full = self.at_full(x)
        half = self.at_half(full)
        deep = self.at_quarter(half)
        half = self.up_half(torch.cat([_enlarge(deep, half), half], 1))
        full = self.up_full(torch.cat([_enlarge(half, full), full], 1))
        return self.leave(full)


class RefineNet(nn.Module):
    """Gated encoder to cells of 8 px, contextual attention between cells, decoder: a second residual and features."""

    def __init__(self, width: int, guide_channels: int, *, multi_scale: bool) -> None:
        super().__init__()
        w = width
        self.at_full = GatedConv(7, w)
        self.at_half = nn.Sequential(GatedConv(w, 2 * w, stride=2), GatedConv(2 * w, 2 * w))
        self.at_quarter = GatedConv(2 * w, 3 * w, stride=2)
        self.at_eighth = nn.Sequential(
            GatedConv(3 * w, 4 * w, stride=2), GatedConv(4 * w, 4 * w, dilation=2), GatedConv(4 * w, 4 * w, dilation=4)
        )
        sizes = (3, 5, 7) if multi_scale else (3,)
        self.attention = MultiScaleContextualAttention(4 * w, patch_sizes=sizes)
        self.merge = GatedConv(8 * w, 4 * w)
        self.up_quarter = GatedConv(7 * w, 3 * w)
        self.up_half = GatedConv(5 * w, 2 * w)
        self.up_full = GatedConv(3 * w, w)
        self.leave = zero_(nn.Conv2d(w, 3, 3, padding=1))
        self.features = nn.Conv2d(w, guide_channels, 1)

    def forward(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[AttentionRows]]:
        full = self.at_full(x)
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        cells = self.at_eighth(quarter)
        attended, rows = self.attention(cells, F.avg_pool2d(share, CELL_PX))
        deep = self.merge(torch.cat([cells, attended], 1))
        quarter = self.up_quarter(torch.cat([_enlarge(deep, quarter), quarter], 1))
        half = self.up_half(torch.cat([_enlarge(quarter, half), half], 1))
        full = self.up_full(torch.cat([_enlarge(half, full), full], 1))
        return self.leave(full), self.features(full), rows


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class GlobalHalf(nn.Module):
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
        residual = self.coarse(torch.cat([base - 0.5, share], 1)).float()
        coarse = torch.where(hole > 0, base + residual, base)
        residual, features, rows = self.refine(torch.cat([coarse - 0.5, share, base - 0.5], 1), share)
        fill = torch.where(hole > 0, coarse + residual.float(), coarse)
        inner = (..., slice(0, h), slice(0, w))
        return GlobalPass(base[inner], coarse[inner], fill[inner], features[inner], rows)
