"""Post-training quantisation of the exported enlargement to 8 bit integers, static, in QDQ form (ONNX Runtime).

The wide convolutions are quantised: weights per channel, activations by the least and the greatest value that they take
on pictures like those to come. What carries colour as it is, the fixed bicubic kernels and the first layer, stays.
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import PlanError
from engine.models.checkpoint import Checkpoint
from engine.models.export import export, exporting_quietly
from engine.store import refuse_existing, write_atomic
from engine.train.dataset import Pictures, ScaleBatch, scale_batch
from engine.train.sources import find

CALIBRATED, HELD_OUT = 24, 12
"""Crops."""
LOW_PX = 96
WIDE = 16
"""Channels, in and out, of a convolution that is quantised."""

Session = Any


def quantize(
    checkpoint: Checkpoint, data: Path, folder: Path, *, scale: int, replace: bool = False
) -> tuple[Path, float]:
    """Writes `<model>-x<scale>-int8.onnx` into a folder: its path, and what it loses in dB PSNR.

    data: a folder of pictures; crops are reduced by `scale`, some to calibrate with, others to compare both graphs on.
    Raises what `export` and `Pictures` raise.
    """
    path = folder / f"{checkpoint.card.name}-x{scale}-int8.onnx"
    refuse_existing(path, replace=replace)
    try:
        import onnx
        import onnxruntime
        from onnxruntime import quantization
    except ImportError as error:
        raise PlanError(f"int8 needs the package {error.name}; pip install 'cra-srgan-engine[openvino]'") from error
    load = cast("Any", onnx).load
    pictures = Pictures(find(data))
    levels = scale.bit_length() - 1
    known, held_out = (
        scale_batch(pictures, seed=(0, number), batch=count, low_px=LOW_PX, levels=levels)
        for number, count in enumerate((CALIBRATED, HELD_OUT))
    )
    with tempfile.TemporaryDirectory(prefix="engine-quantize-") as name, exporting_quietly():
        exact, _ = export(checkpoint, Path(name), to="onnx", scale=scale)
        model = load(str(exact))
        rounded = Path(name) / path.name
        cast("Any", quantization).quantize_static(
            str(exact),
            str(rounded),
            _Reader(known.low.numpy()),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=_wide(model),
        )
        made = load(str(rounded))
        onnx.helper.set_model_props(made, {one.key: one.value for one in model.metadata_props} | {"precision": "int8"})
        graphs = model.SerializeToString(), made.SerializeToString()
        before, after = (
            _psnr_db(cast("Any", onnxruntime).InferenceSession(graph, providers=["CPUExecutionProvider"]), held_out)
            for graph in graphs
        )
        write_atomic(path, graphs[1])
    return path, before - after


class _Reader:
    """What ONNX Runtime calibrates with: one picture after another."""

    def __init__(self, pictures: NDArray[np.float32]) -> None:
        self._left = iter(pictures[:, None])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        picture = next(self._left, None)
        return None if picture is None else {"picture": picture}


def _wide(model: Any) -> list[str]:  # noqa: ANN401
    """Names of the convolutions that are quantised."""
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    weights = {node.name: shapes[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}
    return [name for name, shape in weights.items() if min(shape[:2]) >= WIDE]


def _psnr_db(session: Session, batch: ScaleBatch) -> float:
    """The mean of the crops'."""
    made = torch.as_tensor(session.run(None, {"picture": batch.low.numpy()})[0])
    errors = (made - batch.levels[-1]).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())
