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


def plan_of(size: Size, *, shard_px: int) -> Plan:
    return Plan(
        "scan", size, 3, "uint8", Grid(size, shard_px // 2, shard_px), "a", "none", "lite", "b", {"scale": 1}, 0, 0
    )


SMALL = plan_of(Size(53, 121), shard_px=32)
"""8 + 2 + 1 + 1 shards of at most 3 KB."""
LARGE = plan_of(Size(2048, 2048), shard_px=512)
"""16 + 4 + 1 + 1 shards of at most 786 KB: 16.8 MB of noise, which does not get smaller."""
DONE, FULL, FAILED = 0, 10, 11


def picture(plan: Plan) -> Pixels:
    """(h, w, 3), the same in every process; one shard of it is black."""
    pixels = np.random.default_rng(7).integers(0, 256, (plan.size.h, plan.size.w, 3), np.uint8)
    side = plan.grid.shard_px
    pixels[:side, side : 2 * side] = 0
    return pixels


def job(folder: str, size: str = "small") -> int:
    """Makes and publishes the output as a restoration does.

    Notes each shard that it computes in `computed.txt`, and beside `folder` what went wrong in `<folder>.error`.
    """
    out, plan = Path(folder), {"small": SMALL, "large": LARGE}[size]
    final = out / "scan.zarr"
    if stored_plan(final) == plan:
        return DONE
    pixels = picture(plan)
    try:
        with Canvas.open(plan, out) as canvas, (out / "computed.txt").open("a") as notes:
            half = HalveShard(canvas)

            def work(key: ShardKey) -> Pixels:
                notes.write(f"{key.name}\n")
                notes.flush()
                return half(key) if key.level else pixels[plan.grid.box(key).slices]

            for _ in run(canvas, plan.grid.all_keys(), work):
                pass
            canvas.publish(final, replace=False)
    except StorageError as error:
        out.with_name(f"{out.name}.error").write_text(str(error))
        return FULL if isinstance(error, StorageFull) else FAILED
    return DONE


if __name__ == "__main__":
    serve(job)
