"""Quality of a model beside chains of what others use, on folders of intact reference pictures.

    python bench/quality.py [--SET DIR]... [--peers DIR] [--model FILE] [--task TASK] [--limit N] [--out FILE] [--card]

The low-resolution input is the reference, cut to a multiple of the scale, reduced by antialiased bicubic and rounded
to 8 bits; for models of bad copies, degraded twice (blur, resizing, noise, JPEG; seed: index of the picture). Damage is
drawn on the input: `damage_mask(size, seed=index of the picture, share=...)`; what lies under it is overwritten.

The others: at scale 1 Telea and Navier-Stokes (radius 3 and 5) and biharmonic inpainting; enlarged, each of the first
four before each of bicubic, Lanczos and the x4 networks of `--peers` (ONNX; x16 is x4 twice), the whole picture at once
and with the mask as given. Shown is the best of them: the one with the best mean, for each set, task and metric.

PSNR and SSIM of enlargements are of luma without a border as wide as the scale; GMSD of the whole picture. Inside holes
PSNR is of RGB, SSIM of luma, and the gradient energy of luma is a share of the reference's.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from skimage.restoration import inpaint_biharmonic

from engine.evaluate.baselines import bicubic_down, bicubic_up, navier_stokes, telea
from engine.evaluate.metrics import gmsd, gradient_energy, psnr, psnr_y, ssim_y
from engine.geometry import Size
from engine.models.card import find
from engine.models.checkpoint import with_numbers
from engine.request import Request
from engine.restoration import Restorer
from engine.train.damage import HEAVY, LIGHT, MEDIUM, damage_mask
from engine.train.degradation import degraded

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNDER_THE_MASK = 255
PEER_SCALE = 4

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Restore = Callable[[Image, Mask | None, int], Image]
Scores = dict[str, dict[str, float]]
"""Metric → method → value."""


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of damage and one scale."""

    name: str
    scale: int
    share: tuple[float, float] | None = None
    """Least and most missing share of the input; None leaves it intact."""
    degraded: bool = False


X2, X4 = Task("x2", 2), Task("x4", 4)
WHOLE = (
    X2,
    X4,
    Task("joint-x4-light", 4, LIGHT),
    Task("joint-x4-medium", 4, MEDIUM),
    Task("holes-light", 1, LIGHT),
    Task("holes-medium", 1, MEDIUM),
    Task("holes-heavy", 1, HEAVY),
    Task("scan-x4", 4, degraded=True),
)
SETS = {
    "set5": (X2, X4),
    "set14": (X2, X4),
    "kodak": WHOLE,
    "gb82": WHOLE,
    "photos": (Task("joint-x16-light", 16, LIGHT),),
}


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
        cv2.setNumThreads(options.threads)
    restorer = Restorer(model=options.model)
    card = restorer.checkpoint.card
    others = {"lite": Restorer()} if card.name != "lite" else {}
    peers = [Peer(path, options.threads) for path in sorted(options.peers.glob("*.onnx"))] if options.peers else []
    folders = {name: getattr(options, name) for name in SETS if getattr(options, name) is not None}
    rows: dict[str, dict[str, dict[str, Scores]]] = {}
    print(__doc__, file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        own = {name: _restore(one, Path(scratch)) for name, one in {"ours": restorer, **others}.items()}
        for name, folder in folders.items():
            tasks = [
                task
                for task in SETS[name]
                if (not options.task or task.name in options.task) and task.degraded == (card.degradation == "scan")
            ]
            rows[name] = measure_set(folder, tasks, own, peers, limit=options.limit)
    numbers = summary(rows)
    shown = "python bench/quality.py " + " ".join(f"--{name} {name.upper()}" for name in folders)
    shown += f" --peers {'+'.join(peer.name for peer in peers)}" if peers else ""
    print(table(numbers))
    if options.out:
        report = {"model": card.name, "sha256": card.sha256, "command": shown, "summary": numbers, "pictures": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(table(numbers) + "\n", encoding="utf-8")
    if options.card:
        with_numbers(find(options.model or card.name), {"command": shown, **numbers})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SETS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="folder of reference pictures")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of x4 networks, .onnx")
    parser.add_argument("--limit", type=int, help="only the first N pictures of each set")
    names = sorted({task.name for tasks in SETS.values() for task in tasks})
    parser.add_argument("--task", action="append", choices=names, help="only these")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; a Markdown table is written beside it")
    parser.add_argument("--model", help="embedded name or .safetensors file")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of the networks; all processors where not given"
    )
    parser.add_argument("--card", action="store_true", help="write the summary on the model's card")
    options = parser.parse_args()
    if not any(getattr(options, name) for name in SETS):
        parser.print_usage(sys.stderr)
        print("no folder of pictures was given, so nothing is measured", file=sys.stderr)
        raise SystemExit(0)
    return options


def _restore(restorer: Restorer, scratch: Path) -> Restore:
    return lambda pixels, mask, scale: restorer.array(pixels, mask, Request(scale=scale), scratch=scratch)


class Peer:
    """A x4 network of others: (1, 3, h, w) float32 RGB in [0, 1] to four times the size, in one piece."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.name = path.stem.removesuffix("_x4")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Image, scale: int) -> Image:
        given = (pixels.astype(np.float32) / 255).transpose(2, 0, 1)[None]
        (made,) = self._session.run(None, {self._session.get_inputs()[0].name: np.ascontiguousarray(given)})
        enlarged = np.rint(255 * np.clip(made[0].transpose(1, 2, 0), 0, 1)).astype(np.uint8)
        return enlarged if scale == PEER_SCALE else self(enlarged, scale // PEER_SCALE)


def lanczos(pixels: Image, scale: int) -> Image:
    h, w = pixels.shape[:2]
    return cv2.resize(pixels, (w * scale, h * scale), interpolation=cv2.INTER_LANCZOS4).astype(np.uint8)


def biharmonic(pixels: Image, mask: Mask) -> Image:
    filled = inpaint_biharmonic(pixels / 255.0, mask, split_into_regions=True, channel_axis=-1)
    return np.where(mask[..., None], np.rint(255 * np.clip(filled, 0, 1)), pixels).astype(np.uint8)


FILLS: dict[str, Callable[[Image, Mask], Image]] = {
    "telea-3": lambda pixels, mask: telea(pixels, mask, radius_px=3),
    "telea-5": lambda pixels, mask: telea(pixels, mask, radius_px=5),
    "navier-stokes-3": lambda pixels, mask: navier_stokes(pixels, mask, radius_px=3),
    "navier-stokes-5": lambda pixels, mask: navier_stokes(pixels, mask, radius_px=5),
}


def chains(given: Image, mask: Mask | None, scale: int, peers: Sequence[Peer]) -> Iterator[tuple[str, Image]]:
    """Name and picture of each chain that can do the task."""
    filled = {"": given} if mask is None else {name: fill(given, mask) for name, fill in FILLS.items()}
    if scale == 1:
        assert mask is not None
        yield from filled.items()
        yield "biharmonic", biharmonic(given, mask)
        return
    enlargers: dict[str, Callable[[Image, int], Image]] = {"bicubic": bicubic_up, "lanczos": lanczos}
    enlargers |= {peer.name: peer for peer in peers if scale % PEER_SCALE == 0}
    for fill, picture in filled.items():
        for name, enlarge in enlargers.items():
            yield f"{fill} {name}".strip(), enlarge(picture, scale)


def measure_set(
    folder: Path, tasks: Sequence[Task], own: Mapping[str, Restore], peers: Sequence[Peer], *, limit: int | None
) -> dict[str, dict[str, Scores]]:
    """Picture → task → metric → method → value."""
    found: dict[str, dict[str, Scores]] = {}
    for index, (name, reference) in enumerate(references(folder, limit)):
        started = time.monotonic()
        found[name] = {task.name: measure(reference, task, own, peers, seed=index) for task in tasks}
        said = ", ".join(f"{task} {next(iter(scores.values()))['ours']:.2f}" for task, scores in found[name].items())
        print(f"{folder.name}/{name} {time.monotonic() - started:.0f} s: {said}", file=sys.stderr, flush=True)
    return found


def references(folder: Path, limit: int | None) -> Iterator[tuple[str, Image]]:
    """Names and (h, w, 3) pictures of a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for path in paths[:limit]:
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise SystemExit(f"{path}: cannot be decoded")
        yield path.name, np.ascontiguousarray(bgr[..., ::-1]).astype(np.uint8)


def measure(reference: Image, task: Task, own: Mapping[str, Restore], peers: Sequence[Peer], *, seed: int) -> Scores:
    """One picture at one task."""
    h, w = (side // task.scale * task.scale for side in reference.shape[:2])
    reference = reference[:h, :w]
    given = reduced(reference, task, seed)
    mask = None if task.share is None else damage_mask(Size(*given.shape[:2]), seed=seed, share=task.share)
    if mask is not None:
        given[mask] = UNDER_THE_MASK
    scores: Scores = {}

    def score(method: str, picture: Image) -> None:
        for metric, value in measured(picture, reference, mask, task.scale):
            scores.setdefault(metric, {})[method] = value

    for method, restore in own.items():
        score(method, restore(given, mask, task.scale))
    for method, picture in chains(given, mask, task.scale, peers):
        score(method, picture)
    return scores


def reduced(reference: Image, task: Task, seed: int) -> Image:
    if task.degraded:
        size_px = reference.shape[0] // task.scale, reference.shape[1] // task.scale
        return degraded(reference, size_px, np.random.default_rng(seed))
    return bicubic_down(reference, task.scale) if task.scale > 1 else reference.copy()


def measured(picture: Image, reference: Image, mask: Mask | None, scale: int) -> Iterator[tuple[str, float]]:
    """Metric and value of one picture."""
    if scale > 1:
        yield "psnr_y", psnr_y(picture, reference, crop_px=scale)
        yield "ssim_y", ssim_y(picture, reference, crop_px=scale)
        yield "gmsd", gmsd(picture, reference)
    if mask is None:
        return
    hole = mask.repeat(scale, 0).repeat(scale, 1)
    yield "psnr_hole", psnr(picture, reference, where=hole)
    if scale == 1:
        yield "ssim_hole", ssim_y(picture, reference, where=hole)
        yield "energy_hole", gradient_energy(picture, where=hole) / gradient_energy(reference, where=hole)


def loss(metric: str, value: float) -> float:
    """How bad a value is."""
    if metric == "energy_hole":
        return abs(log(value))
    return value if metric == "gmsd" else -value


Rows = Mapping[str, Mapping[str, Mapping[str, Scores]]]
Summary = dict[str, dict[str, dict[str, dict[str, float | int | str]]]]


def summary(rows: Rows) -> Summary:
    """Set → task → metric → our mean, the best other's name and mean, and in how many pictures ours is better."""
    return {
        name: {
            task: {metric: _summary(metric, [scores[task][metric] for scores in pictures.values()]) for metric in first}
            for task, first in next(iter(pictures.values())).items()
        }
        for name, pictures in rows.items()
    }


def _summary(metric: str, scores: Sequence[Mapping[str, float]]) -> dict[str, float | int | str]:
    means = {method: fmean(score[method] for score in scores) for method in scores[0]}
    best = min(means.keys() - {"ours"}, key=lambda method: loss(metric, means[method]))
    return {
        "ours": round(means["ours"], 4),
        "best_other": best,
        "other": round(means[best], 4),
        "better": sum(loss(metric, score["ours"]) < loss(metric, score[best]) for score in scores),
        "pictures": len(scores),
    }


def table(numbers: Summary) -> str:
    """Markdown: a line per set, task and metric."""
    lines = [
        "| pictures | task | metric | ours | best other | difference | better in | which |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for name, tasks in numbers.items():
        for task, metrics in tasks.items():
            for metric, n in metrics.items():
                digits = 2 if metric.startswith("psnr") else 4
                ours, other = float(n["ours"]), float(n["other"])
                cells = f"{ours:.{digits}f} | {other:.{digits}f} | {ours - other:+.{digits}f}"
                count = f"{n['better']}/{n['pictures']}"
                lines.append(f"| {name} | {task} | {metric} | {cells} | {count} | {n['best_other']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
