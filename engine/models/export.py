"""The enlargement as one graph for other programs: ONNX, OpenVINO, TorchScript.

What leaves the engine is the local half with its learned null guide, for pictures of which nothing is missing. Holes
need the whole picture (the guide), and pictures of any size need tiles: both stay with the engine.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import ModelError, PlanError
from engine.models.checkpoint import Checkpoint
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.local import LocalHalf
from engine.store import refuse_existing, write_atomic

TOLERANCE = 1e-4
"""The most by which a value in [0, 1] may differ from torch's."""
_OPSET = 20
_LEAST_SIDE_PX = 64
_MOST_SIDE_PX, _MOST_BATCH = 8192, 64
_TRACED = 2, 3, 72, 80
_TRIED = (2, 3, 72, 80), (1, 3, 96, 64)

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Enlargement(nn.Module):
    """(B, 3, H, W) in [0, 1] → (B, 3, scale * H, scale * W) in [0, 1]; H and W multiples of 8 and at least 64.

    Mirrored at its borders as the engine mirrors a picture: the values are those that `engine restore` rounds.
    """

    def __init__(self, local: LocalHalf, *, scale: int) -> None:
        super().__init__()
        self._local, self._levels = local, scale.bit_length() - 1
        self._margin_px = local.encode_margin_px(self._levels)

    def forward(self, picture: Tensor) -> Tensor:
        grown = F.pad(picture, (self._margin_px,) * 4, mode="reflect")
        batch, _, h, w = grown.shape
        guide = self._local.null_guide.expand(batch, -1, h, w)
        features, composite = self._local.encode(grown, torch.zeros_like(grown[:, :1]), guide, self._levels)
        return self._local.decode(features, composite, self._levels)[-1].clamp(0, 1)


def export(checkpoint: Checkpoint, folder: Path, *, to: str, scale: int, replace: bool = False) -> tuple[Path, float]:
    """Writes the graph of a scale as `<model>-x<scale>` into a folder: its path, and its largest difference from torch.

    to: onnx, openvino (an .xml and a .bin) or torchscript. Raises PlanError for a scale that cannot be had or a missing
    package, OutputExists, and ModelError where the graph, run by the other program, differs by more than `TOLERANCE`.
    """
    card = checkpoint.card
    enlarging = [each for each in card.scales if each > 1]
    if scale not in enlarging:
        raise PlanError(f"scale {scale}: the graph enlarges by one of {', '.join(map(str, enlarging))}")
    suffix, write = _WRITERS[to]
    path = folder / f"{card.name}-x{scale}{suffix}"
    refuse_existing(path, replace=replace)
    module = Enlargement(checkpoint.network.local, scale=scale).eval()
    about = {
        "model": card.name,
        "weights_sha256": card.sha256,
        "licence": card.licence,
        "scale": str(scale),
        "align_px": str(card.align_px),
        "context_px": str(card.context_px[str(scale)]),
    }
    with tempfile.TemporaryDirectory(prefix="engine-export-") as name, exporting_quietly(), torch.inference_mode():
        made = Path(name) / path.name
        try:
            run = write(module, made, about)
        except ImportError as error:
            raise PlanError(f"{to} needs the package {error.name}; pip install 'cra-srgan-engine[openvino]'") from error
        difference = max(_difference(module, run, shape) for shape in _TRIED)
        if difference > TOLERANCE:
            raise ModelError(f"{path}: differs from torch by {difference:.1e}, {TOLERANCE:.0e} is the most; report it")
        for file in sorted(made.parent.iterdir(), key=lambda each: each == made):  # weights beside it first
            write_atomic(folder / file.name, file.read_bytes())
    return path, difference


def _difference(module: Enlargement, run: Run, shape: tuple[int, ...]) -> float:
    picture = torch.rand(shape, generator=torch.Generator().manual_seed(shape[2]))
    return float(np.abs(module(picture).numpy() - run(picture.numpy())).max())


def _onnx(module: Enlargement, path: Path, about: dict[str, str]) -> Run:
    import onnxruntime

    onnx, runtime = cast("Any", torch.onnx), cast("Any", onnxruntime)
    align = CraSrgan.ALIGN_PX
    least, most = _LEAST_SIDE_PX // align, _MOST_SIDE_PX // align
    sides = {2 + n: align * torch.export.Dim(name, min=least, max=most) for n, name in enumerate("hw")}
    with torch.inference_mode(mode=False), torch.no_grad():
        program = onnx.export(
            module,
            (torch.rand(_TRACED),),
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes={"picture": {0: torch.export.Dim("n", min=1, max=_MOST_BATCH), **sides}},
            input_names=["picture"],
            output_names=["enlarged"],
            verbose=False,
        )
    program.model.metadata_props.update(about)
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda picture: session.run(None, {"picture": picture})[0]


def _openvino(module: Enlargement, path: Path, about: dict[str, str]) -> Run:
    import openvino

    step = path.with_suffix(".onnx")
    _onnx(module, step, about)
    model = cast("Any", openvino).convert_model(str(step))
    step.unlink()
    for key, value in about.items():
        model.set_rt_info(value, [key])
    openvino.save_model(model, str(path), compress_to_fp16=False)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda picture: compiled(picture)[0]


def _torchscript(module: Enlargement, path: Path, about: dict[str, str]) -> Run:
    jit = cast("Any", torch.jit)
    traced = jit.trace(module, torch.rand(_TRACED), check_trace=False)
    jit.save(traced, str(path), _extra_files=about)
    loaded = jit.load(str(path))
    return lambda picture: loaded(torch.as_tensor(picture)).numpy()


_WRITERS: dict[str, tuple[str, Callable[[Enlargement, Path, dict[str, str]], Run]]] = {
    "onnx": (".onnx", _onnx),
    "openvino": (".xml", _openvino),
    "torchscript": (".pt", _torchscript),
}
"""Each writes, reads again what it has written, and tells how to run it."""


@contextmanager
def exporting_quietly() -> Generator[None]:
    """Without what exporters tell their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
