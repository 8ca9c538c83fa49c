"""The exported enlargement beside the engine's own, x4: how far it is, what it loses, how long it takes.

    python bench/graphs.py --kodak DIR --pictures DIR [--limit N] [--repeats N]

Each picture of --kodak is cut to a multiple of 32, reduced by antialiased bicubic and rounded to 8 bits. All runtimes
get two threads. PSNR is on luma without a border of 4 px, against the picture; the seconds are the median over pictures
and repeats, all runtimes after one another on each picture. `bf16` is OpenVINO's hint, which a processor without such
instructions may carry out otherwise. --pictures: the int8 graph is calibrated on crops of them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import cv2
import numpy as np
import onnxruntime
import openvino
import torch
from _batch_setup import record
from numpy.typing import NDArray

from engine.evaluate.baselines import bicubic_down
from engine.evaluate.metrics import psnr_y
from engine.models.checkpoint import load
from engine.models.export import Enlargement, export
from engine.train.quantize import quantize

SCALE, THREADS = 4, 2
MOST_DIFFERENCE, MOST_LOSS_DB = 1e-4, 0.15
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kodak", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        runs = runtimes(Path(name), options.pictures)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    quality: dict[str, list[float]] = {name: [] for name in runs}
    furthest = dict.fromkeys(runs, 0.0)
    for path in sorted(options.kodak.iterdir())[: options.limit]:
        whole = cv2.imread(str(path))[..., ::-1]
        high = whole[: whole.shape[0] // 32 * 32, : whole.shape[1] // 32 * 32]
        low = bicubic_down(high, SCALE).transpose(2, 0, 1)[None] / np.float32(255)
        expected = runs["torch"](low)
        for name, run in runs.items():
            for _ in range(options.repeats):
                started = time.perf_counter()
                made = run(low)
                seconds[name].append(time.perf_counter() - started)
            furthest[name] = max(furthest[name], float(np.abs(made - expected).max()))
            pixels = (made[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
            quality[name].append(psnr_y(pixels, high, crop_px=SCALE))
    found: dict[str, dict[str, float]] = {
        name: {
            "psnr_y_db": round(fmean(quality[name]), 3),
            "loss_db": round(fmean(quality["torch"]) - fmean(quality[name]), 4),
            "largest_difference": float(f"{furthest[name]:.1e}"),
            "seconds": round(median(seconds[name]), 3),
        }
        for name in runs
    }
    for name, figures in found.items():
        print(name, figures, flush=True)
    exact = all(found[name]["largest_difference"] <= MOST_DIFFERENCE for name in ("onnx", "openvino"))
    holds = exact and found["onnx int8"]["loss_db"] <= MOST_LOSS_DB
    record("graphs x4", {**found, "pictures": len(quality["torch"]), "holds": holds}, into="graphs")
    raise SystemExit(0 if holds else 1)


def runtimes(folder: Path, pictures: Path) -> dict[str, Run]:
    checkpoint = load("lite")
    module = Enlargement(checkpoint.network.local, scale=SCALE).eval()
    graph, _ = export(checkpoint, folder, to="onnx", scale=SCALE)
    other, _ = export(checkpoint, folder, to="openvino", scale=SCALE)
    rounded, _ = quantize(checkpoint, pictures, folder, scale=SCALE)

    def by_torch(picture: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(torch.as_tensor(picture)).numpy()

    return {
        "torch": by_torch,
        "onnx": by_onnx(graph),
        "openvino": by_openvino(other, "f32"),
        "openvino bf16": by_openvino(other, "bf16"),
        "onnx int8": by_onnx(rounded),
    }


def by_onnx(path: Path) -> Run:
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda picture: session.run(None, {"picture": picture})[0]


def by_openvino(path: Path, precision: str) -> Run:
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS}
    compiled: Any = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda picture: compiled(picture)[0]


if __name__ == "__main__":
    main()
