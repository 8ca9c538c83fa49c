"""Golden pixels: what a plan of this `PIXEL_VERSION` has always given, to the one level that processors differ by.

A change that moves these pixels would mix with the work of finished archives: raise `PIXEL_VERSION`, say so in the
changelog, then renew the file with `python -m tests.test_pixel_version`.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from engine.models.checkpoint import save
from engine.models.cra_srgan.generator import CraSrgan
from engine.planning import PIXEL_VERSION
from engine.request import Request
from engine.restoration import Restorer
from tests.networks import TINY

SIZES = replace(TINY, head_cell_px=1, head_dilations=(1,))
GOLDEN = Path(__file__).parent / "golden_pixels.json"


def waves(num: int, phase: float, amplitude: float) -> torch.Tensor:
    """`num` numbers that no random generator's version can change."""
    return amplitude * torch.sin(torch.arange(num, dtype=torch.float64) * 1.7 + phase).float()


def restorer(folder: Path) -> Restorer:
    network = CraSrgan(SIZES).eval()
    weights = {
        name: waves(parameter.numel(), index, fan_in(parameter) ** -0.5).reshape(parameter.shape)
        for index, (name, parameter) in enumerate(network.named_parameters())
    }
    path = folder / "waves.safetensors"
    save(path, weights, config=SIZES, name="waves", degradation="clean", licence="", training={}, numbers={})
    return Restorer(model=str(path))


def fan_in(parameter: torch.Tensor) -> int:
    return max(1, parameter[0].numel()) if parameter.ndim > 1 else 25


def drawn(folder: Path) -> dict[str, list[int]]:
    y, x = np.mgrid[:600, :40]
    picture = np.stack([128 + 100 * np.sin(x / (3 + c) + y / 11) for c in range(3)], -1).astype(np.uint8)
    mask = (x - 20) ** 2 + (y % 60 - 30) ** 2 < 100
    made = restorer(folder)
    found: dict[str, list[int]] = {}
    for scale, rows in ((1, slice(0, 600, 37)), (4, slice(0, 2400, 149))):
        pixels = made.array(picture, mask, Request(scale=scale), scratch=folder)
        found[f"x{scale}"] = pixels[rows, :: 9 * scale].reshape(-1).tolist()
    return found


@pytest.mark.slow
def test_pixels_are_those_of_this_version(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    assert golden["pixel_version"] == PIXEL_VERSION
    for name, pixels in drawn(tmp_path).items():
        wanted = np.array(golden["pixels"][name])
        assert np.ptp(wanted) > 100, "a flat picture guards nothing"
        assert np.abs(np.array(pixels) - wanted).max() <= 1, name


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps({"pixel_version": PIXEL_VERSION, "pixels": drawn(Path(name))}) + "\n")
