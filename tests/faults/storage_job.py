"""A small storage job that can be killed."""

from pathlib import Path

import numpy as np

from engine.errors import StorageError, StorageFull
from engine.geometry import Size
from engine.tiling.canvas import Canvas, Pixels, stored_plan
from engine.tiling.execute import run
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard
from tests.forked import serve

SIZE = Size(37, 53)
PLAN = Plan("scan", SIZE, 3, "uint8", Grid(SIZE, 16, 32), "a", "none", "lite", "b", {"scale": 1}, 0, 0)
DONE, FULL, FAILED = 0, 10, 11


def picture() -> Pixels:
    """(h, w, 3), the same in every process; one shard of it is black."""
    pixels = np.random.default_rng(7).integers(0, 256, (SIZE.h, SIZE.w, 3), np.uint8)
    pixels[:32, 32:64] = 0
    return pixels


def job(folder: str) -> int:
    """Makes and publishes the output as a restoration does, and notes each shard it computes."""
    out = Path(folder)
    final = out / "scan.zarr"
    if stored_plan(final) == PLAN:
        return DONE
    pixels = picture()
    try:
        with Canvas.open(PLAN, out) as canvas, (out / "computed.txt").open("a") as notes:
            half = HalveShard(canvas)

            def work(key: ShardKey) -> Pixels:
                notes.write(f"{key.name}\n")
                notes.flush()
                return half(key) if key.level else pixels[PLAN.grid.box(key).slices]

            for _ in run(canvas, PLAN.grid.all_keys(), work):
                pass
            canvas.publish(final, replace=False)
    except StorageFull:
        return FULL
    except StorageError:
        return FAILED
    return DONE


if __name__ == "__main__":
    serve(job)
