"""Training samples: the crops that are drawn, and that what is given and what is wanted are of the same crop."""

from dataclasses import fields
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from engine.evaluate.baselines import bicubic_down
from engine.train import colour, dataset
from engine.train.dataset import Pictures, crop_of, damaged_batch, overlaid_batch, reduce_bicubic, scale_batch
from engine.train.sources import find

HOLES = partial(damaged_batch, guide_px=16, factor=2, window_px=16)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("factor", [2, 4])
def test_reductions_are_those_of_the_evaluation(factor):
    picture = rng(0).integers(0, 65536, (64, 80, 3), np.uint16)
    found = reduce_bicubic(torch.as_tensor(picture / 65535).permute(2, 0, 1)[None].float(), factor)
    expected = bicubic_down(picture, factor) / 65535
    inside = slice(3, -3)  # at its borders one mirrors, the other leaves out
    assert found.shape == (1, 3, 64 // factor, 80 // factor)
    assert np.abs(found[0].permute(1, 2, 0).numpy() - expected)[inside, inside].max() < 1e-4
    assert torch.allclose(reduce_bicubic(torch.full((1, 3, 64, 80), 0.3), factor), torch.tensor(0.3))


@pytest.mark.parametrize("levels", [1, 3])
def test_targets_double_and_all_come_from_the_largest(levels, pictures, monkeypatch):
    monkeypatch.setattr(colour, "CHANGED", 1.0)
    scale = scale_batch(pictures, seed=(2,), batch=2, low_px=8, levels=levels)
    holes = HOLES(pictures, seed=(2,), batch=2, guide_px=8, levels=levels)
    for given, targets in ((scale.low, scale.levels), (holes.intact, holes.above)):
        side_px = given.shape[-1]
        assert [one.shape for one in targets] == [(2, 3, side_px << n, side_px << n) for n in range(1, levels + 1)]
        for n, target in enumerate(targets, 1):
            assert torch.equal(target, reduce_bicubic(targets[-1], 1 << (levels - n)))
        assert (given - reduce_bicubic(targets[-1], 1 << levels)).abs().max() < 0.501 / 255
        assert (given * 255 - (given * 255).round()).abs().max() < 1e-4


def test_crops_are_turned_and_mirrored_in_all_eight_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(colour, "CHANGED", 0.0)
    picture = rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "one.png"), picture[..., ::-1])
    pictures = Pictures(find(tmp_path))
    drawn = [crop_of(pictures, rng(seed), 16, max_reduction=2.0).tobytes() for seed in range(240)]
    flipped = [picture, *(cv2.flip(picture, way) for way in (0, 1, -1))]
    ways = {one.tobytes() for way in flipped for one in (way, way.transpose(1, 0, 2))}
    assert set(drawn) == ways
    assert min(drawn.count(way) for way in ways) > 15


@pytest.mark.parametrize("side_px", [64, 60])
def test_a_window_is_the_best_of_four_places_on_a_grid_of_8(side_px):
    down, across = torch.meshgrid(torch.arange(side_px), torch.arange(side_px), indexing="ij")
    missing = (down + 0.01 * across).expand(2, 1, side_px, side_px)  # more the further down, then to the right
    places = [(y, x) for y in range(0, side_px - 15, 8) for x in range(0, side_px - 15, 8)]
    found = [places.index(dataset._window(missing, rng(seed), 16)) for seed in range(300)]
    assert max(found) == len(places) - 1
    assert np.mean(found) / (len(places) - 1) == pytest.approx(4 / 5, abs=0.03)


def test_what_is_known_is_of_the_recoloured_crop(pictures, monkeypatch):
    batches = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(colour, "CHANGED", share)
        batches.append(HOLES(pictures, seed=(3,), batch=1))
    assert (batches[0].intact - batches[1].intact).abs().mean() > 0.02
    for batch in batches:
        intact, missing = (one[0].double().numpy().reshape(-1, 16, 2, 16, 2) for one in (batch.intact, batch.missing))
        known = np.ma.array(intact, mask=np.repeat(missing > 0, 3, axis=0)).mean((2, 4)).filled(0)
        assert np.allclose(batch.known_mean[0].numpy(), known, atol=1e-5)
        assert np.allclose(batch.share[0].numpy(), missing.mean((2, 4)))


def test_3_to_50_percent_are_missing_and_about_as_much_in_all_of_a_batch(pictures):
    shares = np.stack([HOLES(pictures, seed=(n,), batch=2).missing.mean((1, 2, 3)).numpy() for n in range(80)])
    assert 0.03 <= shares.min() < 0.06
    assert 0.42 < shares.max() <= 0.5
    assert (shares.max(1) <= 1.8 * shares.min(1)).all()


@pytest.mark.parametrize(
    "draw",
    [HOLES, partial(scale_batch, low_px=8, levels=2, bad=True), partial(overlaid_batch, side_px=64)],
    ids=["holes", "scale", "overlaid"],
)
def test_a_batch_follows_from_its_seed(draw, pictures):
    one, same, other = (draw(pictures, seed=seed, batch=2) for seed in ((1, 2), (1, 2), (1, 3)))
    values = [[getattr(batch, field.name) for field in fields(batch)] for batch in (one, same, other)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    assert not torch.equal(values[0][0], values[2][0])
