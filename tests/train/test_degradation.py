"""Bad copies: what each step does to a picture, against what is known of it."""

from dataclasses import replace
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from engine.models.cra_srgan.generator import CraSrgan
from engine.train import degradation
from engine.train.dataset import Pictures, ScaleBatch, batch_of, scale_batch
from engine.train.degradation import FIRST, SECOND, degraded
from engine.train.recipes import RECIPES
from engine.train.step import super_resolution_loss
from tests.train.conftest import soft_noise

ORDERS = pytest.mark.parametrize("order", [FIRST, SECOND], ids=["first", "second"])
SEEDS = range(12)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_copy_follows_from_its_seed_and_has_the_size():
    picture = soft_noise(120, 96)
    copies = [degraded(picture, (30, 24), rng(seed)) for seed in (1, 1, 2)]
    assert copies[0].shape == (30, 24, 3)
    assert np.array_equal(copies[0], copies[1])
    assert not np.array_equal(copies[0], copies[2])


def test_a_copy_is_worse_than_a_reduction_and_still_the_picture():
    picture = soft_noise(128, 128)
    small = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX), np.float64)
    copies = [degraded(picture, (32, 32), rng(seed)) for seed in range(20)]
    alike, turned = ([np.corrcoef(copy[::step].ravel(), small.ravel())[0, 1] for copy in copies] for step in (1, -1))
    assert max(alike) < 0.999
    assert np.median(alike) > 0.5 > 2 * np.median(np.abs(turned))


@ORDERS
def test_blur_keeps_what_is_flat_and_takes_detail(order):
    flat = np.full((16, 16, 3), 90.0, np.float32)
    noise = rng(0).uniform(0, 255, (16, 16, 3)).astype(np.float32)
    kept = []
    for seed in range(200):
        assert np.abs(degradation._blurred(flat, order, rng(seed)) - 90).max() < 1e-3
        kept.append(degradation._blurred(noise, order, rng(seed)).std() / noise.std())
    assert np.mean(np.array(kept) < 1) == pytest.approx(order.blurred, abs=0.07)
    assert np.median(kept) < 0.6


def test_a_round_blur_is_that_of_opencv():
    noise = rng(0).uniform(0, 255, (40, 48, 3)).astype(np.float32)
    wanted = [cv2.GaussianBlur(noise, (side, side), 3.0) for side in range(7, 22, 2)]
    used = set()
    for seed in range(40):
        found = degradation._blurred(noise, replace(FIRST, sigma_px=(3.0, 3.0)), rng(seed))
        errors = [np.abs(found - one).max() for one in wanted]
        assert min(errors) < 0.01
        used.add(int(np.argmin(errors)))
    assert used == set(range(8))


def test_blurs_may_be_wider_in_any_direction(monkeypatch):
    monkeypatch.setattr(degradation, "_ISOTROPIC", 0.0)
    point, grid = np.zeros((31, 31, 3), np.float32), np.mgrid[-15:16, -15:16]
    point[15, 15] = 1
    order = replace(FIRST, sigma_px=(0.8, 1.5))
    spread = [degradation._blurred(point, order, rng(seed))[..., 0] for seed in range(40)]
    moments = np.einsum("aij,bij,nij->nab", grid, grid, spread)
    deviations_px = np.linalg.eigvalsh(moments) ** 0.5
    assert 0.79 < deviations_px.min() < deviations_px.max() < 1.51
    assert (deviations_px[:, 1] / deviations_px[:, 0]).max() > 1.4
    assert moments[:, 0, 1].min() < -0.3 < 0.3 < moments[:, 0, 1].max()


@ORDERS
def test_sizes_in_between_are_as_said_and_filters_differ(order):
    picture, matches, factors = rng(0).uniform(0, 255, (40, 60, 3)).astype(np.float32), [], []
    for seed in range(150):
        found = degradation._resized(picture, order, (80, 120), rng(seed))
        h, w = found.shape[:2]
        assert abs(h / 80 - w / 120) <= 1 / 80
        factors.append(w / 120)
        ways = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
        wanted = [cv2.resize(picture, (w, h), interpolation=way) for way in ways]
        matches.append([int(np.allclose(found, one, atol=1e-2)) for one in wanted])
    matching = np.array(matches)
    assert matching.any(1).all()
    assert matching[matching.sum(1) == 1].sum(0).min() > 25
    assert order.factor[0] - 0.01 < min(factors) < order.factor[0] + 0.1
    assert order.factor[1] - 0.1 < max(factors) < order.factor[1] + 0.01
    assert np.mean(np.array(factors) > 1) == pytest.approx(order.larger, abs=0.1)
    assert np.mean(np.array(factors) < 1) == pytest.approx(order.smaller, abs=0.1)


@ORDERS
def test_noise_is_as_strong_as_said(order, monkeypatch):
    flat = np.full((200, 200, 3), 100.0, np.float32)
    monkeypatch.setattr(degradation, "_GAUSSIAN", 1.0)
    found = [degradation._noisy(flat, order, rng(seed)) for seed in SEEDS]
    assert all(order.noise[0] * 0.9 < one.std() < order.noise[1] * 1.1 for one in found)
    grey = [np.ptp(one - one[..., :1]) == 0 for one in found]
    assert any(grey)
    assert not all(grey)
    monkeypatch.setattr(degradation, "_GAUSSIAN", 0.0)
    for seed in SEEDS:
        scale = degradation._noisy(flat, order, rng(seed)).std() / 100**0.5  # counted photons: the root of the light
        assert order.shot[0] * 0.9 < scale < order.shot[1] * 1.1


@ORDERS
def test_compression_is_that_of_another_program(order):
    picture = soft_noise(64, 64)
    for seed in SEEDS:
        quality = int(rng(seed).integers(order.quality[0], order.quality[1] + 1))
        data = BytesIO()
        Image.fromarray(picture).save(data, "JPEG", quality=quality, subsampling="4:2:0")
        wanted = np.asarray(Image.open(data), np.float64)
        found = degradation._compressed(picture.astype(np.float32), order, rng(seed))
        assert np.abs(found - wanted).mean() < 1.0
        assert np.abs(found[..., ::-1] - wanted).mean() > 5  # red for blue would show


def test_the_recipe_draws_bad_copies_and_learns_to_correct_them(pictures: Pictures):
    recipe = RECIPES["lite_scan"]()
    (stage,) = recipe.stages
    batch = batch_of(pictures, stage, seed=1, step=0)
    clean = batch_of(pictures, RECIPES["lite"]().stages[3], seed=1, step=0)
    assert isinstance(batch, ScaleBatch)
    assert isinstance(clean, ScaleBatch)
    network = CraSrgan(recipe.model, padding="same")
    copies = scale_batch(pictures, seed=(1,), batch=2, low_px=16, levels=1, bad=True)
    super_resolution_loss(network, copies, stage.losses).loss.backward()
    assert network.local.clean is not None
    assert network.local.clean.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    assert any(name.startswith(stage.trains) for name, _ in network.named_parameters() if ".clean." in name)


def test_only_the_input_is_bad(pictures: Pictures):
    good, bad = (scale_batch(pictures, seed=(3,), batch=2, low_px=16, levels=2, bad=bad) for bad in (False, True))
    assert all((one == other).all() for one, other in zip(good.levels, bad.levels, strict=True))
    assert (good.low - bad.low).abs().mean() > 0.005
