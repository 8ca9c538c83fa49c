"""The detector: tiles are exact, and a logit depends on no more than its context."""

import numpy as np
import pytest
import torch
from torch import nn

from engine import detection
from engine.detection import DamageDetector
from engine.errors import ModelError
from engine.image import ArrayPicture
from engine.models.card import read_card
from engine.models.checkpoint import load, load_detector
from engine.models.cra_srgan.layers import crop
from engine.models.detector import Detector
from engine.models.detector_config import DetectorConfig
from tests.networks import TINY, random_checkpoint, random_detector
from tests.train.conftest import soft_noise


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_detector(tmp_path_factory.mktemp("detector")))


def found(model: str, picture: np.ndarray) -> np.ndarray:
    return np.concatenate([*DamageDetector(model).strips(ArrayPicture(picture))])


@pytest.mark.parametrize("shape", [(300, 420), (97, 350), (20, 9)])
def test_a_mask_is_the_same_whatever_the_tiles_are(model, shape, monkeypatch):
    picture = soft_noise(304, 424)[: shape[0], : shape[1]]
    whole = found(model, picture)
    assert whole.shape == shape
    if min(shape) > 50:
        assert 0.1 < whole.mean() < 0.9
    for tile_px in (64, 100):
        monkeypatch.setattr(detection, "TILE_PX", tile_px)
        assert np.array_equal(found(model, picture), whole)


def test_less_context_would_be_seen(model, monkeypatch):
    picture = soft_noise(304, 424)
    whole = found(model, picture)
    monkeypatch.setattr(detection, "TILE_PX", 64)
    monkeypatch.setattr(Detector, "CONTEXT_PX", 32)
    assert not np.array_equal(found(model, picture), whole)


def test_the_context_is_what_reaches_a_pixel(model):
    network = load_detector(model)[1].double()
    picture = torch.rand(1, 3, 512, 512, dtype=torch.float64, requires_grad=True)
    for place in (256, 271):
        (slope,) = torch.autograd.grad(network(picture)[0, 0, place, place], picture)
        ys, xs = torch.nonzero(slope[0].abs().sum(0), as_tuple=True)
        reach = max(int((axis - place).abs().max()) for axis in (ys, xs))
        assert 48 < reach <= Detector.CONTEXT_PX


def test_a_detector_is_no_generator(model, tmp_path):
    assert read_card(load_path(model)).task == "detect"
    with pytest.raises(ModelError, match="'joint' is needed"):
        load(model)
    with pytest.raises(ModelError, match="'detect' is needed"):
        load_detector(str(random_checkpoint(tmp_path, TINY)))


def load_path(model: str):
    from pathlib import Path

    return Path(model)


@torch.no_grad()
def test_convolutions_begin_as_loud_as_relu_needs_and_branches_quiet():
    """Noise of variance 1 leaves with 2, which a ReLU halves again; branches and the last layer leave 0.04 of it."""
    network = Detector(DetectorConfig())
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            found = crop(layer(torch.randn(1, layer.in_channels, 34, 34)), 2)
            wanted = 0.08 if name == "leave" or name.endswith(".second") else 2
            assert float(found.var()) == pytest.approx(wanted, rel=0.25), name
            assert float(found.mean()) == pytest.approx(-3 if name == "leave" else 0, abs=0.1), name


@torch.no_grad()
def test_an_untrained_detector_expects_little_damage_anywhere():
    probability = Detector(DetectorConfig()).probability(torch.rand(2, 3, 64, 64))
    assert 0.03 < float(probability.mean()) < 0.1
    assert (probability > 0.5).float().mean() < 0.01
