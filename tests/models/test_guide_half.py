"""The global half: known pixels stay, holes are not looked at, any size is one of whole cells."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.models.cra_srgan.guide import CoarseNet, GatedUNet, GlobalHalf, RefineNet
from tests.networks import TINY, random_network


@pytest.fixture(autouse=True)
def _no_slopes():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def guide() -> GlobalHalf:
    return random_network(TINY).guide


def damaged(h: int, w: int) -> tuple[Tensor, Tensor]:
    """A picture, and a share of which a part is 0, a part between, a part 1; the left half is known."""
    share = (3 * torch.rand(2, 1, h, w) - 1.5).clamp(0, 1)
    share[..., : w // 2] = 0
    return torch.rand(2, 3, h, w), share


@pytest.mark.parametrize(("h", "w"), [(16, 24), (13, 19), (5, 9)])
def test_known_pixels_stay_and_those_in_holes_are_not_looked_at(h, w, guide):
    picture, share = damaged(h, w)
    known = (share < 1).expand_as(picture)
    found = guide(picture, share)
    assert found.features.shape == (2, TINY.guide_channels, h, w)
    for part in (found.base, found.coarse, found.fill):
        assert torch.equal(part[known], picture[known])
    assert (found.coarse - found.base)[~known].std() > 1e-3
    assert (found.fill - found.coarse)[~known].std() > 1e-3
    other = guide(torch.where(known, picture, 1 - picture), share)
    for name in ("base", "coarse", "fill", "features"):
        assert torch.equal(getattr(other, name), getattr(found, name))
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(found.rows, other.rows, strict=True))


@pytest.mark.parametrize(("h", "w"), [(13, 19), (5, 9), (8, 25)])
def test_a_picture_is_continued_to_whole_cells(h, w, guide):
    parts = damaged(h, w)
    around = (0, 0), (0, 0), (0, -h % 8), (0, -w % 8)
    picture, share = (torch.from_numpy(np.pad(part, around, mode="edge")) for part in parts)
    found, whole = guide(*parts), guide(picture, share)
    for name in ("base", "coarse", "fill", "features"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[..., :h, :w])
    cells = share.numpy().reshape(2, share.shape[-2] // 8, 8, share.shape[-1] // 8, 8).max((2, 4)) > 0
    for row, missing in zip(found.rows, cells, strict=True):
        assert row.cells.tolist() == np.flatnonzero(missing).tolist()


def test_both_networks_begin_as_nothing_and_speak_in_tenths():
    picture, share = damaged(16, 24)
    coarse, refine = CoarseNet((8, 8, 8)), RefineNet((8, 8, 8), 7, multi_scale=True)
    for _ in range(2):
        said = coarse(picture, share), refine(picture, share, picture)[0]
        assert all(torch.allclose(part, coarse.leave.bias[0] / 10) for part in said)
        nn.init.ones_(coarse.leave.bias)
        nn.init.ones_(refine.leave.bias)


def test_every_grid_of_the_unet_is_heard():
    net = GatedUNet(4, (8, 6, 5))
    found = net.encode(torch.randn(1, 4, 24, 32))
    assert [tuple(part.shape[1:]) for part in found] == [(8, 12, 16), (6, 6, 8), (5, 3, 4)]
    said = net.decode(*found)
    assert said.shape == found[0].shape
    for silent in range(3):
        parts = [part * (grid != silent) for grid, part in enumerate(found)]
        assert (net.decode(*parts) - said).std() > 0.1 * said.std()
