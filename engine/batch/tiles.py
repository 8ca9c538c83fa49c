"""What the children of `engine.batch.nursery` do for a batch.

They look at pictures, restore small ones, draw parts of large ones and finish these. Nothing here knows Ray.
"""

import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from engine.batch.attempts import MAX_SHARED, Attempts, Nodes
from engine.batch.inputs import Item
from engine.batch.nursery import Child, LostChildError, at_end
from engine.batch.scratch import Scratch
from engine.batch.work import DONE, Order, Outcome, Workers, guarded, restore_item
from engine.errors import EngineError, OutputBusy, ProcessDied
from engine.failpoints import hit
from engine.image import ImageInfo
from engine.isolate import probe_in_child, probe_many_in_child
from engine.planning import drawing_order
from engine.request import output_size
from engine.restoration import Part, Restorer
from engine.tiling.grid import Grid

PATIENCE_S = 240.0
"""What a process that is ending, or a machine that sleeps, may take until it lets go of its picture."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Small pictures."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Shards `first` to `last - 1` of a large picture, in drawing order."""

    item: Item
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture that can be restored; one of a single shard is not begun yet."""

    item: Item
    num_pixels: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class Here:
    """Where a child is."""

    node: str
    """Of the cluster."""
    nursery: Path


Actor = Callable[[Any, Nodes], object]
"""Does a work; the second argument are the nodes that live."""

_actor: Actor | None = None


def make(made: bytes, node: str, nursery: str) -> None:
    """Makes this process an actor, once: `made` is a pickle of its class and the arguments that come after a `Here`."""
    global _actor
    if _actor is None:
        kind, arguments = pickle.loads(made)
        _actor = kind(Here(node, Path(nursery)), *arguments)


def act(row: bytes, living: Nodes) -> bytes:
    """The answer to a row of a lane."""
    assert _actor is not None
    number, work = pickle.loads(row)
    return pickle.dumps((number, _actor(work, living)))


def finish(body: bytes) -> bytes:
    """Pyramid, exports, receipt and name of a picture whose shards are drawn: the way of any resumed picture."""
    order, item = pickle.loads(body)
    return pickle.dumps(_restored(order.restorer(threads=1), item, order, PATIENCE_S))


def _restored(restorer: Restorer, item: Item, order: Order, patience_s: float) -> Outcome:
    """As `restore_item`. Who is at this picture is of this batch, which holds the folder's lock: it is waited for."""
    until = time.monotonic() + patience_s
    while (outcome := restore_item(restorer, item, order)).reason == OutputBusy.code and time.monotonic() < until:
        time.sleep(0.5)
    return outcome


def try_alone(here: Here, order: Order, workers: Workers, item: Item, run: Run | None) -> Outcome:
    """A picture, or a run of one, in a process that does nothing else."""
    return Restoring(here, order, workers).once(item, run)


class Preparing:
    """Tells small pictures from large ones by their headers, and begins the large ones. Loads no network."""

    def __init__(self, here: Here, order: Order) -> None:
        self._order = order
        self._restorer = order.restorer(threads=1)

    def __call__(self, bundle: Bundle, living: Nodes) -> list[Prepared]:
        order = self._order
        near = [item for item in bundle.items if not item.is_remote]
        infos = probe_many_in_child(
            [Path(item.image) for item in near], max_pixels=order.max_pixels, page=order.request.page
        )
        probed = {item.name: info for item, info in zip(near, infos, strict=True)}
        return [self._look(item, probed.get(item.name)) for item in bundle.items]

    def _look(self, item: Item, probed: ImageInfo | EngineError | None) -> Prepared:
        def look() -> Prepared:
            if isinstance(probed, EngineError):
                raise probed
            with item.local() as local:
                job, request = self._order.job(local), self._order.request
                info = probed or probe_in_child(job.image, max_pixels=job.max_pixels, page=request.page)
                size = output_size(request, info.size)
                num_shards = Grid(size).num_shards_of(0)
                if num_shards > 1 and not self._restorer.lay_out(job, request):
                    num_shards = 0
            return Prepared(item, size.num_pixels, num_shards)

        found = guarded(item, look)
        if isinstance(found, Prepared):
            return found
        return Prepared(item, 0, int(found.reason != OutputBusy.code))  # who restores it, tells what is wrong


class Restoring:
    """Restores bundles and draws runs, one thread each."""

    def __init__(self, here: Here, order: Order, workers: Workers) -> None:
        self._here, self._order, self._workers = here, order, workers
        self._restorer = order.restorer(threads=1)
        self._attempts = Attempts(order.out)
        self._scratch = Scratch()
        at_end.append(self._scratch.close)
        self._part: tuple[str, Part] | None = None

    def __call__(self, work: Bundle | Run, living: Nodes) -> list[Outcome]:
        if isinstance(work, Bundle):
            return [self._attempt(item, None, living) for item in work.items]
        return [self._attempt(work.item, work, living)]

    def _attempt(self, item: Item, run: Run | None, living: Nodes) -> Outcome:
        """One more try; the third, after two deaths, in a process that nothing else shares."""
        name = item.name if run is None else f"{item.name}\0{run.first}"  # runs of a picture are tried side by side
        deaths = self._attempts.deaths(name, node=self._here.node, living=living)

        def attempt() -> Outcome:
            if deaths >= MAX_SHARED:
                return self._alone(item, run)
            self._attempts.begin(name, node=self._here.node)
            with _Alarm(self._workers.stall_s):
                return self.once(item, run)

        outcome = guarded(item, attempt)
        if outcome.reason != ProcessDied.code:  # or it kills two more where its bundle is given out again
            self._attempts.end(name)
        return replace(outcome, attempts=deaths + 1)

    def once(self, item: Item, run: Run | None) -> Outcome:
        """Restores a picture, or draws a run of one; no error but those of this program comes out."""
        if run is None:
            patience_s = min(PATIENCE_S, self._workers.stall_s / 2)
            return _restored(self._restorer, item, self._order, patience_s)
        return guarded(item, lambda: self._draw(run))

    def _draw(self, run: Run) -> Outcome:
        hit(f"draw {run.item.name}")
        part = self._opened(run.item)
        ends = list(part.draw(islice(drawing_order(part.plan, part.tiling), run.first, run.last)))
        reused = sum(end.reused for end in ends)
        seconds = sum(end.seconds for end in ends)
        return Outcome(run.item, DONE, seconds=seconds, shards_done=len(ends), shards_reused=reused)

    def _opened(self, item: Item) -> Part:
        """Runs of one picture follow each other: it is decoded once."""
        if self._part is None or self._part[0] != item.name:
            self._part = None
            self._scratch.clear()
            job = self._order.job(item.fetched(self._scratch.path))
            self._part = (item.name, Part(self._restorer, job, self._order.request, self._scratch.path))
        return self._part[1]

    def _alone(self, item: Item, run: Run | None) -> Outcome:
        child = Child(self._here.nursery)
        try:
            return child.ask(
                "engine.batch.tiles:try_alone",
                self._here,
                self._order,
                self._workers,
                item,
                run,
                timeout_s=self._workers.stall_s,
            )
        except LostChildError as error:
            raise ProcessDied(
                f"{item.image}: the process that restores it has died {MAX_SHARED + 1} times, at last with nothing "
                "else in it; leave it out, or report it"
            ) from error
        except TimeoutError as error:
            raise ProcessDied(
                f"{item.image}: not restored after {self._workers.stall_s:g} s, alone in its process; leave it out"
            ) from error
        finally:
            child.close()


class _Alarm:
    """Ends this process when it is at one picture for too long: even a loop in C cannot hold it up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)  # the default action of SIGALRM ends the process

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
