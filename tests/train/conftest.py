"""Pictures to train on."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.train.dataset import Pictures
from engine.train.sources import find


def soft_noise(h: int, w: int, *, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8: blobs of about 8 px."""
    noise = np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    cv2.imwrite(str(folder / "a.png"), soft_noise(96, 96))
    return folder


@pytest.fixture(scope="package")
def pictures(tmp_path_factory) -> Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), soft_noise(192, 192, seed=seed))
    return Pictures(find(folder))
