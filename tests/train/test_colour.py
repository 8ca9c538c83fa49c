"""Colours change, but not what a picture shows, and not in the target alone."""

import cv2
import numpy as np
import pytest

from engine.train import colour, dataset
from engine.train.colour import faded, jittered, recoloured
from engine.train.dataset import Pictures, damaged_batch, scale_batch
from engine.train.overlays import Overlays
from engine.train.sources import find
from tests.train.conftest import soft_noise


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_some_pictures_change_the_others_stay():
    picture = soft_noise(32, 32)
    changed = [not np.array_equal(recoloured(picture, rng(seed)), picture) for seed in range(400)]
    assert np.mean(changed) == pytest.approx(colour.CHANGED, abs=0.07)
    one, same = (recoloured(picture, rng(3)) for _ in range(2))
    assert np.array_equal(one, same)


def test_fading_lifts_blacks_dims_whites_and_yellows_them():
    ends = np.stack([np.zeros((4, 3)), np.ones((4, 3))]).astype(np.float32)
    for seed in range(20):
        black, white = faded(ends, rng(seed))[:, 0]
        assert (black >= 0).all()
        assert (white <= 1).all()
        assert (black < white).all()
        assert white[0] >= white[1] >= white[2]
    assert max(float(faded(ends, rng(seed))[0, 0, 0]) for seed in range(20)) > 0.1


def test_jitter_keeps_grey_almost_grey_and_the_order_of_lights():
    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None, :, None], 3, axis=2)
    for seed in range(20):
        found = jittered(ramp, rng(seed))
        assert (np.diff(found[0], axis=0) >= 0).all()
        assert np.ptp(found, axis=2).max() < 0.3


def test_jitter_scales_how_far_colours_are_from_their_grey():
    """Two greys tell gamma and balance, which are taken back before the colours are compared."""
    x = rng(0).uniform(0.3, 0.7, (1, 32, 3)).astype(np.float32)
    x[0, :2] = [[0.3], [0.6]]
    away = x - np.average(x, axis=2, weights=[0.299, 0.587, 0.114])[..., None]
    saturations = []
    for seed in range(40):
        found = jittered(x, rng(seed)).astype(np.float64)
        gamma = np.log(found[0, 0] / found[0, 1]) / np.log(0.5)
        linear = found ** (1 / gamma)
        linear *= 0.3 / linear[0, 0]
        wanted = linear - (x - away)
        saturations.append((wanted * away).sum() / (away**2).sum())
        assert np.abs(wanted - saturations[-1] * away).max() < 1e-3
    assert 0.4 < min(saturations) < 0.5
    assert 1.3 < max(saturations) < 1.4


def test_input_and_targets_change_together(monkeypatch, pictures):
    monkeypatch.setattr(colour, "CHANGED", 1.0)
    batch = scale_batch(pictures, seed=(5,), batch=4, low_px=16, levels=2)
    for target in batch.levels:
        means = [part.mean((2, 3)) for part in (batch.low, target)]
        assert float((means[0] - means[1]).abs().max()) < 0.01


def test_holes_are_of_films_too(monkeypatch, tmp_path):
    cover = np.zeros((60, 60), np.uint8)
    cv2.circle(cover, (30, 30), 8, 255, -1)
    films = tmp_path / "film_damage"
    films.mkdir()
    cv2.imwrite(str(films / "o.png"), np.dstack([np.full((60, 60, 3), 255, np.uint8), cover]))
    cv2.imwrite(str(tmp_path / "p.png"), soft_noise(128, 128))
    monkeypatch.setattr(dataset, "FILM", 1.0)
    monkeypatch.setattr(dataset, "damage_mask", lambda *_, **__: np.zeros((64, 64), bool))
    pictures = Pictures(find(tmp_path)[-1:], overlays=Overlays(find(films)))
    assert (len(pictures), len(pictures.overlays)) == (1, 1)
    shares = [
        float(damaged_batch(pictures, seed=(n,), batch=1, guide_px=32, factor=2, window_px=32).missing.mean())
        for n in range(12)
    ]
    assert 0.005 < np.median(shares) < 0.5
