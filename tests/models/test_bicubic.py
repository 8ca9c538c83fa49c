"""The network's own bicubic steps are the operator that its card names."""

import pytest
import torch
from torch.nn import functional as F

from engine.models.cra_srgan.layers import BicubicDown, BicubicUp

BORDER_PX = 8
"""Beyond this the reference has renormalised kernels at the border."""


def reference(picture: torch.Tensor, factor: float) -> torch.Tensor:
    return F.interpolate(picture, scale_factor=factor, mode="bicubic", antialias=True, align_corners=False)


def inner(picture: torch.Tensor) -> torch.Tensor:
    return picture[..., BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]


@pytest.mark.parametrize("channels", [1, 3])
def test_up_is_bicubic_interpolation(channels):
    picture = torch.rand(2, channels, 24, 30)
    out = BicubicUp(channels, padding="same")(picture)
    assert (inner(out) - inner(reference(picture, 2.0))).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_down_is_antialiased_bicubic_reduction(channels):
    picture = torch.rand(2, channels, 48, 60)
    out = BicubicDown(channels, padding="same")(picture)
    assert (inner(out) - inner(reference(picture, 0.5))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [BicubicUp, BicubicDown])
def test_valid_is_the_middle_of_same(kind):
    picture = torch.rand(1, 3, 40, 40)
    valid, same = kind(padding="valid"), kind(padding="same")
    margin = 2 * valid.margin_px if kind is BicubicUp else (valid.margin_px + 1) // 2
    if kind is BicubicDown:  # an odd margin: the picture starts one pixel later
        out, whole = valid(picture[..., 1:-1, 1:-1]), same(picture)
        assert torch.allclose(out, whole[..., margin:-margin, margin:-margin], atol=1e-6)
    else:
        out, whole = valid(picture), same(picture)
        assert torch.allclose(out, whole[..., margin:-margin, margin:-margin], atol=1e-6)
    assert out.shape[-1] == whole.shape[-1] - 2 * margin


def test_flat_stays_flat():
    flat = torch.full((1, 3, 20, 20), 0.37)
    assert (BicubicUp(padding="same")(flat) - 0.37).abs().max() < 1e-6
    assert (BicubicDown(padding="same")(flat) - 0.37).abs().max() < 1e-6
