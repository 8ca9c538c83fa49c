"""Peak memory of `engine restore` at x16 does not grow with the picture.

    python bench/memory.py [OUTPUT_SIDE_PX ...] [--mask] [--format NAME ...]

Each size is restored by a process of its own: a synthetic picture of 1/16 the side goes in, an OME-Zarr (and what
else is asked for) comes out, and the peak resident size is what the kernel counted for that process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.geometry import Size
from engine.train.damage import LIGHT, damage_mask

SCALE = 16
SIDES_PX = (8192, 16384, 32768)
MAX_BYTES = 2 << 30
MAX_RATIO = 1.10


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took."""

    side_px: int
    peak_rss_bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", type=int, metavar="OUTPUT_SIDE_PX", help="multiples of 16")
    parser.add_argument("--mask", action="store_true", help="with light damage")
    parser.add_argument("--format", action="append", metavar="NAME", help="outputs; ome-zarr where not given")
    options = parser.parse_args()
    runs: list[Run] = []
    for side_px in options.sides or SIDES_PX:
        run = measure(side_px, damaged=options.mask, formats=options.format or ["ome-zarr"])
        print(f"{run.side_px:6} px: {run.peak_rss_bytes / 2**20:7.1f} MiB, {run.seconds:6.1f} s", flush=True)
        runs.append(run)
    peaks = [run.peak_rss_bytes for run in runs]
    ratio = max(peaks) / min(peaks)
    good = ratio <= MAX_RATIO and max(peaks) <= MAX_BYTES
    print(f"largest / smallest {ratio:.3f} (at most {MAX_RATIO:.2f}), most {max(peaks) / 2**30:.2f} GiB (at most 2)")
    raise SystemExit(0 if good else 1)


def measure(side_px: int, *, damaged: bool, formats: Sequence[str]) -> Run:
    """Restore a synthetic picture in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="engine-memory-") as name:
        folder = Path(name)
        given_px = side_px // SCALE
        cv2.imwrite(str(folder / "picture.png"), synthetic(given_px))
        command = [sys.executable, "-m", "engine.cli", "restore", str(folder / "picture.png")]
        command += ["--out", str(folder / "out"), "--scale", str(SCALE)]
        for item in formats:
            command += ["--format", item]
        if damaged:
            mask = damage_mask(Size(given_px, given_px), seed=0, share=LIGHT)
            cv2.imwrite(str(folder / "mask.png"), mask.astype(np.uint8) * 255)
            command += ["--mask", str(folder / "mask.png")]
        return timed(command, side_px)


def timed(command: Sequence[str], side_px: int) -> Run:
    """Run a command and ask the kernel for its peak: `wait4` counts this one child."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {said.decode(errors='replace')}")
    return Run(side_px, usage.ru_maxrss * 1024, time.monotonic() - started)


def synthetic(side_px: int) -> np.ndarray:
    """(h, w, 3) uint8: smooth waves with grain, so that neither the network nor the codecs see a flat picture."""
    rng = np.random.default_rng(side_px)
    y, x = np.mgrid[:side_px, :side_px] / 37.0
    waves = np.stack([np.sin(x + k) * np.cos(y * (1 + k / 3)) for k in range(3)], -1)
    return np.clip(128 + 80 * waves + rng.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
