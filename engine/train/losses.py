"""Losses: pure functions of a prediction and a target, both (B, C, H, W) in [0, 1], returning a scalar."""

import torch
from torch import Tensor
from torch.nn import functional as F

CHARBONNIER_EPSILON = 1e-3
HOLE_EPSILON = 0.02


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


def sobel_edges(picture: Tensor) -> Tensor:
    """Horizontal and vertical Sobel gradients of each channel, (2 B C, 1, H - 2, W - 2)."""
    across = picture.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    return F.conv2d(picture.flatten(0, 1)[:, None], kernels)


def edge(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of Sobel gradients (report, 3.2)."""
    return (sobel_edges(prediction) - sobel_edges(target)).abs().mean()


def frequency(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of what a 5x5 mean takes away: the high band (report, 3.2)."""
    error = prediction - target
    return (error - F.avg_pool2d(error, 5, stride=1, padding=2, count_include_pad=False)).abs().mean()
