"""What Ray Train costs: seconds a step of one worker against the plain loop.

    python bench/train_overhead.py [--steps N] [--repeats N] [--stage NAME]

Both train the same stage of `lite` with one thread on pictures that the script makes; with Ray, batches come from Ray
Data. The first half of the steps is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from _batch_setup import REPOSITORY, Picture, make_pictures, record, spread

from engine.geometry import Size

MOST_RATIO = 1.05
PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from engine.train import run as running
from engine.train.recipes import lite
data, folder, stage, steps, how = sys.argv[1:]
torch.set_num_threads(1)
chosen = [replace(one, steps=int(steps)) for one in lite().stages if one.name == stage]
run = running.Run(replace(lite(), stages=tuple(chosen)), Path(data), Path(folder), "made")
if how == "ray":
    from engine.train.loop import train_on_ray
    train_on_ray(run, workers=1)
else:
    running.train(run)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", default="super-resolution")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="t") as name:
        make_pictures(Path(name, "data"), [Picture(f"{n}.png", Size(800, 800)) for n in range(8)], seed=1)
        for repeat in range(options.repeats):
            for how, found in seconds.items():
                folder = Path(name, f"{how} {repeat}")
                found.append(seconds_a_step(Path(name, "data"), folder, options.stage, options.steps, how))
                print(f"{how}: {1000 * found[-1]:.1f} ms a step", flush=True)
    ratios = spread([ray / plain for ray, plain in zip(seconds["ray"], seconds["plain"], strict=True)])
    print(f"ratio {ratios['median']:.3f} (at most {MOST_RATIO})")
    holds = median(ratios["each"]) <= MOST_RATIO
    figures = {how: spread([1000 * one for one in found], digits=1) for how, found in seconds.items()}
    record("overhead", {"stage": options.stage, "ms_a_step": figures, "ratio": ratios, "holds": holds}, into="train")
    raise SystemExit(not holds)


def seconds_a_step(data: Path, folder: Path, stage: str, steps: int, how: str) -> float:
    """Of the second half, from the log."""
    command = [sys.executable, "-c", PROGRAM, str(data), str(folder), stage, str(steps), how]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    at = {one["step"]: one["seconds"] for one in lines if "loss" in one}
    return (at[steps] - at[steps // 2]) / (steps - steps // 2)


if __name__ == "__main__":
    main()
