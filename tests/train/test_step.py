"""One step per task: the loss falls, and a stage touches only what it trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.models.checkpoint import build
from engine.models.cra_srgan.generator import CraSrgan
from engine.train.dataset import Pictures, damaged_batch, scale_batch
from engine.train.recipes import RECIPES
from engine.train.stages import GLOBAL, LOCAL, LossWeights
from engine.train.step import coarse_loss, head_loss, inpainting_loss, joint_loss, super_resolution_loss
from tests.networks import TINY

WEIGHTS = LossWeights(pixel=1.0, edge=0.1, frequency=0.1)


def losses_of(task: str, network: CraSrgan, pictures: Pictures):
    """A function without arguments: the loss on one fixed batch."""
    if task == "super-resolution":
        batch = scale_batch(pictures, seed=(1,), batch=2, low_px=16, levels=2)
        return lambda: super_resolution_loss(network, batch, WEIGHTS)
    levels = 1 if task == "joint" else 0
    damaged = damaged_batch(pictures, seed=(1,), batch=2, guide_px=32, factor=2, window_px=32, levels=levels)
    if task == "coarse":
        return lambda: coarse_loss(network, damaged, WEIGHTS)
    loss = {"head": head_loss, "inpainting": inpainting_loss, "joint": joint_loss}[task]
    return lambda: loss(network, damaged, WEIGHTS, 32)


@pytest.mark.parametrize("task", ["head", "coarse", "inpainting", "super-resolution", "joint"])
def test_the_loss_falls_on_one_batch(task, pictures):
    network = CraSrgan(TINY, padding="same")
    loss_of = losses_of(task, network, pictures)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    found = []
    for _ in range(25):
        optimiser.zero_grad()
        step = loss_of()
        step.loss.backward()
        optimiser.step()
        found.append(float(step.loss.detach()))
        assert all(np.isfinite(value) for value in step.logs.values())
    assert min(found[-3:]) < 0.9 * found[0]


@pytest.mark.parametrize("task", ["head", "coarse", "inpainting", "super-resolution", "joint"])
def test_halved_precision_gives_the_same_loss_to_a_few_hundredths(task, pictures):
    loss_of = losses_of(task, CraSrgan(TINY, padding="same"), pictures)
    usual = float(loss_of().loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        halved = loss_of()
    halved.loss.backward()
    assert float(halved.loss.detach()) == pytest.approx(usual, rel=0.03)


@pytest.mark.parametrize(
    ("task", "prefixes"),
    [
        ("head", ("local.head.",)),
        ("coarse", ("guide.coarse.",)),
        ("inpainting", GLOBAL),
        ("super-resolution", LOCAL),
        ("joint", ("",)),
    ],
)
def test_a_task_reaches_the_parameters_that_its_stage_trains(task, prefixes, pictures):
    """And no others: what a stage does not train gets no slope from a loss it cannot see, or is left alone by it."""
    network = CraSrgan(TINY, padding="same")
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)  # zero last layers would hide what lies before them
    losses_of(task, network, pictures)().loss.backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())}
    wanted = {name for name, _ in network.named_parameters() if name.startswith(prefixes)}
    levels = 1 if task == "joint" else 2
    deepest = {name for name in wanted if name.startswith(tuple(f"local.stages.{i}." for i in range(levels, 4)))}
    unused = {"local.null_guide"} if task == "joint" else set()  # used where no guide is given
    unused |= {name for name in wanted if ".grow." in name}
    assert wanted - deepest - unused <= reached
    if task in ("head", "super-resolution"):
        assert reached <= wanted


def test_parameters_belong_to_exactly_one_half():
    for config in (TINY, replace(TINY, fusion=False, edge=False, frequency=False)):
        for name, _ in CraSrgan(config).named_parameters():
            assert name.startswith(GLOBAL) != name.startswith(LOCAL), name


@pytest.mark.parametrize("recipe", [make() for make in RECIPES.values()], ids=list(RECIPES))
def test_recipes_are_whole(recipe):
    for stage in recipe.stages:
        assert stage.num_steps(1000) > 0
        assert not stage.losses.needs_features or stage.features == "vgg19" or stage.losses.adversarial
        assert sum(draw.probability for draw in stage.draws) == pytest.approx(1)
        assert all(draw.side_px % 8 == 0 for draw in stage.draws)
        names = [name for name, _ in build(recipe.model).named_parameters()]
        if stage.task != "detection":
            assert all(draw.levels <= len(recipe.model.stage_channels) for draw in stage.draws)
        assert any(name.startswith(stage.trains) for name in names)
