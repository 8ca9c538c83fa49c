"""A whole x16 restoration to 8192x8192 takes at most 1.5 times the bare network on the same pixels.

    python bench/whole_vs_bare.py [--side INPUT_PX] [--repeats N] [--threads N]

Bare is the local half alone: `TorchRunner.encode` and `decode` over the same tiles and blocks, from arrays in memory,
output thrown away. Whole is `Restorer.restore`: header, decode, guide, residuals, shards, pyramid, digests, publish.
Both run in this process, in turn; medians are compared.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pyvips
import skimage.data
import torch
from numpy.typing import NDArray

from engine.geometry import Box, Size, ceil_div
from engine.models.runner import TorchRunner
from engine.render import Tiling
from engine.request import Request
from engine.restoration import Job, Restorer
from engine.train.damage import LIGHT, damage_mask

SCALE, LEVELS = 16, 4
MAX_RATIO = 1.5


@dataclass(frozen=True, slots=True)
class Case:
    """The same picture, with or without holes."""

    name: str
    image: Path
    mask: Path | None


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one run; processor time counts all threads, and tells more where the machine is busy with other work."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="side of the input, at most 512")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    restorer = Restorer()
    torch.set_num_threads(options.threads)
    runner = TorchRunner(restorer.checkpoint, precision="fp32", threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="engine-whole-") as name:
        folder = Path(name)
        cases, pixels = prepared(folder, options.side)
        _, tiling, _ = restorer.plan(job(cases[0], folder / "out"), Request(scale=SCALE))
        bare(runner, pixels[: tiling.block_px, : tiling.block_px], tiling)  # the first call of a shape prepares kernels
        seconds: dict[str, list[Seconds]] = {"bare": [], **{case.name: [] for case in cases}}
        for repeat in range(options.repeats):
            seconds["bare"].append(timed(lambda: bare(runner, pixels, tiling)))
            for case in cases:
                out = folder / f"{case.name}-{repeat}"
                seconds[case.name].append(
                    timed(lambda c=case, o=out: restorer.restore(job(c, o), Request(scale=SCALE)))
                )
        raise SystemExit(report(seconds, options.side * SCALE))


def report(seconds: dict[str, list[Seconds]], side_px: int) -> int:
    """Print medians and ratios; 1 where a whole run is too slow."""
    wall = {name: median(one.wall for one in found) for name, found in seconds.items()}
    cpu = {name: median(one.cpu for one in found) for name, found in seconds.items()}
    for name, found in seconds.items():
        each = ", ".join(f"{one.wall:.1f}" for one in found)
        ratios = f"{wall[name] / wall['bare']:.2f} x bare in wall, {cpu[name] / cpu['bare']:.2f} x in processor time"
        print(f"{name:10} {side_px}x{side_px}: median {wall[name]:6.1f} s, {ratios}  ({each})")
    return int(max(wall.values()) > MAX_RATIO * wall["bare"])


def prepared(folder: Path, side_px: int) -> tuple[list[Case], NDArray[np.uint8]]:
    """Picture and mask as files, and the picture as (h, w, 3)."""
    image = pyvips.Image.new_from_file(str(Path(skimage.data.__file__).parent / "astronaut.png"))
    image = image.crop(0, 0, side_px, side_px)
    image.write_to_file(str(folder / "picture.png"))
    mask = damage_mask(Size(side_px, side_px), seed=0, share=LIGHT)
    pyvips.Image.new_from_array(mask.astype(np.uint8) * 255).write_to_file(str(folder / "mask.png"))
    cases = [
        Case("whole", folder / "picture.png", None),
        Case("whole+mask", folder / "picture.png", folder / "mask.png"),
    ]
    return cases, image.numpy()


def job(case: Case, out: Path) -> Job:
    return Job(case.image, case.mask, out, "picture", ("ome-zarr",))


def timed(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.monotonic(), time.process_time()
    work()
    return Seconds(time.monotonic() - wall, time.process_time() - cpu)


def bare(runner: TorchRunner, pixels: NDArray[np.uint8], tiling: Tiling) -> None:
    """The local half over the tiles of a picture, and nothing else."""
    margin = runner.local.encode_margin_px(LEVELS)
    side_px = tiling.block_px + 2 * runner.local.decode_margin_px(LEVELS)
    h, w = pixels.shape[:2]
    tiles = [
        Box(y, x, y + tiling.tile_px, x + tiling.tile_px)
        for y in range(0, h, tiling.tile_px)
        for x in range(0, w, tiling.tile_px)
    ]
    padded = np.pad(
        pixels.astype(np.float32) / np.float32(255),
        [(margin, margin + tiling.tile_px * ceil_div(n, tiling.tile_px) - n) for n in (h, w)] + [(0, 0)],
        "reflect",
    )
    for tile in tiles:
        composite = padded[tile.y0 : tile.y1 + 2 * margin, tile.x0 : tile.x1 + 2 * margin]
        encoded = runner.encode(composite, np.zeros(composite.shape[:2], bool), None, LEVELS)
        for y in range(0, min(tile.y1, h) - tile.y0, tiling.block_px):
            for x in range(0, min(tile.x1, w) - tile.x0, tiling.block_px):
                runner.decode(encoded, [(y, x)], side_px, LEVELS)


if __name__ == "__main__":
    main()
