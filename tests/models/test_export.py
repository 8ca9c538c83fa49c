"""The enlargement as a graph for other programs: the values that the engine rounds, and honest refusals."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from engine.cli import app
from engine.errors import ModelError, OutputExists, PlanError
from engine.models import export as exporting
from engine.models.checkpoint import load
from engine.models.export import Enlargement, export
from engine.request import Request
from engine.restoration import Restorer
from tests.networks import TINY, random_checkpoint


@pytest.fixture
def model(tmp_path):
    return random_checkpoint(tmp_path, TINY)


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_it_makes_what_the_engine_makes(model, scale, tmp_path):
    pixels = np.random.default_rng(scale).integers(0, 256, (64, 88, 3), np.uint8)
    made = Restorer(model=str(model)).array(pixels, None, Request(scale=scale), scratch=tmp_path).astype(int)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        enlarged = Enlargement(load(str(model)).network.local, scale=scale)(picture)
    found = (enlarged[0].permute(1, 2, 0).numpy() * 255).round().astype(int)
    assert np.abs(found - made).max() <= 1  # where a sum of floats ends on either side of a half
    assert (found != made).mean() < 0.001


@pytest.mark.parametrize("to", ["onnx", "openvino", "torchscript"])
def test_what_was_written_runs_elsewhere_and_agrees(model, to, tmp_path):
    path, difference = export(load(str(model)), tmp_path / "graphs", to=to, scale=2)
    assert path.exists()
    assert 0 <= difference <= exporting.TOLERANCE
    with pytest.raises(OutputExists):
        export(load(str(model)), tmp_path / "graphs", to=to, scale=2)


def test_onnx_says_what_it_is_and_takes_other_sizes(model, tmp_path):
    checkpoint = load(str(model))
    path, _ = export(checkpoint, tmp_path, to="onnx", scale=4)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert (told["weights_sha256"], told["scale"], told["align_px"]) == (checkpoint.card.sha256, "4", "8")
    picture = torch.rand(3, 3, 120, 64)
    with torch.inference_mode():
        expected = Enlargement(checkpoint.network.local, scale=4)(picture).numpy()
    assert np.abs(session.run(None, {"picture": picture.numpy()})[0] - expected).max() <= exporting.TOLERANCE


def test_a_graph_that_differs_is_not_given_out(model, tmp_path, monkeypatch):
    suffix, write = exporting._WRITERS["torchscript"]

    def wrong(*arguments):
        run = write(*arguments)
        return lambda picture: run(picture) + np.float32(2e-4)

    monkeypatch.setitem(exporting._WRITERS, "torchscript", (suffix, wrong))
    with pytest.raises(ModelError, match="differs from torch"):
        export(load(str(model)), tmp_path / "graphs", to="torchscript", scale=2)
    assert not (tmp_path / "graphs").exists()


def test_what_cannot_be_had_is_refused_before_work(model, tmp_path, monkeypatch):
    checkpoint = load(str(model))
    for scale in (1, 3):
        with pytest.raises(PlanError, match="one of 2, 4, 8, 16"):
            export(checkpoint, tmp_path, to="onnx", scale=scale)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PlanError, match=r"onnxruntime; pip install 'cra-srgan-engine\[openvino\]'"):
        export(checkpoint, tmp_path, to="onnx", scale=2)


def test_the_command_tells_how_much_it_differs(model, tmp_path):
    command = ["model", "export", "--model", str(model), "--to", "torchscript", "--scale", "2", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "differs from torch by 0.0e+00 at most" in found.output
    assert CliRunner().invoke(app, command).exit_code == 4
    assert CliRunner().invoke(app, [*command, "--replace"]).exit_code == 0
