"""Batches of pictures: bad ones among them, any number of workers, and the memory that they take.

    python bench/batch_load.py [WHAT ...] [--seeds N] [--small] [--side OUTPUT_PX]

mixed   200 pictures of all formats and of 1 to 6,000 px a side, one of 8192x8192, 5 % broken or hostile: all good ones
        are done, each bad one is listed with its code, exit 3. Scale 1, for there is one scale for all.
poison  2,000 small ones, 5 % bad, one that crashes and one that holds up every process that tries it: both are out
        after 3 attempts, no other is blamed, and the rest takes at most twice as long as without these two.
same    1, 2, 4 workers, each in another order, leave the same bytes as one process does.
memory  10,000 small pictures take at most 10 % more memory a process than 100, and spill nothing.
giant   Beside one output of 32768x32768 no process takes more than 2 GiB, and small pictures end long before it.

Each runs `engine restore` as a user would, on 2 workers. With --small, in a minute or two each and with nothing stored.
"""

import argparse
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _batch_inputs import SMALL_PX, Fates, mixed, small
from _batch_setup import (
    Command,
    Ended,
    Picture,
    differing,
    digests,
    make_pictures,
    record,
    restore_arguments,
    spread,
    workspace,
)
from _batch_watch import WORKERS, Watch, share_token

from engine.batch.catalog import read_catalog
from engine.batch.work import DONE
from engine.errors import EXIT_FAILED
from engine.geometry import Size

NUM_WORKERS = 2
"""So many small pictures may be staged at once: each is begun, finished and published by one process."""
STALL_S = 20
MAX_ATTEMPTS = 3
MAX_DELAY = 2.0
MAX_GROWTH = 1.10
JUDGED = ("driver", *WORKERS)
MAX_BYTES = 2 << 30
GIANT_SCALE = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many pictures, and how large."""

    mixed: int
    poison: int
    few: int
    many: int
    same: int
    large: tuple[Size, ...]
    """Of `same`, inputs."""
    beside: int
    """Small pictures beside the giant."""


FULL = Sizes(200, 2000, 100, 10_000, 22, (Size(512, 1280), Size(300, 700)), 200)
SMALL = Sizes(40, 100, 10, 60, 3, (Size(520, 260),), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(MEASURED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few and small pictures; nothing is stored")
    parser.add_argument("--side", type=int, default=32768, help="of the giant's output")
    options = parser.parse_args()
    if unknown := set(options.what) - MEASURED.keys():
        parser.error(f"{', '.join(sorted(unknown))}: nothing that is measured")
    share_token()
    good = True
    for what in options.what or MEASURED:
        runs: list[dict[str, Any]] = []
        for seed in range(options.seeds):
            with workspace() as folder:
                runs.append(MEASURED[what](folder, SMALL if options.small else FULL, seed, options.side))
            print(f"{what}, seed {seed}: {told(runs[-1])}", flush=True)
        good &= all(run["good"] for run in runs)
        if not options.small:
            record(what, merged(runs))
    raise SystemExit(0 if good else 1)


def measure_mixed(folder: Path, sizes: Sizes, seed: int, _: int) -> dict[str, Any]:
    fates = mixed(folder / "in", folder / "masks", count=sizes.mixed, seed=seed)
    out = folder / "out"
    ended = Command(arguments(folder / "in", out, masks=folder / "masks")).wait()
    bad = wrong(fates, out)
    return {
        "good": ended.exit_code == EXIT_FAILED and not bad,
        "wrong": bad,
        "exit_code": ended.exit_code,
        "reasons": reasons(out),
        "seconds": round(ended.seconds, 1),
    }


def measure_poison(folder: Path, sizes: Sizes, seed: int, _: int) -> dict[str, Any]:
    """The very same pictures twice: what is poison is told by the environment."""
    fates = small(folder / "in", count=sizes.poison, seed=seed, bad=True)
    good = [name for name, code in fates.items() if code is None]
    crash, hang = good[2 * len(good) // 5], good[3 * len(good) // 5]
    rest = fates.keys() - {crash, hang}
    calm = run_poison(folder, "calm", {})
    poisoned = run_poison(folder, "poisoned", {"ENGINE_FAILPOINT": f"restore {crash}:1:segv;restore {hang}:1:hang"})
    rows = read_catalog(folder / "poisoned")
    bad = wrong({**fates, crash: "process-died", hang: "process-died"}, folder / "poisoned")
    bad += wrong(fates, folder / "calm")
    seconds = {
        "calm": last_end(folder / "calm", calm[0], rest),
        "poisoned": last_end(folder / "poisoned", poisoned[0], rest),
    }
    delay = seconds["poisoned"] / seconds["calm"]
    attempts = {"crash": rows[crash].attempts, "hang": rows[hang].attempts}
    attempts["most of the rest"] = max(rows[name].attempts for name in rest)
    return {
        "good": not bad and max(attempts.values()) <= MAX_ATTEMPTS and delay <= MAX_DELAY,
        "wrong": bad,
        "reasons": reasons(folder / "poisoned"),
        "attempts": attempts,
        "rest_seconds": seconds,
        "rest_delay": round(delay, 2),
        "seconds": {"calm": round(calm[1].seconds, 1), "poisoned": round(poisoned[1].seconds, 1)},
        "whole_delay": round(poisoned[1].seconds / calm[1].seconds, 2),
    }


def run_poison(folder: Path, name: str, environment: Mapping[str, str]) -> tuple[datetime, Ended]:
    start = datetime.now(UTC)
    line = [*arguments(folder / "in", folder / name), "--stall-after", str(STALL_S)]
    return start, Command(line, environment=environment).wait()


def measure_same(folder: Path, sizes: Sizes, seed: int, _: int) -> dict[str, Any]:
    rng = random.Random(seed)
    pictures = [Picture(f"box {n % 3}/scan {n:02}.png", side(rng), n % 2 == 0) for n in range(sizes.same)]
    pictures += [Picture(f"large {n}.png", size, n % 2 == 0) for n, size in enumerate(sizes.large)]
    make_pictures(folder / "in", pictures, seed=seed, masks=folder / "masks")
    found: dict[int, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    for workers in (0, 1, 2, 4):
        order = [picture.name for picture in pictures]
        if workers:
            rng.shuffle(order)
        source, out = folder / "in" / f"{workers}.txt", folder / f"out {workers}"
        source.write_text("\n".join(order))
        line = restore_arguments(
            source, out, workers=workers, scale=4, masks=folder / "masks", formats=("ome-zarr", "png")
        )
        seconds[str(workers)] = round(Command(line).wait().checked().seconds, 1)
        found[workers] = digests(out)
        shutil.rmtree(out)
    differ = {str(workers): differing(found[workers], found[0]) for workers in found}
    return {
        "good": bool(found[0]) and not any(differ.values()),
        "pictures": len(pictures),
        "files": len(found[0]),
        "differing_files": {workers: len(names) for workers, names in differ.items()},
        "seconds": seconds,
    }


def side(rng: random.Random) -> Size:
    return Size(rng.randint(20, 128), rng.randint(20, 128))


def measure_memory(folder: Path, sizes: Sizes, seed: int, _: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    peaks: dict[str, dict[str, int]] = {}
    for name, count in (("few", sizes.few), ("many", sizes.many)):
        small(folder / name, count=count, seed=seed)
        out = folder / f"out {name}"
        watch = Watch(Command(arguments(folder / name, out)), out)
        ended = watch.ended().checked()
        peaks[name] = watch.peaks()
        figures[name] = {"pictures": count, "seconds": round(ended.seconds, 1), **watch.figures()}
    both = sorted(peaks["few"].keys() & peaks["many"].keys())
    growth = {role: round(peaks["many"][role] / peaks["few"][role], 3) for role in both}
    spilled = sum(figures[name]["spilled_bytes"] for name in figures)
    staged = max(figures[name]["most_staged_unfinished"] for name in figures)
    judged = max(growth[role] for role in JUDGED if role in growth)
    return {
        "good": judged <= MAX_GROWTH and not spilled and staged <= NUM_WORKERS,
        "growth": growth,
        "most_growth": judged,
        **figures,
    }


def measure_giant(folder: Path, sizes: Sizes, seed: int, side_px: int) -> dict[str, Any]:
    """The giant is the first in line."""
    given_px = side_px // GIANT_SCALE
    pictures = [Picture("a giant.png", Size(given_px, given_px))]
    pictures += [Picture(f"scan {n:03}.png", Size(SMALL_PX, SMALL_PX)) for n in range(sizes.beside)]
    make_pictures(folder / "in", pictures, seed=seed)
    out, start = folder / "out", datetime.now(UTC)
    line = restore_arguments(folder / "in", out, workers=NUM_WORKERS, scale=GIANT_SCALE)
    watch = Watch(Command(line), out)
    ended = watch.ended().checked()
    beside = [Path(picture.name).stem for picture in pictures[1:]]
    last, giant = last_end(out, start, beside), last_end(out, start, ["a giant"])
    return {
        "good": max(watch.peaks().values()) <= MAX_BYTES and last < giant and not watch.spilled_bytes,
        "side_px": side_px,
        "beside": len(beside),
        "last_small_s": last,
        "giant_s": giant,
        "seconds": round(ended.seconds, 1),
        **watch.figures(),
    }


def arguments(source: Path, out: Path, *, masks: Path | None = None) -> list[str]:
    return restore_arguments(source, out, workers=NUM_WORKERS, scale=1, masks=masks, formats=("png",))


def wrong(fates: Fates, out: Path) -> list[str]:
    """The pictures of which the catalog, or the disk, does not tell what it should."""
    rows = read_catalog(out)
    bad = list(fates.keys() ^ rows.keys())
    for name, row in rows.items():
        told = None if row.status == DONE else row.reason
        lost = [output for output in row.outputs if not (out / name).with_name(output.name).is_file()]
        if name in fates and (told != fates[name] or lost or (told is None) != bool(row.outputs)):
            bad.append(f"{name}: {row.status}, {row.reason}")
    return sorted(bad)


def reasons(out: Path) -> dict[str, int]:
    """How many pictures ended with each code."""
    return dict(Counter(row.reason or row.status for row in read_catalog(out).values()))


def last_end(out: Path, start: datetime, names: Collection[str]) -> float:
    """Seconds until the last of these pictures had ended."""
    rows = read_catalog(out)
    return round((max(rows[name].finished for name in names) - start).total_seconds(), 1)


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the plain figures, and all runs."""
    first = runs[0]
    plain = [key for key, value in first.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    medians = {key: spread([run[key] for run in runs]) for key in plain}
    return {"good": all(run["good"] for run in runs), **medians, "runs": list(runs)}


def told(run: Mapping[str, Any]) -> str:
    """The figures of a run, one a line."""
    return "".join(f"\n  {key:24} {value}" for key, value in run.items())


Measure = Callable[[Path, Sizes, int, int], dict[str, Any]]
MEASURED: dict[str, Measure] = {
    "mixed": measure_mixed,
    "poison": measure_poison,
    "same": measure_same,
    "memory": measure_memory,
    "giant": measure_giant,
}

if __name__ == "__main__":
    main()
