"""What is trained is what restores: a training window holds the engine's own pixels."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import engine.guide
from engine.geometry import Box
from engine.models.cra_srgan.generator import CraSrgan
from engine.request import Request
from engine.restoration import Restorer
from engine.train.dataset import damaged_batch
from engine.train.step import composite_window, enlarge_window
from tests.networks import TINY, random_checkpoint

GUIDE_PX, WINDOW_PX = 48, 32


@pytest.fixture(scope="module")
def restorer(tmp_path_factory) -> Restorer:
    """Of a random network whose guide moves pixels by several levels, too."""
    restorer = Restorer(model=str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY)), threads=1)
    guide = restorer.checkpoint.network.guide
    with torch.no_grad():
        for part in (guide.coarse, guide.refine):
            part.leave.weight.mul_(10)
    return restorer


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_window_of_training_is_what_the_engine_restores(factor, restorer, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", GUIDE_PX)
    network = CraSrgan(TINY, padding="same")
    network.load_state_dict(restorer.checkpoint.network.state_dict())
    batch = damaged_batch(
        pictures, seed=(factor, 4), batch=2, guide_px=GUIDE_PX, factor=factor, window_px=WINDOW_PX, levels=0
    )
    with torch.no_grad():
        window = composite_window(network, batch, network.guide(batch.known_mean, batch.share), WINDOW_PX)
    y, x = batch.window_px
    whole = Box(0, 0, *batch.missing.shape[-2:])
    reach_px = network.local.head.reach_px  # so far the border of the crop is felt
    inner = Box(y, x, y + WINDOW_PX, x + WINDOW_PX).intersection(whole.grown(-reach_px))
    assert min(inner.size.h, inner.size.w) >= WINDOW_PX - reach_px
    for composite, intact, missing in zip(window.composite, batch.intact, batch.missing, strict=True):
        pixels = (intact.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        made = torch.from_numpy(restorer.array(pixels, missing[0].numpy() > 0, Request(), scratch=tmp_path))
        wanted, hole = made[inner.slices].permute(2, 0, 1), missing[0][inner.slices] > 0
        error = 255 * composite[(..., *inner.shifted(-y, -x).slices)].clamp(0, 1) - wanted
        assert hole.sum() > 20
        assert error[:, hole].abs().max() < 0.6  # half a level, and residuals kept in float16
        assert error[:, ~hole].abs().max() < 0.01


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_an_enlarged_window_is_cut_from_the_enlarged_whole(factor):
    plane = torch.rand(2, 3, 7, 9)
    whole = F.interpolate(plane, scale_factor=factor, mode="bilinear", align_corners=False)
    side_px = 2 * factor + 3
    last_y, last_x = (side - side_px for side in whole.shape[-2:])
    for y in range(last_y + 1):
        for x in (0, 1, last_x // 2, last_x):
            window = Box(y, x, y + side_px, x + side_px)
            assert torch.allclose(enlarge_window(plane, factor, window), whole[(..., *window.slices)], atol=1e-6)
