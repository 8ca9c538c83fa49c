"""Post-training quantisation: the wide convolutions in 8 bits, close to the exact graph, and told how close."""

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from skimage import data as pictures

from engine.errors import OutputExists, TrainingError
from engine.models.checkpoint import load
from engine.models.export import export
from engine.train.quantize import quantize
from tests.networks import TINY, random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "coffee"):
        cv2.imwrite(str(made / f"{name}.png"), getattr(pictures, name)()[..., ::-1])
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load(str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY)))


def test_the_wide_convolutions_are_rounded_and_little_is_lost(checkpoint, folder, tmp_path):
    path, loss_db = quantize(checkpoint, folder, tmp_path, scale=2)
    exact, _ = export(checkpoint, tmp_path, to="onnx", scale=2)
    made, before = onnx.load(path), onnx.load(exact)
    rounded = {out.input[0] for out in made.graph.node if out.op_type == "DequantizeLinear"}
    narrow = [one.name for one in before.graph.initializer if len(one.dims) == 4 and min(one.dims[:2]) < 16]
    assert sum(one.op_type == "QuantizeLinear" for one in made.graph.node) > 4
    wide = [one.name for one in before.graph.initializer if len(one.dims) == 4 and min(one.dims[:2]) >= 16]
    assert narrow
    assert any(f"{name}_quantized" in rounded for name in wide)
    assert not any(f"{name}_quantized" in rounded for name in narrow)
    told = {one.key: one.value for one in made.metadata_props}
    assert (told["precision"], told["scale"], told["weights_sha256"]) == ("int8", "2", checkpoint.card.sha256)
    picture = np.ascontiguousarray(
        pictures.chelsea()[:128, :160].transpose(2, 0, 1)[None] / np.float32(255), np.float32
    )
    one, other = (
        onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"]).run(None, {"picture": picture})[0]
        for each in (exact, path)
    )
    assert 0 < np.abs(one - other).mean() < 0.01
    assert abs(loss_db) < 1
    with pytest.raises(OutputExists):
        quantize(checkpoint, folder, tmp_path, scale=2)


def test_without_pictures_nothing_is_made(checkpoint, tmp_path):
    with pytest.raises(TrainingError, match="0 training pictures"):
        quantize(checkpoint, tmp_path, tmp_path / "out", scale=2)
    assert not (tmp_path / "out").exists()
