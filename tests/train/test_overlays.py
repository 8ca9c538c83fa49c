"""Damage that can be seen: where the mask says, and nowhere else."""

import cv2
import numpy as np
import pytest
import torch

from engine.errors import TrainingError
from engine.models.detector import Detector
from engine.models.detector_config import DetectorConfig
from engine.train import overlays
from engine.train.dataset import OverlaidBatch, Pictures, batch_of
from engine.train.overlays import Overlays, overlaid
from engine.train.recipes import detector
from engine.train.sources import find
from engine.train.stages import LossWeights
from engine.train.step import detection_loss
from tests.train.conftest import soft_noise

SEEDS = range(24)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two kinds of artefacts: a hair, and a stain."""
    folder = tmp_path_factory.mktemp("film")
    for kind in ("hair", "stain"):
        (folder / kind).mkdir()
        cover = np.zeros((100, 100), np.uint8)
        if kind == "hair":
            cv2.ellipse(cover, (50, 50), (40, 15), 30, 0, 250, 200, 2)
        else:
            cv2.circle(cover, (60, 40), 20, 255, -1)
        rgba = np.dstack([np.full((100, 100, 3), 255, np.uint8), cv2.GaussianBlur(cover, (3, 3), 0)])
        cv2.imwrite(str(folder / kind / "0.png"), rgba)
    return folder


@pytest.fixture
def as_it_is(monkeypatch):
    """Neither greyed nor copied: what changes is damage."""
    monkeypatch.setattr(overlays, "_GREY", 0.0)
    monkeypatch.setattr(overlays, "_COPIED", 0.0)


def test_damage_follows_from_its_seed(folder):
    picture, films = soft_noise(96, 96), Overlays(find(folder))
    (one, mask), (same, again), (other, _) = (overlaid(picture, 96, films, rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (96, 96, 3)
    assert np.array_equal(one, same)
    assert np.array_equal(mask, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("films", ["films", "drawn"])
def test_pixels_change_where_the_mask_says(films, folder, as_it_is):
    picture, found = soft_noise(96, 96), Overlays(find(folder) if films == "films" else [])
    shares = []
    for seed in range(60):
        made, mask = overlaid(picture, 96, found, rng(seed))
        changed = np.abs(made.astype(int) - picture).max(2)
        assert changed[~mask].max() <= round(overlays.COVERED * 255) + 1
        shares.append(mask.mean())
        if mask.any():
            assert np.median(changed[mask]) > 10
    assert 0 < np.mean(np.array(shares) == 0) < 0.5
    assert max(shares) < 0.9


def test_pictures_are_enlarged_with_their_damage(folder, as_it_is):
    picture, films = soft_noise(48, 48), Overlays(find(folder))
    for seed in SEEDS:
        made, mask = overlaid(picture, 96, films, rng(seed))
        assert made.shape[:2] == mask.shape == (96, 96)
        plain = [cv2.resize(picture, (96, 96), interpolation=way) for way in (cv2.INTER_CUBIC, cv2.INTER_LINEAR)]
        changed = min((np.abs(made.astype(int) - one).max(2) for one in plain), key=np.sum)
        near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert changed[~near].max(initial=0) <= 255 * overlays.COVERED + 1
        assert not mask.any() or np.median(changed[mask]) > 10


def test_every_other_cover_is_of_a_kind_drawn_first(tmp_path):
    for number in range(10):
        path = tmp_path / ("stain" if number == 0 else "hair") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.dstack([np.full((4, 4, 3), 255, np.uint8), np.full((4, 4), number, np.uint8)]))
    films, chance = Overlays(find(tmp_path)), rng(0)
    share = np.bincount([films.draw(chance)[0, 0] for _ in range(2000)]) / 2000
    assert share[0] == pytest.approx((1 / 10 + 1 / 2) / 2, abs=0.03)
    assert np.allclose(share[1:], (1 - share[0]) / 9, atol=0.025)


def test_a_copy_is_faded_noisy_and_clean_of_damage(monkeypatch):
    for name, share in (("_CLEAN", 1.0), ("_GREY", 0.0), ("_COPIED", 1.0)):
        monkeypatch.setattr(overlays, name, share)
    ramp = np.repeat(np.tile(np.linspace(30, 210, 64).astype(np.uint8), (64, 1))[..., None], 3, axis=2)
    found = []
    for seed in SEEDS:
        made, mask = overlaid(ramp, 64, Overlays([]), rng(seed))
        slope, black = np.polyfit(ramp.ravel(), made.ravel(), 1)
        assert not mask.any()
        found.append((slope, black, (made - ramp * slope - black).std()))
    slopes, blacks, rests = np.array(found).T
    assert 0.74 < min(slopes) < 0.8
    assert 0.95 < max(slopes) < 1.01
    assert -1 < min(blacks) < 8
    assert 32 < max(blacks) < 41
    assert min(rests) < 2
    assert 3 < max(rests) < 8


def test_greyed_pictures_are_those_of_opencv(monkeypatch):
    for name, share in (("_CLEAN", 1.0), ("_GREY", 1.0), ("_COPIED", 0.0)):
        monkeypatch.setattr(overlays, name, share)
    picture = soft_noise(32, 32)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(int)
    assert np.abs(overlaid(picture, 32, Overlays([]), rng(0))[0] - grey[..., None]).max() <= 1


def test_an_overlay_without_a_cover_is_named(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "flat.png"), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(TrainingError, match=r"flat\.png: .*instead of 4"):
        Overlays(find(tmp_path)).draw(rng(0))


def test_the_recipe_trains_on_overlaid_crops(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), soft_noise(320, 320))
    pictures, (stage,) = Pictures(find(tmp_path), overlays=Overlays(find(folder))), detector().stages
    assert len(pictures.overlays) == 2
    one, same, other = (batch_of(pictures, stage, seed=1, step=step) for step in (0, 0, 1))
    assert isinstance(one, OverlaidBatch)
    drawn = {tuple(batch_of(pictures, stage, seed=1, step=step).picture.shape) for step in range(12)}
    assert drawn == {(draw.batch, 3, draw.side_px, draw.side_px) for draw in stage.draws}
    assert 0 < one.damaged.mean() < 0.5
    assert torch.equal(one.picture, same.picture)
    assert torch.equal(one.damaged, same.damaged)
    assert one.picture.shape != other.picture.shape or not torch.equal(one.picture, other.picture)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_on_one_batch(folder, tmp_path, precision):
    torch.manual_seed(0)
    cv2.imwrite(str(tmp_path / "a.png"), soft_noise(320, 320))
    pictures, (stage,) = Pictures(find(tmp_path), overlays=Overlays(find(folder))), detector().stages
    batch = batch_of(pictures, stage, seed=1, step=0)
    network = Detector(DetectorConfig(channels=(8, 8, 8, 8)))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    found = []
    for _ in range(30):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step = detection_loss(network, batch, LossWeights(pixel=1.0, dice=0.5))
        step.loss.backward()
        optimiser.step()
        found.append(float(step.loss.detach()))
    assert min(found[-3:]) < 0.7 * found[0]
    assert set(step.logs) == {"entropy", "dice"}
