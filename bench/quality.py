"""Quality of a model against classical baselines, on folders of intact reference pictures.

    python bench/quality.py --kodak DIR --gb82 DIR --set5 DIR [--limit N] [--out FILE] [--model FILE]

The low-resolution input is the reference, cut to a multiple of the scale, reduced by antialiased bicubic and rounded
to 8 bits. Damage is drawn on the input: `damage_mask(size, seed=index of the picture, share=...)`; what lies under it
is overwritten. Enlargements are compared on luma without a border as wide as the scale (GMSD: whole picture); filled
holes at scale 1 on RGB inside the hole only, against the better of Telea and Navier-Stokes for each picture.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.evaluate.baselines import bicubic_down, bicubic_up, navier_stokes, telea
from engine.evaluate.metrics import gmsd, psnr, psnr_y, ssim_y
from engine.geometry import Size
from engine.models.checkpoint import find, with_numbers
from engine.request import Request
from engine.restoration import Restorer
from engine.train.damage import LIGHT, MEDIUM, damage_mask

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNDER_THE_MASK = 255
SETS = ("kodak", "gb82", "set5")

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Restore = Callable[[Image, Mask | None, int], Image]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of damage and one scale."""

    name: str
    scale: int
    share: tuple[float, float] | None
    """Least and most missing share of the input; None leaves it intact."""


TASKS = (
    Task("x2", 2, None),
    Task("x4", 4, None),
    Task("joint-x4-light", 4, LIGHT),
    Task("joint-x4-medium", 4, MEDIUM),
    Task("holes-light", 1, LIGHT),
    Task("holes-medium", 1, MEDIUM),
)
LOWER_IS_BETTER = {"gmsd"}


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one picture."""

    ours: float
    baseline: float


def main() -> None:
    options = _options()
    restorer = Restorer(model=options.model)
    if options.threads:
        torch.set_num_threads(options.threads)
        cv2.setNumThreads(options.threads)
    folders = {name: getattr(options, name) for name in SETS if getattr(options, name) is not None}
    tasks = [task for task in TASKS if not options.task or task.name in options.task]
    rows: dict[str, dict[str, dict[str, dict[str, Score]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def restore(pixels: Image, mask: Mask | None, scale: int) -> Image:
            return restorer.array(pixels, mask, Request(scale=scale), scratch=Path(scratch))

        for name, folder in folders.items():
            rows[name] = measure_set(folder, tasks, restore, limit=options.limit)
    card = restorer.checkpoint.card
    numbers = summary(rows)
    shown = "python bench/quality.py " + " ".join(f"--{name} {name.upper()}" for name in folders)
    report = {"model": card.name, "sha256": card.sha256, "command": shown, "summary": numbers, "pictures": plain(rows)}
    print(table(numbers))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(table(numbers) + "\n", encoding="utf-8")
    if options.card:
        with_numbers(find(options.model or card.name), {"command": shown, **numbers})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SETS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="folder of reference pictures")
    parser.add_argument("--limit", type=int, help="only the first N pictures of each set")
    parser.add_argument("--task", action="append", choices=[task.name for task in TASKS], help="only these")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; a Markdown table is written beside it")
    parser.add_argument("--model", help="embedded name or .safetensors file")
    parser.add_argument("--threads", type=int, help="threads of the network; all processors where not given")
    parser.add_argument("--card", action="store_true", help="write the summary on the model's card")
    options = parser.parse_args()
    if not any(getattr(options, name) for name in SETS):
        parser.print_usage(sys.stderr)
        print("no folder of pictures was given, so nothing is measured", file=sys.stderr)
        raise SystemExit(0)
    return options


def measure_set(
    folder: Path, tasks: Sequence[Task], restore: Restore, *, limit: int | None
) -> dict[str, dict[str, dict[str, Score]]]:
    """Picture → task → metric → score."""
    found: dict[str, dict[str, dict[str, Score]]] = {}
    for index, (name, reference) in enumerate(references(folder, limit)):
        started = time.monotonic()
        found[name] = {task.name: measure(reference, task, restore, seed=index) for task in tasks}
        first = {task: next(iter(scores.items())) for task, scores in found[name].items()}
        said = ", ".join(f"{task} {s.ours:.2f} ({s.ours - s.baseline:+.2f})" for task, (_, s) in first.items())
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


def measure(reference: Image, task: Task, restore: Restore, *, seed: int) -> dict[str, Score]:
    """One picture at one task."""
    h, w = (side // task.scale * task.scale for side in reference.shape[:2])
    reference = reference[:h, :w]
    given = bicubic_down(reference, task.scale) if task.scale > 1 else reference.copy()
    mask = None if task.share is None else damage_mask(Size(*given.shape[:2]), seed=seed, share=task.share)
    if mask is not None:
        given[mask] = UNDER_THE_MASK
    ours = restore(given, mask, task.scale)
    if task.scale == 1:
        assert mask is not None
        floor = max(psnr(fill(given, mask), reference, where=mask) for fill in (telea, navier_stokes))
        return {"psnr_hole": Score(psnr(ours, reference, where=mask), floor)}
    baseline = bicubic_up(given if mask is None else telea(given, mask), task.scale)
    crop = task.scale
    return {
        "psnr_y": Score(*(psnr_y(image, reference, crop_px=crop) for image in (ours, baseline))),
        "ssim_y": Score(*(ssim_y(image, reference, crop_px=crop) for image in (ours, baseline))),
        "gmsd": Score(*(gmsd(image, reference) for image in (ours, baseline))),
    }


Rows = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Score]]]]


def summary(rows: Rows) -> dict[str, dict[str, dict[str, dict[str, float | int]]]]:
    """Set → task → metric → means, medians, and in how many pictures ours is better."""
    found: dict[str, dict[str, dict[str, dict[str, float | int]]]] = {}
    for name, pictures in rows.items():
        first = next(iter(pictures.values()))
        found[name] = {
            task: {metric: _summary(metric, [p[task][metric] for p in pictures.values()]) for metric in metrics}
            for task, metrics in first.items()
        }
    return found


def _summary(metric: str, scores: Sequence[Score]) -> dict[str, float | int]:
    ours, baseline = [score.ours for score in scores], [score.baseline for score in scores]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return {
        "mean": round(fmean(ours), 4),
        "median": round(median(ours), 4),
        "baseline_mean": round(fmean(baseline), 4),
        "baseline_median": round(median(baseline), 4),
        "better": sum(sign * (score.ours - score.baseline) > 0 for score in scores),
        "pictures": len(scores),
    }


def plain(rows: Rows) -> dict[str, object]:
    """The scores as JSON holds them: [ours, baseline]."""
    return {
        name: {
            picture: {task: {m: [s.ours, s.baseline] for m, s in scores.items()} for task, scores in tasks.items()}
            for picture, tasks in pictures.items()
        }
        for name, pictures in rows.items()
    }


def table(numbers: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | int]]]]) -> str:
    """Markdown: a line per set, task and metric."""
    lines = [
        "| pictures | task | metric | ours | baseline | difference | median ours | median baseline | better in |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, tasks in numbers.items():
        for task, metrics in tasks.items():
            for metric, n in metrics.items():
                digits = 2 if metric.startswith("psnr") else 4
                values = (n["mean"], n["baseline_mean"], n["mean"] - n["baseline_mean"])
                cells = [f"{values[0]:.{digits}f}", f"{values[1]:.{digits}f}", f"{values[2]:+.{digits}f}"]
                cells += [f"{n['median']:.{digits}f}", f"{n['baseline_median']:.{digits}f}"]
                lines.append(f"| {name} | {task} | {metric} | {' | '.join(cells)} | {n['better']}/{n['pictures']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
