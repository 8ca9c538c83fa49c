"""What a person or a program sees while pictures are restored: progress on stderr, results on stdout."""

import json
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from engine.batch.work import DONE, Outcome
from engine.errors import EXIT_FAILED, EXIT_REFUSED, PlanError, codes, printable
from engine.image import ImageInfo
from engine.memory import process_memory
from engine.models.card import Card
from engine.planning import halo_cost, network_operations
from engine.render import Tiling
from engine.tiling.execute import ShardEnd
from engine.tiling.plan import Plan

PLAIN_LINE_EVERY_S = 5.0


def exit_code(ends: Iterable[tuple[str, str | None]]) -> int:
    """From status and reason of all pictures: 0 all done, 3 some are not, 4 no plan was carried out."""
    told = list(ends)
    reasons = {reason for status, reason in told if status != DONE}
    if not reasons:
        return 0
    is_any_done = any(status == DONE for status, _ in told)
    return EXIT_REFUSED if not is_any_done and reasons <= codes(PlanError) else EXIT_FAILED


class Console:
    """Progress bars on a terminal, plain lines elsewhere; JSON objects where asked for."""

    def __init__(self, *, num_pictures: int, as_json: bool) -> None:
        self._as_json = as_json
        self._out = sys.stdout
        """Results only, wherever libraries are led to write meanwhile."""
        self._num_pictures = num_pictures
        self._rich = RichConsole(stderr=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._num_ended = self._num_bad = self._num_restored = 0
        self._started = time.monotonic()
        self._overall: TaskID | None = None
        self._drawn: dict[str, TaskID | None] = {}
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
        """One line on stderr; what a name holds beside letters is shown escaped, not obeyed by the terminal."""
        self._rich.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def tell(self, outcome: Outcome) -> None:
        """Report how a picture ended."""
        self._num_ended += 1
        self._num_bad += outcome.status != DONE
        self._num_restored += not outcome.looked_up
        item = outcome.item
        self.remove(self._drawn.pop(item.name, None))
        if outcome.status == DONE:
            names = ", ".join(outcome.outputs)
            note = " (no tile computed)" if outcome.shards_reused == outcome.shards_total else ""
            how = "finished before" if outcome.looked_up else f"done in {outcome.seconds:.1f} s{note}"
            self.say(f"{item.image}: {how}: {names}")
            for changed in outcome.notes:
                self.say(f"{item.image}: {changed}")
        else:
            self.say(f"{item.image}: {outcome.status}, {outcome.reason}: {outcome.message}")
        if self._num_pictures > 1:
            rate = self._num_restored / max(1e-6, time.monotonic() - self._started)
            name = f"all, {self._num_bad} not restored" if self._num_bad else "all"
            self._overall = self.advance(name, self._overall, self._num_ended, self._num_pictures, rate, "pictures")
        if self._as_json:
            line = json.dumps(_line(outcome))
            if self._bar is not None and self._out.isatty():  # above the bars, on the same screen
                self.say(line)
            else:
                self._out.write(line + "\n")
                self._out.flush()

    def drawn(self, name: str, done: int, total: int) -> None:
        """Show `done` of `total` shards of a large picture that others draw."""
        if self._bar is not None:
            self._drawn[name] = self.advance(name, self._drawn.get(name), done, total, 0.0, "shards")

    def advance(self, name: str, task: TaskID | None, done: int, total: int, rate: float, unit: str) -> TaskID | None:
        """Show `done` of `total` units."""
        if self._bar is not None:
            if task is None:
                task = self._bar.add_task(name, total=total, rate="")
            told = f"{rate:.2f} {unit}/s" if rate else unit
            self._bar.update(task, description=printable(name), completed=done, rate=told)
            return task
        now = time.monotonic()
        if done == total or now - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = now
            left_s = (total - done) / rate if rate else 0.0
            self.say(f"{name}: {done}/{total}, {rate:.2f} {unit}/s, {left_s:.0f} s left")
        return task

    def remove(self, task: TaskID | None) -> None:
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)


class Meter:
    """Shows the shards of one picture after another."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._task: TaskID | None = None
        self._done = self._fresh = 0
        self._started = 0.0

    def __call__(self, end: ShardEnd, plan: Plan) -> None:
        if plan.name != self._name:
            self.close()
            self._name, self._done, self._fresh, self._started = plan.name, 0, 0, time.monotonic() - end.seconds
        self._done += 1
        self._fresh += not end.reused
        rate = self._fresh / max(1e-6, time.monotonic() - self._started)
        self._task = self._console.advance(self._name, self._task, self._done, plan.grid.num_shards, rate, "shards")

    def close(self) -> None:
        self._console.remove(self._task)
        self._task = None


def _line(outcome: Outcome) -> dict[str, object]:
    return {
        "input": outcome.item.image,
        "status": outcome.status,
        "reason": outcome.reason,
        "message": outcome.message,
        "outputs": outcome.outputs,
        "notes": outcome.notes,
        "plan_id": outcome.plan_id,
        "seconds": round(outcome.seconds, 3),
        "attempts": outcome.attempts,
        "peak_rss_bytes": process_memory("VmHWM"),
        "shards_total": outcome.shards_total,
        "shards_done": outcome.shards_done,
        "shards_reused": outcome.shards_reused,
    }


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
