"""One training step per task, as functions of a network and a batch. No Ray, no files, no optimiser.

Every function returns what it `Found`. Tensors are (B, C, H, W) in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import Box, ceil_div
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.guide import GlobalPass, harmonic_fill
from engine.models.cra_srgan.handover import RATIO_LIMIT, aggregate, balanced, contrast, detail_gain, with_ratio
from engine.models.detector import Detector
from engine.train import losses
from engine.train.dataset import Batch, DamagedBatch, OverlaidBatch, ScaleBatch
from engine.train.discriminator import Discriminator
from engine.train.stages import LossWeights, Stage

Logs = dict[str, float]
Pixel = Callable[[Tensor, Tensor], Tensor]
PIXEL: dict[str, Pixel] = {"charbonnier": losses.charbonnier, "l1": losses.l1}


@dataclass(frozen=True, slots=True)
class Found:
    """What a step has found."""

    loss: Tensor
    """Scalar."""
    logs: Logs
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    """Pictures that were made and those wanted, the largest last: for losses on features, and for people."""


class Features(Protocol):
    """What perceptual and style losses compare."""

    def features(self, picture: Tensor) -> list[Tensor]: ...


class Objective(nn.Module):
    """The loss of a stage on a batch, as a module: what data-parallel training wraps. The critic is not part of it."""

    def __init__(
        self,
        network: CraSrgan | Detector,
        stage: Stage,
        *,
        critic: Discriminator | None = None,
        features: Features | None = None,
        teacher: CraSrgan | None = None,
    ) -> None:
        super().__init__()
        self.network, self._stage = network, stage
        self._others = critic, features  # a tuple: no modules of this one
        self._teachers = (teacher,)

    def forward(self, batch: Batch) -> Found:
        stage, network = self._stage, self.network
        if isinstance(batch, OverlaidBatch) or isinstance(network, Detector):
            assert isinstance(batch, OverlaidBatch)
            assert isinstance(network, Detector)
            return detection_loss(network, batch, stage.losses)
        if isinstance(batch, ScaleBatch):
            found = super_resolution_loss(
                network, batch, stage.losses, PIXEL[stage.pixel_loss], teacher=self._teachers[0]
            )
        elif stage.task == "head":
            found = head_loss(network, batch, stage.losses, stage.window_px, PIXEL[stage.pixel_loss])
        elif stage.task == "coarse":
            found = coarse_loss(network, batch, stage.losses)
        elif stage.task == "inpainting":
            found = inpainting_loss(network, batch, stage.losses, stage.window_px, PIXEL[stage.pixel_loss])
        else:
            found = joint_loss(network, batch, stage.losses, stage.window_px, PIXEL[stage.pixel_loss])
        return _judged(found, stage, *self._others)


def _judged(found: Found, stage: Stage, critic: Discriminator | None, features: Features | None) -> Found:
    """With the losses on features, and what the critic says of the largest pictures."""
    weights, loss, logs = stage.losses, found.loss, dict(found.logs)
    parts: list[tuple[str, Tensor]] = []
    seen: tuple[list[Tensor], list[Tensor]] | None = None
    if critic is not None:
        critic.requires_grad_(requires_grad=False)  # it learns nothing from what it says here
        seen = _seen(critic, found)
        fake, real = (critic.judged(one) for one in seen)
        critic.requires_grad_()
        parts.append(("adversarial", losses.deceive(real, fake, stage.adversarial)))
    if features is not None:
        mine, theirs = seen if seen is not None and features is critic else _seen(features, found)
        parts += [("perceptual", losses.perceptual(mine, theirs)), ("style", losses.style(mine, theirs))]
    for name, part in parts:
        loss = loss + getattr(weights, name) * part
        logs[name] = float(part.detach())
    return replace(found, loss=loss, logs=logs)


def _seen(features: Features, found: Found) -> tuple[list[Tensor], list[Tensor]]:
    """Of the largest pictures: those that were made, those that were wanted."""
    made, wanted = found.pairs[-1]
    mine = features.features(made)
    with torch.no_grad():
        return mine, features.features(wanted)


class Telling(nn.Module):
    """What the critic pays for telling pictures apart, as a module."""

    def __init__(self, critic: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.critic, self._stage = critic, stage

    def forward(self, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
        """`share`: (B, 1, 1, 1) of each real picture in the mixtures at which `wgan-gp` looks at the slope."""
        loss = losses.tell_apart(self.critic(real), self.critic(fake), self._stage.adversarial)
        if self._stage.adversarial == "wgan-gp":
            mixed = (share * real + (1 - share) * fake).requires_grad_()
            loss = loss + losses.gradient_penalty(self.critic(mixed), mixed)
        return loss


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Guide pixels sampled at native pixels (bilinear, pixel centres)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def enlarge_window(x: Tensor, factor: int, window: Box) -> Tensor:
    """`enlarge(x, factor)` on a window, in native pixels, without the rest."""
    h, w = x.shape[-2:]
    top, left = (max(0, start // factor - 1) for start in (window.y0, window.x0))
    bottom, right = (min(n, ceil_div(stop, factor) + 1) for n, stop in ((h, window.y1), (w, window.x1)))
    enlarged = enlarge(x[..., top:bottom, left:right], factor)
    return enlarged[(..., *window.shifted(-top * factor, -left * factor).slices)]


def coarse_loss(network: CraSrgan, batch: DamagedBatch, weights: LossWeights) -> Found:
    """Loss on the coarse fill alone: trained beside the refine network from the start, the coarse one falls silent."""
    hole = (batch.share >= 1).float()
    base = harmonic_fill(batch.known_mean, hole)
    coarse = base + hole * network.guide.coarse(base, batch.share)
    wanted = F.avg_pool2d(batch.intact, batch.factor)
    error = losses.hole_error(coarse, wanted, hole, base)
    return Found(weights.hole * error, {"coarse": float(error.detach())}, [(coarse, wanted)])


def head_loss(
    network: CraSrgan,
    batch: DamagedBatch,
    weights: LossWeights,
    window_px: int,
    pixel: Pixel = losses.charbonnier,
) -> Found:
    """Loss on the composite over the harmonic fill, as if the guide were silent: the head learns most of it alone."""
    base = harmonic_fill(batch.known_mean, (batch.share >= 1).float())
    features = base.new_zeros(len(base), network.config.guide_channels, *base.shape[-2:])
    silent = GlobalPass(base, base, base, features, [])
    window = composite_window(network, batch, silent, window_px)
    return _composite_loss(window, batch.factor, weights, pixel)


def inpainting_loss(
    network: CraSrgan,
    batch: DamagedBatch,
    weights: LossWeights,
    window_px: int,
    pixel: Pixel = losses.charbonnier,
) -> Found:
    """Loss on the coarse fill, the refined fill and the composite (stage 1)."""
    found = network.guide(batch.known_mean, batch.share)
    window = composite_window(network, batch, found, window_px)
    return _inpainting_loss(batch, found, window, weights, pixel)


def joint_loss(
    network: CraSrgan,
    batch: DamagedBatch,
    weights: LossWeights,
    window_px: int,
    pixel: Pixel = losses.charbonnier,
) -> Found:
    """The inpainting loss, and that of every level grown from the composite (stage 3)."""
    found = network.guide(batch.known_mean, batch.share)
    window = composite_window(network, batch, found, window_px)
    filled = _inpainting_loss(batch, found, window, weights, pixel)
    y, x = batch.window_px
    above = [
        target[..., y << level : (y + window_px) << level, x << level : (x + window_px) << level]
        for level, target in enumerate(batch.above, start=1)
    ]
    grown = _levels_loss(network, window.composite, above, weights, pixel, window.guide, window.missing)
    return Found(filled.loss + grown.loss, filled.logs | grown.logs, filled.pairs + grown.pairs)


def super_resolution_loss(
    network: CraSrgan,
    batch: ScaleBatch,
    weights: LossWeights,
    pixel: Pixel = losses.charbonnier,
    *,
    teacher: CraSrgan | None = None,
) -> Found:
    """Loss on every level (stage 2); the learned null stands in for the guide.

    teacher: whose pictures count beside the true ones (knowledge distillation, Hinton et al. 2015, section 2), where
    they are weighed.
    """
    b, _, h, w = batch.low.shape
    missing = batch.low.new_zeros(b, 1, h, w)
    guide = network.local.null_guide.expand(b, -1, h, w)
    found = _levels_loss(network, batch.low, batch.levels, weights, pixel, guide, missing)
    if not weights.taught:
        return found
    assert teacher is not None
    with torch.no_grad():
        features, picture = teacher.local.encode(
            batch.low, missing, teacher.local.null_guide.expand(b, -1, h, w), len(batch.levels)
        )
        shown = teacher.local.decode(features, picture, len(batch.levels))
    parts = [pixel(made, theirs) for (made, _), theirs in zip(found.pairs, shown, strict=True)]
    taught = torch.stack(parts).sum()
    return replace(
        found, loss=found.loss + weights.taught * taught, logs={**found.logs, "taught": float(taught.detach())}
    )


def detection_loss(network: Detector, batch: OverlaidBatch, weights: LossWeights) -> Found:
    """Cross-entropy and Dice of the damage that is found; for people, it is shown in red on what was given."""
    logits = network(batch.picture).float()
    entropy = F.binary_cross_entropy_with_logits(logits, batch.damaged)
    probability = torch.sigmoid(logits)
    dice = losses.dice(probability, batch.damaged)
    red = batch.picture.new_tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    pair = (torch.lerp(batch.picture, red, part.detach()) for part in (probability, batch.damaged))
    logs = {"entropy": float(entropy.detach()), "dice": float(dice.detach())}
    return Found(weights.pixel * entropy + weights.dice * dice, logs, [(next(pair), next(pair))])


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
    """The scale-1 output on the batch's window; the head sees what lies around it, as far as the crop goes."""
    y, x = batch.window_px
    inner = Box(y, x, y + window_px, x + window_px)
    outer = inner.grown(network.local.head.reach_px).intersection(Box(0, 0, *batch.missing.shape[-2:]))
    seen = (..., *outer.slices)
    pixels, missing = batch.intact[seen], batch.missing[seen]
    base, fill, features = (
        enlarge_window(part, batch.factor, outer)
        for part in (found.base, found.fill, with_ratio(found.features.float(), batch.factor))
    )
    detail = _borrowed_detail(batch, found)[seen] if detail_gain(batch.factor) else torch.zeros_like(fill)
    composite = network.local.head(pixels * (1 - missing), missing, fill, detail, features).float()
    window = (..., *inner.shifted(-outer.y0, -outer.x0).slices)
    return Window(composite[window], pixels[window], missing[window], features[window], base[window])


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
    batch: DamagedBatch, found: GlobalPass, window: Window, weights: LossWeights, pixel: Pixel
) -> Found:
    hole = (batch.share >= 1).float()
    target = F.avg_pool2d(batch.intact, batch.factor)
    coarse = losses.hole_error(found.coarse, target, hole, found.base)
    fill = losses.hole_error(found.fill, target, hole, found.base)
    composite = _composite_loss(window, batch.factor, weights, pixel)
    logs: Logs = {"coarse": float(coarse.detach()), "fill": float(fill.detach()), **composite.logs}
    return replace(composite, loss=composite.loss + weights.hole * (0.5 * coarse + fill), logs=logs)


def _composite_loss(window: Window, factor: int, weights: LossWeights, pixel: Pixel) -> Found:
    error = _composite_error(window, factor)
    loss = weights.hole * error
    if weights.pixel:
        loss = loss + weights.pixel * pixel(window.composite, window.wanted)
    if weights.edge and factor < RATIO_LIMIT - 1:
        loss = loss + weights.edge * losses.edge(window.composite, window.wanted)
    return Found(loss, {"composite": float(error.detach())}, [(window.composite, window.wanted)])


def _composite_error(window: Window, factor: int) -> Tensor:
    """From ratio 3 on only what the guide could know is judged: borrowed texture may differ from the lost one."""
    parts = (window.composite, window.wanted, window.missing, window.base)
    if factor >= RATIO_LIMIT - 1:
        side = window.composite.shape[-1] // factor * factor
        parts = tuple(F.avg_pool2d(part[..., :side, :side], factor) for part in parts)
    composite, wanted, missing, base = parts
    return losses.hole_error(composite, wanted, (missing > 0).float(), base)


def _levels_loss(
    network: CraSrgan,
    picture: Tensor,
    targets: list[Tensor],
    weights: LossWeights,
    pixel_loss: Pixel,
    guide: Tensor,
    missing: Tensor,
) -> Found:
    features, picture = network.local.encode(picture, missing, guide, len(targets))
    loss = picture.new_zeros(())
    logs: Logs = {}
    found = network.local.decode(features, picture, len(targets))
    for level, (output, wanted) in enumerate(zip(found, targets, strict=True), start=1):
        pixel = pixel_loss(output, wanted)
        loss = loss + weights.pixel * pixel
        if weights.edge:
            loss = loss + weights.edge * losses.edge(output, wanted)
        if weights.laplacian:
            loss = loss + weights.laplacian * losses.laplacian_edge(output, wanted)
        if weights.frequency:
            loss = loss + weights.frequency * losses.frequency(output, wanted)
        logs[f"x{1 << level}"] = float(pixel.detach())
    return Found(loss, logs, list(zip(found, targets, strict=True)))
