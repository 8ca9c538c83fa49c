"""The smooth fill: a surface over the holes, computed around them alone."""

import pytest
import torch
from torch.nn import functional as F

from engine.models.cra_srgan.guide import JACOBI_STEPS, harmonic_fill


def everywhere(picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """The same with every step taken on the whole plane."""
    known = 1 - hole
    levels = [(picture * known, known)]
    while max(levels[-1][0].shape[-2:]) > 1:
        value, weight = levels[-1]
        total, share = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (value * weight, weight))
        levels.append((total / share.clamp(min=1e-8), (share > 0).to(share.dtype)))
    filled = levels[-1][0]
    for value, weight in reversed(levels[:-1]):
        below = F.interpolate(filled, size=value.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, value, below)
        for _ in range(JACOBI_STEPS):
            padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
            up, down = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
            left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
            filled = torch.where(weight > 0, value, (up + down + left + right) / 4)
    return filled


def holes(kind: str, b: int, h: int, w: int) -> torch.Tensor:
    hole = torch.zeros(b, 1, h, w)
    if kind == "one":
        hole[..., h // 4 : h // 2, w // 3 : w // 2] = 1
    elif kind == "corner":
        hole[..., -h // 5 :, -w // 6 :] = 1
    elif kind == "different":
        hole[0, ..., :, :3], hole[-1, ..., 2:5, :] = 1, 1
    elif kind == "everywhere":
        hole = (torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    elif kind == "all":
        hole[:] = 1
    return hole


@pytest.mark.parametrize("size", [(1, 64, 96), (2, 37, 53), (1, 1, 9)])
@pytest.mark.parametrize("kind", ["none", "one", "corner", "different", "everywhere", "all"])
def test_steps_around_the_holes_are_those_on_the_whole_plane(kind, size):
    b, h, w = size
    picture = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(2))
    hole = holes(kind, b, h, w)
    assert torch.equal(harmonic_fill(picture, hole), everywhere(picture, hole))


def test_slopes_pass_through_it():
    picture = torch.rand(1, 3, 24, 24, requires_grad=True)
    harmonic_fill(picture, holes("one", 1, 24, 24)).sum().backward()
    assert picture.grad is not None
    assert bool((picture.grad[..., 0, 0] > 0).all())
    assert float(picture.grad[..., 8, 10].abs().max()) == 0  # what lies in the hole is not looked at
