"""What passes between the global and the local half, as plain tensor arithmetic.

Legend: f = native pixels per guide pixel (an integer); a native pixel i lies at guide coordinate (i + 0.5) / f - 0.5.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.cra_srgan.attention import CELL_PX, AttentionRows

RATIO_LIMIT = 4
"""Ratios above this one look the same to the network: it was trained up to here."""


def reduce_known(picture: Tensor, missing: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Mean of the known native pixels under each guide pixel (0 where none), and the share that is missing.

    picture (B, 3, H, W), missing (B, 1, H, W) of 0 and 1, H and W multiples of `factor`.
    """
    share = F.avg_pool2d(missing, factor)
    total = F.avg_pool2d(picture * (1 - missing), factor)
    return torch.where(share < 1, total / (1 - share).clamp(min=1e-6), torch.zeros_like(total)), share


def log_ratio(factor: int) -> float:
    """The ratio native / guide as the network sees it: 0 at 1, 1 at `RATIO_LIMIT` and above."""
    return math.log(min(factor, RATIO_LIMIT)) / math.log(RATIO_LIMIT)


def detail_gain(factor: int) -> float:
    """Weight of the aggregated residual: 0 up to ratio 2, 1 from `RATIO_LIMIT` on.

    At small ratios the fill already carries nearly all detail and a borrowed residual only adds error; at large
    ones it is the only source of texture.
    """
    return min(1.0, max(0.0, math.log2(factor) - 1))


def contrast(picture: Tensor, missing: Tensor, factor: int) -> Tensor:
    """Variance of the known native pixels under each guide pixel, mean of the channels: (B, 1, h, w)."""
    known = F.avg_pool2d(1 - missing, factor)
    weight = known.clamp(min=1e-6)
    mean = F.avg_pool2d(picture * (1 - missing), factor) / weight
    square = F.avg_pool2d(picture**2 * (1 - missing), factor) / weight
    return ((square - mean**2).clamp(min=0) * (known > 0)).mean(1, keepdim=True)


def balanced(
    rows: AttentionRows, variance: Tensor, share: Tensor, fill: Callable[[Tensor, Tensor], Tensor]
) -> AttentionRows:
    """Rows whose weights give each damaged cell the contrast of its surroundings.

    A weighted mean of k unrelated residuals loses contrast by about the root of k, and a smooth fill prefers smooth
    sources. So the variance of the known cells is spread into the hole (`fill`, as for colours), and each row is
    scaled to it, at most fourfold. variance, share: (1, 1, h, w) at guide size.
    """
    h, w = (-(-side // CELL_PX) * CELL_PX for side in variance.shape[-2:])
    pad = (0, w - variance.shape[-1], 0, h - variance.shape[-2])
    known = (share < 1).to(variance.dtype)
    total = F.avg_pool2d(F.pad(variance * known, pad, mode="replicate"), CELL_PX)
    count = F.avg_pool2d(F.pad(known, pad, mode="replicate"), CELL_PX)
    cells = fill(total / count.clamp(min=1e-6), (count <= 0).to(variance.dtype)).flatten()
    actual = (rows.weights**2 * cells[rows.sources]).sum(1)
    scale = torch.sqrt(cells[rows.cells] / actual.clamp(min=1e-9)).clamp(max=4)
    return AttentionRows(rows.cells, rows.sources, rows.weights * scale[:, None])


def with_ratio(features: Tensor, factor: int) -> Tensor:
    """Guide features (B, G, h, w) and the ratio as one more channel: what the local half calls the guide."""
    return torch.cat([features, torch.full_like(features[:, :1], log_ratio(factor))], 1)


def aggregate(residual: Tensor, rows: list[AttentionRows], factor: int) -> Tensor:
    """Residuals of the damaged cells, gathered by attention (Yi et al. 2020, section 3.4), in memory.

    residual (B, 3, H, W) with H and W multiples of the native cell. Zero in every cell without damage.
    """
    cell_px = CELL_PX * factor
    batch, _, height, width = residual.shape
    patches = F.unfold(residual, cell_px, stride=cell_px)
    gathered = torch.zeros_like(patches)
    for index in range(batch):
        row = rows[index]
        sources = patches[index][:, row.sources]  # (3 * cell * cell, Q, k)
        gathered[index, :, row.cells] = (sources * row.weights.to(sources.dtype)).sum(2)
    return F.fold(gathered, (height, width), cell_px, stride=cell_px)
