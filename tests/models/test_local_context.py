"""The context on a card is neither too small nor too large: the layers' own sum, measured on the network itself.

Everything runs in float64 with positive weights, so that no contribution can cancel or fall below rounding.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.models.cra_srgan.config import SCALES, Config, full, lite
from engine.models.cra_srgan.generator import CraSrgan
from tests.networks import TINY

CORE_PX = 8
SLACK_PX = 8
"""By so much the tile is larger than its core on each side: room for a change that is just too far away."""

NARROW = {
    "guide_channels": 3,
    "head_channels": 2,
    "trunk_channels": 4,
    "heads": 2,
    "stage_channels": (4, 4, 4, 4),
}
"""The context is a matter of depth: the scales that would be slow are measured on as many but thinner layers."""

CONFIGS = {
    "lite": (lite(), range(3)),
    "full": (full(), range(2)),
    "narrow lite": (replace(lite(), **NARROW), range(5)),
    "narrow full": (replace(full(), **NARROW), range(5)),
    "tiny": (TINY, range(5)),
    "tiny for bad copies": (replace(TINY, clean=True), range(1, 3)),
}
CASES = [pytest.param(c, level, id=f"{n} x{1 << level}") for n, (c, levels) in CONFIGS.items() for level in levels]


def positive_network(config: Config) -> CraSrgan:
    """Every parameter positive; sums of weights near one, so that sigmoids and softmaxes stay where they are steep."""
    torch.manual_seed(1)
    network = CraSrgan(config, padding="valid").double()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.rand_like(parameter).add(0.5) * (1.0 if parameter.ndim > 1 else 0.05) / fan_in)
    return network


@pytest.fixture(autouse=True)
def _stay_double(monkeypatch):
    """The network leaves autocast with `.float()`; here that must not round."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


def local_half(network: CraSrgan, world: dict[str, Tensor], levels: int) -> Tensor:
    """Head, encode, decode on one tile with all its margins, as the renderer chains them."""
    local = network.local
    composite = local.head(world["pixels"], world["missing"], world["base"], world["detail"], world["guide"])
    if levels == 0:
        return composite
    margin = local.head.margin_px
    inner = (..., slice(margin, -margin), slice(margin, -margin))
    features, picture = local.encode(composite, world["missing"][inner], world["guide"][inner], levels)
    return local.decode(features, picture, levels)[-1]


def make_world(config: Config, side: int) -> dict[str, Tensor]:
    """Inputs of a square tile; the hole is drawn by the test."""
    torch.manual_seed(2)
    shapes = {"pixels": 3, "missing": 1, "base": 3, "detail": 3, "guide": config.guide_channels + 1}
    return {name: torch.rand(1, channels, side, side, dtype=torch.float64) for name, channels in shapes.items()}


def core_of(output: Tensor, levels: int) -> Tensor:
    start, stop = SLACK_PX << levels, (SLACK_PX + CORE_PX) << levels
    return output[..., start:stop, start:stop]


def strips(side: int, distance: int, context: int) -> list[tuple[slice, slice]]:
    """The lines of pixels at `distance` from the core: above, below, left, right."""
    first = SLACK_PX + context - distance
    last = side - 1 - first
    everything = slice(None)
    return [
        (slice(first, first + 1), everything),
        (slice(last, last + 1), everything),
        (everything, slice(first, first + 1)),
        (everything, slice(last, last + 1)),
    ]


@pytest.mark.parametrize(("config", "levels"), CASES)
def test_a_change_at_the_context_reaches_the_core_and_one_pixel_further_does_not(config, levels):
    network = positive_network(config)
    context = network.context_px(1 << levels)
    side = CORE_PX + 2 * (SLACK_PX + context)
    world = make_world(config, side)
    head = network.local.head.margin_px
    # A hole wherever the head's result counts, known pixels outside of it: there a pixel's value travels farthest.
    reach = SLACK_PX + head
    world["missing"] = torch.zeros_like(world["missing"])
    world["missing"][..., reach : side - reach, reach : side - reach] = 1
    world["pixels"].requires_grad_()
    core_of(local_half(network, world, levels), levels).sum().backward()
    slope = world["pixels"].grad
    assert slope is not None
    for ys, xs in strips(side, context, context):
        assert slope[..., ys, xs].abs().max() > 0
    for ys, xs in strips(side, context + 1, context):
        assert slope[..., ys, xs].abs().max() == 0


@pytest.mark.parametrize(("config", "levels"), CASES)
def test_nothing_beyond_the_context_can_change_a_bit_of_the_core(config, levels):
    """Every input at once, the mask too, which slopes cannot judge."""
    network = positive_network(config)
    context = network.context_px(1 << levels)
    side = CORE_PX + 2 * (SLACK_PX + context)
    world = make_world(config, side)
    world["missing"] = (world["missing"] > 0.5).double()
    inner = (..., slice(SLACK_PX, side - SLACK_PX), slice(SLACK_PX, side - SLACK_PX))
    changed = {name: 1 - part for name, part in world.items()}
    for name, part in changed.items():
        part[inner] = world[name][inner]
    with torch.inference_mode():
        before, after = (core_of(local_half(network, part, levels), levels) for part in (world, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("config", [lite(), full()], ids=["lite", "full"])
@pytest.mark.parametrize("scale", SCALES)
def test_thin_layers_have_the_context_of_wide_ones(config, scale):
    assert CraSrgan(replace(config, **NARROW)).context_px(scale) == CraSrgan(config).context_px(scale)


@pytest.mark.parametrize("levels", range(5))
def test_a_change_of_any_input_at_the_context_changes_the_core(levels):
    """What is given beside the pixels reaches as far as the card says, the detail less far: the head only adds it."""
    network = positive_network(TINY)
    context = network.context_px(1 << levels)
    side = CORE_PX + 2 * (SLACK_PX + context)
    for name, first in {"base": SLACK_PX, "guide": SLACK_PX, "detail": SLACK_PX + network.local.head.margin_px}.items():
        world = make_world(TINY, side)
        world["missing"] = torch.ones_like(world["missing"])
        world[name].requires_grad_()
        core_of(local_half(network, world, levels), levels).sum().backward()
        slope = world[name].grad
        assert slope is not None
        reached = slope.abs().amax(1)[0] > 0
        rows = torch.nonzero(reached.any(1))[:, 0]
        assert (int(rows[0]), int(rows[-1])) == (first, side - first - 1), name


@pytest.mark.parametrize("config", [lite(), full(), TINY], ids=["lite", "full", "tiny"])
def test_tiles_stay_on_the_grid_of_the_windows(config):
    """Every margin of the fusion is a whole number of windows, at every scale."""
    local = CraSrgan(config).local
    margins = [local.fusion_margin_px(level) for level in range(1, len(config.stage_channels) + 1)]
    assert all(margin % CraSrgan.ALIGN_PX == 0 for margin in margins)
    assert margins == sorted(margins)
