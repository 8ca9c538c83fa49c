"""What counting costs: the real pipeline with pictures that take no work, and what that tells of a large cluster.

    python bench/batch_control.py [--rows N] [--actors N]

Feed, Ray Data, preparers, tile actors, intents, catalog and driver are the real ones; only planning and restoring do
nothing, and all actors book no CPU, so that many run on a few cores. Rows a second and the driver's memory are read
when a tenth of the rows have ended and at the end.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from _batch_setup import Picture, make_pictures, record, workspace

from engine.batch import pipeline
from engine.batch.inputs import Item
from engine.batch.run import restore_all
from engine.batch.work import DONE, Order, Workers
from engine.geometry import Size
from engine.memory import process_memory
from engine.receipt import Job, Receipt
from engine.request import Request
from engine.restoration import Progress, Restorer

PICTURES, WORKERS = 10_000_000, 1_000
"""What is predicted."""
PICTURE_S = 2.0
"""Work of one core on one picture there."""


class NoRestorer(Restorer):
    """Says that it is done."""

    def restore(self, job: Job, request: Request, progress: Progress | None = None) -> Receipt:
        return Receipt("0" * 64, (), 0.0, 1, 1, 0, ())


class NoOrder(Order):
    """An order whose pictures take no work."""

    def restorer(self, *, threads: int | None = None) -> Restorer:
        return NoRestorer(threads=threads)


@dataclass(frozen=True, slots=True)
class Moment:
    """When some rows had ended."""

    rows: int
    seconds: float
    driver_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--actors", type=int, default=200, help="tile actors of both lanes together")
    options = parser.parse_args()
    pipeline.LANE_CPUS = pipeline.PREPARER_CPUS = 0.0
    pipeline.WORKER_BYTES = 1 << 20  # nothing is drawn
    with workspace() as folder:
        make_pictures(folder, [Picture("one.png", Size(64, 64))], seed=0)
        items = [Item(str(folder / "one.png"), f"{n // 1000}/{n}", None, None) for n in range(options.rows)]
        early, late = watched(items, NoOrder(folder / "out", formats=("png",)), options.actors // 2)
    rows = late.rows - early.rows
    per_s = rows / (late.seconds - early.seconds)
    row_bytes = (late.driver_bytes - early.driver_bytes) / rows
    needed_per_s = WORKERS / PICTURE_S
    figures = {
        "rows": options.rows,
        "actors": options.actors,
        "first_tenth_s": round(early.seconds, 1),
        "seconds": round(late.seconds, 1),
        "rows_per_s": round(per_s, 1),
        "driver_mib": round(late.driver_bytes / 2**20, 1),
        "driver_bytes_per_row": round(row_bytes, 1),
        "predicted": {
            "pictures": PICTURES,
            "workers": WORKERS,
            "driver_gib": round((late.driver_bytes + row_bytes * (PICTURES - late.rows)) / 2**30, 2),
            "rows_per_s_needed": needed_per_s,
            "enough": per_s >= needed_per_s,
            "hours": round(PICTURES / min(per_s, needed_per_s) / 3600, 1),
        },
    }
    print(f"{options.rows:,} rows, {options.actors} actors: {per_s:,.0f} rows/s, driver {row_bytes:.0f} bytes a row")
    print(f"for {PICTURES:,} pictures on {WORKERS:,} workers: {figures['predicted']}")
    record("control", figures)


def watched(items: list[Item], order: Order, pairs: int) -> tuple[Moment, Moment]:
    """The moments when a tenth of the rows have ended, and all."""
    moments: list[Moment] = []
    started = time.monotonic()
    for count in counted(items, order, pairs):
        if count in (len(items) // 10, len(items)):
            moments.append(Moment(count, time.monotonic() - started, process_memory("VmRSS") or 0))
    early, late = moments
    return early, late


def counted(items: list[Item], order: Order, pairs: int) -> Iterator[int]:
    shown = time.monotonic()
    for count, outcome in enumerate(restore_all(items, order, order.restorer(), workers=Workers(pairs)), start=1):
        assert outcome.status == DONE, outcome
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            free = psutil.virtual_memory().available / 2**30
            print(f"{count:,} rows, {free:.1f} GiB free, {(process_memory('VmRSS') or 0) >> 20} MiB", flush=True)
        yield count


if __name__ == "__main__":
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112  so many actors may need the machine's swap
    main()
