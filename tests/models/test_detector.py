"""The detector: tiles are exact, and a logit depends on no more than its context."""

import numpy as np
import pytest
import torch

from engine import detection
from engine.detection import DamageDetector
from engine.errors import ModelError
from engine.image import ArrayPicture
from engine.models.checkpoint import load, load_detector, read_card
from engine.models.detector import Detector
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
