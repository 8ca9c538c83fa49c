"""A small storage job that can be killed: a server that runs it once per line of standard input, each in a fork.

A line is ``OUT FAILPOINT KILL_AFTER_S`` with ``-`` for none; the answer is the exit status (negative: the signal). The
fork saves the start of an interpreter; this process itself starts no thread, so forking it is safe.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from engine.errors import StorageError, StorageFull
from engine.geometry import Size
from engine.tiling.canvas import Canvas, Pixels, stored_plan
from engine.tiling.execute import run
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard

SIZE = Size(37, 53)
PLAN = Plan("scan", SIZE, 3, "uint8", Grid(SIZE, 16, 32), "a", "none", "lite", "b", {"scale": 1}, 0, 0)
DONE, FULL, FAILED = 0, 10, 11


def picture() -> Pixels:
    """(h, w, 3), the same in every process; one shard of it is black."""
    pixels = np.random.default_rng(7).integers(0, 256, (SIZE.h, SIZE.w, 3), np.uint8)
    pixels[:32, 32:64] = 0
    return pixels


def job(out: Path) -> int:
    """Makes and publishes the output as a restoration does, and notes each shard it computes."""
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


def fork_job(out: Path, failpoint: str, kill_after: str) -> int:
    """Runs the job in a child; its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if failpoint != "-":
                os.environ["ENGINE_FAILPOINT"] = failpoint
            status = job(out)
        finally:
            os._exit(status)
    if kill_after != "-":
        time.sleep(float(kill_after))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for line in sys.stdin:
        out, failpoint, kill_after = line.rstrip("\n").split("\t")
        sys.stdout.write(f"{fork_job(Path(out), failpoint, kill_after)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
