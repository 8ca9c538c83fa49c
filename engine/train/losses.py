"""Losses: pure functions of a prediction and a target, both (B, C, H, W) in [0, 1], returning a scalar."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CHARBONNIER_EPSILON = 1e-3
HOLE_EPSILON = 0.02
GRADIENT_PENALTY = 10.0

Adversarial = Literal["srgan", "relativistic", "wgan-gp"]


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (prediction - target).abs().mean()


def charbonnier(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(error^2 + epsilon^2) (Lai et al. 2017, LapSRN, section 3.3)."""
    return torch.sqrt((prediction - target) ** 2 + CHARBONNIER_EPSILON**2).mean()


def hole_error(prediction: Tensor, target: Tensor, missing: Tensor, reference: Tensor) -> Tensor:
    """Squared error inside the holes over that of `reference`, mean of the pictures that have holes; 0 where none has.

    The quotient lets a smooth picture weigh as much as a busy one, as PSNR does, yet stays calm where `reference` is
    all but right.
    """
    square, other = (_hole_square(part, target, missing) for part in (prediction, reference))
    damaged = missing.flatten(1).any(1)
    return (square / (other + HOLE_EPSILON**2) * damaged).sum() / damaged.sum().clamp(min=1)


def _hole_square(prediction: Tensor, target: Tensor, missing: Tensor) -> Tensor:
    """(B,) mean squared error of the missing pixels."""
    count = missing.sum((1, 2, 3)) * prediction.shape[1]
    return (((prediction - target) * missing) ** 2).sum((1, 2, 3)) / count.clamp(min=1)


def dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 - the soft Dice coefficient of all masks of a batch together (Milletari et al. 2016, V-Net, section 3)."""
    overlap = 2 * (probability * target).sum()
    return 1 - (overlap + 1) / ((probability**2).sum() + (target**2).sum() + 1)


def sobel_edges(picture: Tensor) -> Tensor:
    """Horizontal and vertical Sobel gradients of each channel, (B C, 2, H - 2, W - 2)."""
    across = picture.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    return F.conv2d(picture.flatten(0, 1)[:, None], kernels)


def edge(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of Sobel gradients (report, 3.2)."""
    return (sobel_edges(prediction) - sobel_edges(target)).abs().mean()


def laplacian(picture: Tensor) -> Tensor:
    """What a 5-tap binomial blur takes away of each channel, borders mirrored; the shape stays."""
    taps = picture.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    padded = F.pad(picture.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="reflect")
    return picture - F.conv2d(padded, torch.outer(taps, taps)[None, None]).view_as(picture)


def laplacian_edge(prediction: Tensor, target: Tensor) -> Tensor:
    """Charbonnier error of Laplacians (Zamir et al. 2021, MPRNet, section 3.3)."""
    return charbonnier(laplacian(prediction), laplacian(target))


def frequency(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of what a 5x5 mean takes away: the high band (report, 3.2)."""
    error = prediction - target
    return (error - F.avg_pool2d(error, 5, stride=1, padding=2, count_include_pad=False)).abs().mean()


def perceptual(prediction: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of features, mean of their layers (Johnson et al. 2016, with L1 as in the report)."""
    return torch.stack([l1(mine, wanted) for mine, wanted in zip(prediction, target, strict=True)]).mean()


def gram(features: Tensor) -> Tensor:
    """(B, C, C) products of channels, mean over the pixels (Gatys et al. 2016)."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def style(prediction: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """As `perceptual`, of Gram matrices."""
    return perceptual([gram(one) for one in prediction], [gram(one) for one in target])


def deceive(real: Tensor, fake: Tensor, kind: Adversarial) -> Tensor:
    """What the generator pays where a critic tells its pictures from real ones; logits of any shape.

    srgan: Ledig et al. 2017, section 2.2.2. relativistic: the average form of Jolicoeur-Martineau 2018, as in ESRGAN.
    wgan-gp: Gulrajani et al. 2017.
    """
    if kind == "srgan":
        return F.softplus(-fake).mean()
    if kind == "wgan-gp":
        return -fake.mean()
    return (F.softplus(real - fake.mean()).mean() + F.softplus(real.mean() - fake).mean()) / 2


def tell_apart(real: Tensor, fake: Tensor, kind: Adversarial) -> Tensor:
    """What the critic pays, from the same papers; of `wgan-gp` without its penalty."""
    if kind == "srgan":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "wgan-gp":
        return fake.mean() - real.mean()
    return (F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean()) / 2


def gradient_penalty(logits: Tensor, picture: Tensor) -> Tensor:
    """How far the critic's slope at a picture is from 1 (Gulrajani et al. 2017, section 4), weighted."""
    (slope,) = torch.autograd.grad(logits.sum(), picture, create_graph=True)
    return GRADIENT_PENALTY * (((slope**2).sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
