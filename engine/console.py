"""What a person or a program sees while pictures are restored: progress on stderr, results on stdout."""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from engine import generated_map
from engine.errors import EXIT_FAILED, EXIT_REFUSED, EngineError, InputError, PlanError, UnreadableInput, printable
from engine.header import SUFFIXES
from engine.image import ImageInfo
from engine.mask import find_mask
from engine.models.card import Card
from engine.ome_zarr import is_zarr
from engine.planning import Request, halo_cost, network_operations
from engine.render import Tiling
from engine.restoration import Job, Receipt, Restorer
from engine.tiling.execute import ShardEnd
from engine.tiling.plan import Plan

PLAIN_LINE_EVERY_S = 5.0
PICTURE_SUFFIXES = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


@dataclass(frozen=True, slots=True)
class End:
    """How one picture ended."""

    status: str
    """done | refused | failed"""
    error: EngineError | None = None


def exit_code(ends: Sequence[End]) -> int:
    """0 all done, 3 some pictures failed, 4 nothing worse than refused plans."""
    errors = [end.error for end in ends if end.error is not None]
    if not errors:
        return 0
    return EXIT_REFUSED if all(isinstance(error, PlanError) for error in errors) else EXIT_FAILED


def find_pictures(inputs: Sequence[Path], out: Path | None) -> dict[str, Path]:
    """Output names → pictures. Folders give the pictures in them, masks left out; stems that collide keep suffixes."""
    paths: list[Path] = []
    for given in inputs:
        if not given.is_dir() or is_zarr(given):
            paths.append(given)
            continue
        if out is not None and out.resolve().is_relative_to(given.resolve()):
            raise PlanError(f"{out}: --out lies inside the input folder {given}; choose one outside it")
        found = sorted(path for path in given.iterdir() if _is_input(path))
        if not found:
            raise UnreadableInput(f"{given}: 0 pictures in it; give a folder of pictures")
        paths += found
    paths = list(dict.fromkeys(paths))
    stems = Counter(path.stem for path in paths)
    names = Counter(path.name for path in paths)
    doubled = next((name for name, count in names.items() if count > 1), None)
    if doubled is not None:
        raise PlanError(f"{doubled}: {names[doubled]} inputs have this name and would share 1 output; run them apart")
    named = {path.stem if stems[path.stem] == 1 else path.name: path for path in paths}
    return named if len(named) == len(paths) else {path.name: path for path in paths}


def _is_input(path: Path) -> bool:
    """Whether a file in an input folder is a picture, and neither a mask nor something that a run has left there."""
    ours = path.stem.endswith((".mask", ".inprogress", Path(generated_map.SUFFIX).stem))
    return not ours and (path.suffix.lower() in PICTURE_SUFFIXES or is_zarr(path))


class Console:
    """Progress bars on a terminal, plain lines elsewhere; JSON objects where asked for."""

    def __init__(self, *, num_pictures: int, as_json: bool) -> None:
        self._as_json = as_json
        self._num_pictures = num_pictures
        self._rich = RichConsole(stderr=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        if self._rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._rich)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """One line on stderr."""
        self._rich.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def run(self, job: Job, mask: str, *, request: Request, restorer: Restorer) -> End:
        """Restore one picture and report how it ended; never raises an EngineError."""
        started = time.monotonic()
        meter = _Meter(self, job.name)
        try:
            job = replace(job, mask=find_mask(mask, image=job.image))
            receipt = restorer.restore(job, request, meter)
        except EngineError as error:
            end = End("refused" if isinstance(error, InputError | PlanError) else "failed", error)
            self.say(f"{job.image}: {end.status}, {error.code}: {error}")
            self._emit(job, end, None, time.monotonic() - started)
            return end
        finally:
            meter.close()
        end = End("done")
        names = ", ".join(str(path) for path in receipt.outputs)
        note = " (no tile computed)" if receipt.shards_reused == receipt.shards_total else ""
        self.say(f"{job.image}: done in {receipt.seconds:.1f} s{note}: {names}")
        for changed in receipt.notes:
            self.say(f"{job.image}: {changed}")
        self._emit(job, end, receipt, receipt.seconds)
        return end

    def _emit(self, job: Job, end: End, receipt: Receipt | None, seconds: float) -> None:
        if not self._as_json:
            return
        line = {
            "input": str(job.image),
            "status": end.status,
            "reason": None if end.error is None else end.error.code,
            "message": None if end.error is None else str(end.error),
            "outputs": [] if receipt is None else [str(path) for path in receipt.outputs],
            "notes": [] if receipt is None else list(receipt.notes),
            "plan_id": None if receipt is None else receipt.plan_id,
            "seconds": round(seconds, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "shards_total": 0 if receipt is None else receipt.shards_total,
            "shards_done": 0 if receipt is None else receipt.shards_done,
            "shards_reused": 0 if receipt is None else receipt.shards_reused,
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def advance(self, name: str, task: TaskID | None, done: int, total: int, rate: float) -> TaskID | None:
        """Show `done` of `total` shards of a picture."""
        if self._bar is not None:
            if task is None:
                task = self._bar.add_task(name, total=total, rate="")
            self._bar.update(task, completed=done, rate=f"{rate:.2f} tiles/s")
            return task
        now = time.monotonic()
        if done == total or now - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = now
            left_s = (total - done) / rate if rate else 0.0
            self.say(f"{name}: {done}/{total} shards, {rate:.2f} tiles/s, {left_s:.0f} s left")
        return task

    def remove(self, task: TaskID | None) -> None:
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)


class _Meter:
    """Counts the shards of one picture."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._task: TaskID | None = None
        self._done = self._fresh = 0
        self._started = time.monotonic()

    def __call__(self, end: ShardEnd, plan: Plan) -> None:
        self._done += 1
        self._fresh += not end.reused
        rate = self._fresh / max(1e-6, time.monotonic() - self._started)
        self._task = self._console.advance(self._name, self._task, self._done, plan.grid.num_shards, rate)

    def close(self) -> None:
        self._console.remove(self._task)


def describe_plan(plan: Plan, tiling: Tiling, info: ImageInfo, card: Card, operations_per_s: float) -> str:
    """The plan in words, and its grid as a drawing."""
    scale = int(plan.parameters["scale"])
    operations = network_operations(card, tiling, plan.size, scale)
    rows = [
        ("picture", f"{info.path} {info.size}, {info.channels} x {info.dtype}"),
        ("output", f"{plan.size}, scale {scale}, plan {plan.plan_id[:16]}"),
        ("model", f"{plan.model}, context {card.context_px[str(scale)]} px"),
        ("shards", f"{plan.grid.num_shards} on {len(plan.grid.level_sizes)} levels"),
        ("tiles", f"{tiling.tile_px} px in, enlarged {tiling.block_px} px at a time, batch {tiling.batch}"),
        ("halo", f"{100 * halo_cost(card, tiling, scale):.0f} % more work than the pixels alone"),
        ("memory", f"{plan.projected_ram_bytes / 2**30:.2f} GiB at most"),
        ("disk", f"{plan.projected_disk_bytes / 2**30:.2f} GiB at most"),
        ("expected", f"{operations / operations_per_s:.0f} s of network time on this machine"),
    ]
    return "\n".join([*(printable(f"{name:9} {text}") for name, text in rows), draw_grid(plan)])


def draw_grid(plan: Plan, *, most: int = 24) -> str:
    """The shards of the full size as a drawing, at most `most` a side."""
    keys = list(plan.grid.keys(0))
    num_rows, num_columns = max(key.iy for key in keys) + 1, max(key.ix for key in keys) + 1
    rows, columns = min(num_rows, most), min(num_columns, most)
    line = "+" + "---+" * columns
    cut = (
        "" if (rows, columns) == (num_rows, num_columns) else f"\n({num_columns} x {num_rows} shards, the first shown)"
    )
    return "\n".join([line] + ["|" + "   |" * columns + "\n" + line for _ in range(rows)]) + cut
