"""What Ray costs: pictures a second of two workers in steady state against two bare loops.

    python bench/batch_speed.py [--pictures N] [--repeats N]

A bare loop is a process with one thread that restores one picture after another; two run side by side. Both ways see
the same pictures, one after the other; the ratio is taken of each such pair of runs, for the speed of a machine may
change by a fifth within minutes. Starting up is left out: a rate is counted from the moment when a fifth of the
pictures has ended to that when nine tenths have.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator

from _batch_setup import Picture, make_pictures, record, spread, workspace

from engine.batch.inputs import Item, find_inputs
from engine.batch.run import restore_all
from engine.batch.work import DONE, Order, Workers, restore_item
from engine.geometry import Size
from engine.request import Request

CORES = 2
FROM, UNTIL = 0.2, 0.9
LEAST_RATIO = 0.90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"bare": [], "workers": []}
    ways: dict[str, Callable[[list[Item], Order], Iterator[float]]] = {"bare": bare, "workers": with_workers}
    with workspace() as folder:
        pictures = [
            Picture(f"{n:04}.png", Size(300 + 7 * (n % 40), 400), masked=n % 4 < 2) for n in range(options.pictures)
        ]
        make_pictures(folder / "in", pictures, seed=0, masks=folder / "masks")
        items = list(find_inputs([str(folder / "in")], out=None, mask=str(folder / "masks")))
        for repeat in range(options.repeats):
            for name, way in ways.items():
                order = Order(folder / f"{name} {repeat}", Request(scale=1), ("png",))
                rates[name].append(rate(list(way(items, order))))
                print(f"{name}: {rates[name][-1]:.2f} pictures/s", flush=True)
        stored = sum(1 for path in (folder / "workers 0").rglob("*") if path.is_file() and "_batch" not in path.parts)
    found = {name: spread(values) for name, values in rates.items()}
    ratios = spread([mine / theirs for mine, theirs in zip(rates["workers"], rates["bare"], strict=True)])
    objects = stored / options.pictures
    print(f"ratio {ratios['median']:.3f} (at least {LEAST_RATIO}), {objects:.2f} objects a picture")
    record("speed", {"pictures": options.pictures, "pictures_per_s": found, "ratio": ratios, "objects": objects})
    raise SystemExit(ratios["median"] < LEAST_RATIO)


def rate(ends: list[float]) -> float:
    """Ends a second, from the moments of all of them."""
    ends = sorted(ends)
    first, last = int(FROM * len(ends)), int(UNTIL * len(ends)) - 1
    return (last - first) / (ends[last] - ends[first])


def with_workers(items: list[Item], order: Order) -> Iterator[float]:
    for outcome in restore_all(items, order, order.restorer(), workers=Workers(CORES)):
        assert outcome.status == DONE, outcome
        yield time.monotonic()


def bare(items: list[Item], order: Order) -> Iterator[float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES) as pool:
        for ends in pool.map(loop, [(items[k::CORES], order) for k in range(CORES)]):
            yield from ends


def loop(work: tuple[list[Item], Order]) -> list[float]:
    """Restores pictures one after another; the moments when each had ended."""
    items, order = work
    restorer = order.restorer(threads=1)
    ends: list[float] = []
    for item in items:
        outcome = restore_item(restorer, item, order)
        assert outcome.status == DONE, outcome
        ends.append(time.monotonic())
    return ends


if __name__ == "__main__":
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    main()
