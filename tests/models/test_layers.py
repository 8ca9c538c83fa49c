"""Blocks of the generator against the same sums written differently; what is untrained adds nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import round_up
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.guide import harmonic_fill
from engine.models.cra_srgan.handover import with_ratio
from engine.models.cra_srgan.layers import (
    GatedConv,
    GatedResidual,
    ResidualBlock,
    SubPixelConv,
    crop,
    depth_to_space,
    space_to_depth,
)
from engine.models.cra_srgan.local import LocalHalf, Margins, SuperResolutionStage, Trunk
from tests.networks import TINY, random_network

CLEAN = replace(TINY, clean=True)


@pytest.fixture(autouse=True)
def _no_slopes():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network() -> CraSrgan:
    return random_network(CLEAN)


def redrawn(module):
    """With no layer silent."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def convolved(x: Tensor, layer: nn.Conv2d, *, pad: int = 0) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=pad)


def gated(x: Tensor, layer: nn.Conv2d, *, stride: int = 1, dilation: int = 1) -> Tensor:
    padded = F.pad(x, (dilation,) * 4)
    both = F.conv2d(padded, layer.weight, layer.bias, stride=stride, dilation=dilation)
    feature, gate = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    return torch.where(feature > 0, feature, torch.expm1(feature)) / (1 + torch.exp(-gate))


def resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bicubic", antialias=True, align_corners=False)


def projected(picture: Tensor, residual: Tensor | float) -> Tensor:
    """Bicubic and the residual, with what their reduction lacks of the picture added again."""
    estimate = resized(picture, 2.0) + residual
    return estimate + resized(picture - resized(estimate, 0.5), 2.0)


def test_pixels_go_into_channels_and_come_back():
    x = torch.randn(2, 5, 6, 8)
    corners = [x[..., y::2, x0::2] for y in (0, 1) for x0 in (0, 1)]
    assert torch.equal(space_to_depth(x), torch.cat(corners, 1))
    assert torch.equal(depth_to_space(space_to_depth(x)), x)


@pytest.mark.parametrize(("padding", "pad"), [("same", 1), ("valid", 0)])
def test_a_sub_pixel_convolution_is_a_shuffled_one(padding, pad):
    layer = SubPixelConv(5, 3, padding=padding)
    x = torch.randn(2, 5, 6, 7)
    assert torch.allclose(layer(x), F.pixel_shuffle(convolved(x, layer, pad=pad), 2), atol=1e-6)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 4)])
def test_a_gate_weighs_the_feature_beside_it(stride, dilation):
    layer = redrawn(GatedConv(3, 4, stride=stride, dilation=dilation))
    x = 3 * torch.randn(2, 3, 12, 10)
    assert torch.allclose(layer(x), gated(x, layer.conv, stride=stride, dilation=dilation), atol=1e-5)


def test_a_stack_of_gates_keeps_the_variance():
    x = torch.randn(1, 64, 32, 32)
    for _ in range(6):
        x = GatedConv(64, 64)(x)
        assert 0.6 < float(crop(x, 6).var()) < 1.8


def test_half_of_a_gated_convolution_is_added_to_what_came():
    layer = redrawn(GatedResidual(4, dilation=2))
    x = torch.randn(1, 4, 9, 11)
    assert torch.allclose(layer(x), x + gated(x, layer.branch.conv, dilation=2) / 2, atol=1e-6)


def test_a_residual_block_adds_two_convolutions_and_leaves_its_input_alone():
    layer = ResidualBlock(4, padding="valid")
    x = torch.randn(2, 4, 9, 11)
    before = x.clone()
    wanted = x[..., 2:-2, 2:-2] + convolved(convolved(x, layer.first).clamp(min=0), layer.second)
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    assert torch.equal(x, before)


def test_the_trunk_adds_deep_features_to_shallow_ones():
    trunk = Trunk(TINY, padding="valid")
    composite, missing = torch.rand(1, 3, 14, 12), torch.ones(1, 1, 14, 12)
    shallow = convolved(torch.cat([composite - 0.5, missing], 1), trunk.enter)
    wanted = crop(shallow, 3) + convolved(trunk.blocks[0](shallow), trunk.leave)
    assert torch.allclose(trunk(composite, missing), wanted, atol=1e-6)


def test_a_stage_projects_bicubic_and_residual_back():
    stage = redrawn(SuperResolutionStage(4, 3, 1, padding="same"))
    features, picture = torch.randn(1, 4, 24, 24), torch.rand(1, 3, 24, 24)
    deep, made = stage(features, picture, Margins(0, 0))
    residual = F.pixel_shuffle(convolved(stage.blocks(features), stage.to_rgb, pad=1), 2)
    assert residual.std() > 0.05
    assert torch.allclose(crop(made, 16), crop(projected(picture, residual), 16), atol=1e-5)
    grown = F.pixel_shuffle(convolved(deep, stage.grow, pad=1), 2).clamp(min=0)
    assert torch.allclose(stage.enlarge(deep, Margins(0, 0)), grown, atol=1e-6)


def test_an_untrained_network_fills_smoothly_and_enlarges_by_bicubic():
    network = CraSrgan(CLEAN, padding="same")
    picture, missing = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    missing[..., 9:17, 5:20] = 1
    found = network.guide(picture, missing)
    guide = with_ratio(found.features, 1)
    composite = network.local.head(picture, missing, found.fill, torch.zeros_like(picture), guide)
    assert torch.equal(composite, harmonic_fill(picture, missing))
    twice, four_times = network.local.decode(*network.local.encode(composite, missing, guide, 2), 2)
    wanted = projected(composite, 0)
    assert torch.allclose(crop(twice, 20), crop(wanted, 20), atol=1e-5)
    assert torch.allclose(crop(four_times, 40), crop(projected(wanted, 0), 40), atol=1e-5)


def test_a_module_that_is_left_out_is_one_that_has_learned_nothing():
    network = CraSrgan(TINY, padding="same").local
    bare = CraSrgan(replace(TINY, fusion=False, edge=False, frequency=False), padding="same").local
    bare.load_state_dict(network.state_dict(), strict=False)
    inputs = torch.rand(1, 3, 16, 24), torch.ones(1, 1, 16, 24), torch.rand(1, TINY.guide_channels + 1, 16, 24)
    for one, other in zip(network.encode(*inputs, 1), bare.encode(*inputs, 1), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_known_pixels_pass_the_head_bit_for_bit(network):
    head = network.local.head
    pixels, base, detail = torch.rand(3, 1, 3, 24, 24)
    missing, guide = (torch.rand(1, 1, 24, 24) < 0.4).float(), torch.rand(1, TINY.guide_channels + 1, 24, 24)
    made = head(pixels, missing, base, detail, guide)
    hole = crop(missing, head.margin_px).expand_as(made) > 0
    assert torch.equal(made[~hole], crop(pixels, head.margin_px)[~hole])
    assert (made - crop(base + detail, head.margin_px))[hole].std() > 0.02
    unseen = torch.where(missing > 0, 1 - pixels, pixels)
    assert torch.equal(head(unseen, missing, base, detail, guide), made)
    louder = head(pixels, missing, base, detail + 0.5, guide)  # behind the network, which does not hear it
    assert torch.allclose((louder - made)[hole], torch.tensor(0.5), atol=1e-6)


def restored(local: LocalHalf, world: dict[str, Tensor], levels: int) -> Tensor:
    composite = local.head(**world)
    if levels == 0:
        return composite
    missing, guide = (crop(world[name], local.head.margin_px) for name in ("missing", "guide"))
    return local.decode(*local.encode(composite, missing, guide, levels), levels)[-1]


@pytest.mark.parametrize("levels", range(4))
def test_training_sees_inside_a_crop_what_a_tile_with_its_margin_gives(levels, network):
    padded = CraSrgan(CLEAN, padding="same")
    padded.load_state_dict(network.state_dict())
    context_px, side_px = network.context_px(1 << levels), 16
    first_px = round_up(context_px, CraSrgan.ALIGN_PX)
    channels = {"pixels": 3, "missing": 1, "base": 3, "detail": 3, "guide": TINY.guide_channels + 1}
    world = {name: torch.rand(1, number, *[2 * first_px + side_px] * 2) for name, number in channels.items()}
    world["missing"] = (world["missing"] > 0.6).float()
    tile = {name: crop(part, first_px - context_px) for name, part in world.items()}
    made = restored(network.local, tile, levels)
    assert made.shape == (1, 3, side_px << levels, side_px << levels)
    assert torch.allclose(made, crop(restored(padded.local, world, levels), first_px << levels), atol=1e-4)
