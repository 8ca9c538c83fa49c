"""One training step per task, as functions of a network and a batch. No Ray, no files, no optimiser.

Every function returns the scalar loss and what to log. Tensors are (B, C, H, W) in [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.geometry import ceil_div
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.guide import GlobalPass, harmonic_fill
from engine.models.cra_srgan.handover import RATIO_LIMIT, aggregate, balanced, contrast, detail_gain, with_ratio
from engine.train import losses
from engine.train.dataset import DamagedBatch, ScaleBatch
from engine.train.stages import LossWeights

Logs = dict[str, float]


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Guide pixels sampled at native pixels (bilinear, pixel centres)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def enlarge_window(x: Tensor, factor: int, origin: tuple[int, int], side_px: int) -> Tensor:
    """`enlarge(x, factor)` on a window of `side_px` native pixels at `origin`, without the rest."""
    spans = [
        (max(0, start // factor - 1), min(length, ceil_div(start + side_px, factor) + 1), start)
        for start, length in zip(origin, x.shape[-2:], strict=True)
    ]
    (top, bottom, y), (left, right, x0) = spans
    enlarged = enlarge(x[..., top:bottom, left:right], factor)
    y, x0 = y - top * factor, x0 - left * factor
    return enlarged[..., y : y + side_px, x0 : x0 + side_px]


def coarse_loss(network: CraSrgan, batch: DamagedBatch, weights: LossWeights, _window_px: int) -> tuple[Tensor, Logs]:
    """Loss on the coarse fill alone: trained beside the refine network from the start, the coarse one falls silent."""
    hole = (batch.share >= 1).float()
    base = harmonic_fill(batch.known_mean, hole)
    coarse = base + hole * network.guide.coarse(base, batch.share)
    error = losses.hole_error(coarse, F.avg_pool2d(batch.intact, batch.factor), hole, base)
    return weights.hole * error, {"coarse": float(error.detach())}


def inpainting_loss(
    network: CraSrgan, batch: DamagedBatch, weights: LossWeights, window_px: int
) -> tuple[Tensor, Logs]:
    """Loss on the coarse fill, the refined fill and the composite (stage 1)."""
    found = network.guide(batch.known_mean, batch.share)
    window = composite_window(network, batch, found, window_px)
    return _inpainting_loss(batch, found, window, weights)


def joint_loss(network: CraSrgan, batch: DamagedBatch, weights: LossWeights, window_px: int) -> tuple[Tensor, Logs]:
    """The inpainting loss, and that of every level grown from the composite (stage 3)."""
    found = network.guide(batch.known_mean, batch.share)
    window = composite_window(network, batch, found, window_px)
    loss, logs = _inpainting_loss(batch, found, window, weights)
    y, x = batch.window_px
    above = [
        target[..., y << level : (y + window_px) << level, x << level : (x + window_px) << level]
        for level, target in enumerate(batch.above, start=1)
    ]
    scale_loss, scale_logs = _levels_loss(network, window.composite, above, weights, window.guide, window.missing)
    return loss + scale_loss, logs | scale_logs


def super_resolution_loss(network: CraSrgan, batch: ScaleBatch, weights: LossWeights) -> tuple[Tensor, Logs]:
    """Loss on every level (stage 2); the learned null stands in for the guide."""
    b, _, h, w = batch.low.shape
    guide = network.local.null_guide.expand(b, -1, h, w)
    return _levels_loss(network, batch.low, batch.levels, weights, guide, batch.low.new_zeros(b, 1, h, w))


@dataclass(frozen=True, slots=True)
class Window:
    """What the local half sees and should give on the batch's window, (B, C, window_px, window_px)."""

    composite: Tensor
    wanted: Tensor
    missing: Tensor
    guide: Tensor
    base: Tensor
    """The harmonic fill, enlarged."""


def composite_window(network: CraSrgan, batch: DamagedBatch, found: GlobalPass, window_px: int) -> Window:
    """The scale-1 output on the batch's window."""
    y, x = batch.window_px
    inner = (..., slice(y, y + window_px), slice(x, x + window_px))
    pixels, missing = batch.intact[inner], batch.missing[inner]
    base, fill, features = (
        enlarge_window(part, batch.factor, batch.window_px, window_px)
        for part in (found.base, found.fill, with_ratio(found.features.float(), batch.factor))
    )
    detail = _borrowed_detail(batch, found)[inner] if detail_gain(batch.factor) else torch.zeros_like(fill)
    composite = network.local.head(pixels * (1 - missing), missing, fill, detail, features)
    return Window(composite.float(), pixels, missing, features, base)


def _borrowed_detail(batch: DamagedBatch, found: GlobalPass) -> Tensor:
    """The aggregated residual of the whole batch, (B, 3, H, W), weighted as the restoration weights it."""
    reference = torch.where(batch.share < 1, batch.known_mean, found.fill.detach())
    residual = (batch.intact - enlarge(reference, batch.factor)) * (1 - batch.missing)
    variance = contrast(batch.intact, batch.missing, batch.factor)
    rows = [
        balanced(row, variance[i : i + 1], batch.share[i : i + 1], harmonic_fill) for i, row in enumerate(found.rows)
    ]
    return detail_gain(batch.factor) * aggregate(residual, rows, batch.factor) * batch.missing


def _inpainting_loss(
    batch: DamagedBatch, found: GlobalPass, window: Window, weights: LossWeights
) -> tuple[Tensor, Logs]:
    hole = (batch.share >= 1).float()
    target = F.avg_pool2d(batch.intact, batch.factor)
    coarse = losses.hole_error(found.coarse, target, hole, found.base)
    fill = losses.hole_error(found.fill, target, hole, found.base)
    composite = _composite_error(window, batch.factor)
    loss = weights.hole * (0.5 * coarse + fill + composite)
    if weights.edge and batch.factor < RATIO_LIMIT - 1:
        loss = loss + weights.edge * losses.edge(window.composite, window.wanted)
    return loss, {
        "coarse": float(coarse.detach()),
        "fill": float(fill.detach()),
        "composite": float(composite.detach()),
    }


def _composite_error(window: Window, factor: int) -> Tensor:
    """From ratio 3 on only what the guide could know is judged: borrowed texture may differ from the lost one."""
    parts = (window.composite, window.wanted, window.missing, window.base)
    if factor >= RATIO_LIMIT - 1:
        side = window.composite.shape[-1] // factor * factor
        parts = tuple(F.avg_pool2d(part[..., :side, :side], factor) for part in parts)
    composite, wanted, missing, base = parts
    return losses.hole_error(composite, wanted, (missing > 0).float(), base)


def _levels_loss(
    network: CraSrgan, picture: Tensor, targets: list[Tensor], weights: LossWeights, guide: Tensor, missing: Tensor
) -> tuple[Tensor, Logs]:
    features, picture = network.local.encode(picture, missing, guide, len(targets))
    loss = picture.new_zeros(())
    logs: Logs = {}
    found = network.local.decode(features, picture, len(targets))
    for level, (output, wanted) in enumerate(zip(found, targets, strict=True), start=1):
        pixel = losses.charbonnier(output, wanted)
        loss = loss + weights.pixel * pixel
        if weights.edge:
            loss = loss + weights.edge * losses.edge(output, wanted)
        if weights.frequency:
            loss = loss + weights.frequency * losses.frequency(output, wanted)
        logs[f"x{1 << level}"] = float(pixel.detach())
    return loss, logs
