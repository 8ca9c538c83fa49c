# pyright: reportUnknownMemberType=false
"""A batch on a Ray cluster: mask actors plan, tile actors restore, tasks finish; the driver counts.

    items ──► prepare ──► one shard ───► bundles ──► lane "small" ──────────────────────────► outcome
                    └───► many shards ─► runs ─────► lane "large" ──► all drawn ──► finish ──► outcome

A bundle is of small pictures, each restored in one go. A run is of up to 8 shards of a large one, whose canvas is laid
out by `prepare`. The lanes have actors of their own, so that a giant never holds up the small. All state is in the
output folder (receipts, records, intents): killed anywhere, the same command goes on.
"""

import logging
import queue
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, WorkerCrashedError

from engine.batch.attempts import MAX_SHARED, Attempts
from engine.batch.inputs import Item
from engine.batch.lane import Batch, Event, Lane, Pool, answer
from engine.batch.scratch import Scratch
from engine.batch.work import DONE, FAILED, Drawn, Order, Outcome, Workers, guarded, restore_item
from engine.errors import BatchStalled, InputError, PlanError, ProcessDied, TooFewCpus, TooFewGpus
from engine.failpoints import hit
from engine.geometry import ceil_div
from engine.image import ImageInfo
from engine.isolate import probe_in_child, probe_many_in_child
from engine.outputs import BATCH
from engine.planning import output_size
from engine.restoration import Part
from engine.tiling.grid import Grid

log = logging.getLogger(__name__)

BUNDLE_PIXELS = 16_000_000
BUNDLE_ITEMS = 16
RUN_SHARDS = 8
PREPARED_TOGETHER = 16
OPEN_PER_WORKER = 2
"""Large pictures that are begun and not finished, per tile actor: their staged pixels wait on the disk."""
WORKER_BYTES = 1 << 30
LANE_CPUS = 0.5
"""Both lanes may be at work at once: each tile actor books half a core and takes what it gets."""
PREPARER_CPUS = 0.25
WORKERS_PER_PREPARER = 16
MAX_RESTARTS = 3
STARTING_S = 300.0
"""What a busy cluster may take to start a process anew."""


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


def preparers(workers: int) -> int:
    """Actors that look at pictures for so many tile actors of a lane."""
    return ceil_div(workers, WORKERS_PER_PREPARER)


def check_cluster(workers: Workers) -> None:
    """Raises TooFewCpus or TooFewGpus where the pools would starve: Ray Data then waits for ever, and says nothing."""
    tile_actors = 2 * workers.count
    cpus = (tile_actors + 1) * LANE_CPUS + preparers(workers.count) * PREPARER_CPUS  # 1 more for a task that finishes
    _check_there("CPU", cpus, TooFewCpus, f"{workers.count} workers")
    gpus = (tile_actors + 2) * workers.gpu_share  # 2 more: one that finishes, and one that is tried alone
    _check_there("GPU", gpus, TooFewGpus, f"{workers.count} workers with --gpu-share {workers.gpu_share:g}")


def _check_there(kind: str, needed: float, error: type[PlanError], who: str) -> None:
    there = float(cast("dict[str, float]", ray.cluster_resources()).get(kind, 0))
    if there < needed:
        raise error(f"{who} need {needed:g} {kind}s of the cluster, it has {there:g}; give fewer, or add nodes")


class Preparer:
    """Tells small pictures from large ones by their headers, and begins the large ones. Loads no network."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._restorer = order.restorer(threads=1)

    def __call__(self, batch: Batch) -> Batch:
        return answer(batch, self._prepare)

    def _prepare(self, bundle: Bundle) -> list[Prepared]:
        order = self._order
        near = [item for item in bundle.items if not item.is_remote]
        infos = probe_many_in_child(
            [Path(item.image) for item in near], max_pixels=order.max_pixels, page=order.request.page
        )
        probed = {item.name: info for item, info in zip(near, infos, strict=True)}
        return [self._look(item, probed.get(item.name)) for item in bundle.items]

    def _look(self, item: Item, probed: ImageInfo | InputError | None) -> Prepared:
        def look() -> Prepared:
            if isinstance(probed, InputError):
                raise probed
            with item.local() as local:
                job, request = self._order.job(local), self._order.request
                info = probed or probe_in_child(job.image, max_pixels=job.max_pixels, page=request.page)
                size = output_size(request, info.size)
                num_shards = Grid(size).num_shards_of(0)
                if num_shards > 1 and not self._restorer.lay_out(job, request):
                    num_shards = 1  # finished, or only to be exported
            return Prepared(item, size.num_pixels, num_shards)

        found = guarded(item, look)
        return found if isinstance(found, Prepared) else Prepared(item, 0, 1)  # who restores it, tells what is wrong


class TileActor:
    """Restores bundles and draws runs, one thread each."""

    def __init__(self, order: Order, workers: Workers) -> None:
        self._order, self._workers = order, workers
        self._restorer = order.restorer(threads=1)
        self._attempts = Attempts(order.out / BATCH / "attempts")
        self._node = ray.get_runtime_context().get_node_id()
        self._scratch = Scratch()
        self._part: tuple[str, Part] | None = None

    def __call__(self, batch: Batch) -> Batch:
        return answer(batch, self._work)

    def __del__(self) -> None:
        """Ray Data lets go of an actor's object when it ends the pool."""
        self._scratch.close()

    def _work(self, work: Bundle | Run) -> list[Outcome]:
        if isinstance(work, Bundle):
            return [self._attempt(item, None) for item in work.items]
        return [self._attempt(work.item, work)]

    def _attempt(self, item: Item, run: Run | None) -> Outcome:
        """One more try; the third, after two deaths, in a process that nothing else shares."""
        name = item.name if run is None else f"{item.name}\0{run.first}"  # runs of a picture are tried side by side
        deaths = self._attempts.deaths(name, living=_living_nodes)
        if deaths >= MAX_SHARED:
            outcome = guarded(item, lambda: self._alone(item, run))
        else:
            self._attempts.begin(name, node=self._node)
            with _Alarm(self._workers.stall_s):
                outcome = self.once(item, run)
        self._attempts.end(name)
        return replace(outcome, attempts=deaths + 1)

    def once(self, item: Item, run: Run | None) -> Outcome:
        """Restores a picture, or draws a run of one; no error but those of this program comes out."""
        if run is None:
            return restore_item(self._restorer, item, self._order)
        return guarded(item, lambda: self._draw(run))

    def _draw(self, run: Run) -> Outcome:
        hit(f"draw {run.item.name}")
        ends = list(self._opened(run.item).draw(run.first, run.last))
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
        task = _try_alone.options(num_cpus=0, num_gpus=self._workers.gpu_share).remote(
            self._order, self._workers, item, run
        )
        try:
            return ray.get(task, timeout=self._workers.stall_s)
        except WorkerCrashedError as error:
            raise ProcessDied(
                f"{item.image}: the process that restores it has died {MAX_SHARED + 1} times, at last with nothing "
                "else in it; leave it out, or report it"
            ) from error
        except OutOfMemoryError as error:
            raise ProcessDied(f"{item.image}: takes more memory than the node has ({error}); leave it out") from error
        except GetTimeoutError as error:
            ray.cancel(task, force=True)
            raise ProcessDied(
                f"{item.image}: not restored after {self._workers.stall_s:g} s, alone in its process; leave it out"
            ) from error


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in cast("list[dict[str, Any]]", ray.nodes()) if node["Alive"]}


class _Alarm:
    """Ends this process when it is at one picture for too long: even a loop in C cannot hold it up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)  # the default action of SIGALRM ends the process

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


@ray.remote(max_retries=0)
def _try_alone(order: Order, workers: Workers, item: Item, run: Run | None) -> Outcome:
    return TileActor(order, workers).once(item, run)


@ray.remote(max_retries=3, num_cpus=LANE_CPUS)
def _finish(order: Order, item: Item) -> Outcome:
    """Pyramid, exports, receipt and name of a picture whose shards are drawn: the way of any resumed picture."""
    return restore_item(order.restorer(threads=1), item, order)


@dataclass(slots=True)
class _Large:
    """A picture that is drawn in runs."""

    item: Item
    num_shards: int
    released: int = 0
    in_flight: int = 0
    drawn: int = 0
    attempts: int = 1
    failure: Outcome | None = None

    @property
    def has_more(self) -> bool:
        return self.released < self.num_shards and self.failure is None


class Pipeline:
    """One batch on the cluster that this process is connected to."""

    def __init__(self, order: Order, workers: Workers, drawn: Drawn | None = None) -> None:
        check_cluster(workers)
        self._order, self._workers, self._told = order, workers, drawn
        self._outbox: queue.Queue[Event | Outcome] = queue.Queue()
        self._tiles = Pool(workers.count, LANE_CPUS, WORKER_BYTES, workers.gpu_share)
        self._lanes: dict[str, Lane] = {}
        self._small: deque[Prepared] = deque()
        self._open: deque[_Large] = deque()
        self._finishing: dict[str, int] = {}
        """The attempts that each picture took, by its name."""
        self._preparers = preparers(workers.count)
        self._restarts = 0
        """Since something ended."""

    def run(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """Restores everything; outcomes come as pictures end, in no order. Raises BatchStalled where nothing moves."""
        source = iter(items)
        more = True
        self._lane("small")  # its actors load the network while the first pictures are looked at
        try:
            while True:
                while more and self._wants_more():
                    chunk = tuple(islice(source, PREPARED_TOGETHER))
                    more = len(chunk) == PREPARED_TOGETHER
                    if chunk:
                        self._lane("prepare").put(Bundle(chunk))
                self._release()
                if not more and not self._busy():
                    for lane in self._lanes.values():
                        lane.end()
                    for lane in self._lanes.values():
                        lane.join()
                    return
                yield from self._next_event()
        except BaseException:
            for lane in self._lanes.values():
                lane.abort()
            raise

    def _wants_more(self) -> bool:
        """Whether so little is planned ahead that another handful of pictures may be looked at."""
        return (
            self._in_flight("prepare") < 2 * self._preparers
            and len(self._small) < 4 * self._workers.count * BUNDLE_ITEMS
            and len(self._open) < OPEN_PER_WORKER * self._workers.count
        )

    def _busy(self) -> bool:
        waiting = self._small or self._open or self._finishing
        return bool(waiting) or any(lane.in_flight for lane in self._lanes.values())

    def _in_flight(self, name: str) -> int:
        return len(self._lanes[name].in_flight) if name in self._lanes else 0

    def _lane(self, name: str) -> Lane:
        """The lane of this name, opened when it is asked for first."""
        if name not in self._lanes:
            arguments: dict[str, object] = {"order": self._order}
            if name == "prepare":
                pool = Pool(self._preparers, PREPARER_CPUS, WORKER_BYTES // 2)
                self._lanes[name] = Lane(name, Preparer, arguments, pool, self._outbox)
            else:
                arguments["workers"] = self._workers
                self._lanes[name] = Lane(name, TileActor, arguments, self._tiles, self._outbox)
        return self._lanes[name]

    def _release(self) -> None:
        """Gives the lanes what they can take: bundles, smaller where little is left, and runs of the open pictures."""
        while self._small and self._in_flight("small") < 2 * self._workers.count:
            self._lane("small").put(self._bundle())
        while self._in_flight("large") < 2 * self._workers.count:
            picture = next((large for large in self._open if large.has_more), None)
            if picture is None:
                return
            self._open.remove(picture)
            self._open.append(picture)  # in turn: none waits for another to end
            first, last = picture.released, min(picture.released + RUN_SHARDS, picture.num_shards)
            picture.released = last
            picture.in_flight += 1
            self._lane("large").put(Run(picture.item, first, last))

    def _bundle(self) -> Bundle:
        share = ceil_div(len(self._small), 2 * self._workers.count)
        items: list[Item] = []
        num_pixels = 0
        while self._small and len(items) < min(share, BUNDLE_ITEMS) and num_pixels < BUNDLE_PIXELS:
            prepared = self._small.popleft()
            items.append(prepared.item)
            num_pixels += prepared.num_pixels
        return Bundle(tuple(items))

    def _next_event(self) -> Iterator[Outcome]:
        patience_s = STARTING_S + 2 * self._workers.stall_s
        try:
            event = self._outbox.get(timeout=patience_s)
        except queue.Empty:
            if any(lane.in_flight for lane in self._lanes.values()):  # else a task that finishes a giant takes its time
                self._restart(BatchStalled(f"nothing has ended for {patience_s:g} s; look at the cluster, run again"))
            return
        if isinstance(event, Outcome):
            yield replace(event, attempts=self._finishing.pop(event.item.name))
        elif self._lanes.get(event.lane.name) is not event.lane:
            return  # of a lane that was given up
        elif event.error is not None:
            self._restart(event.error)
        else:
            work = event.lane.take(event)
            self._restarts = 0
            if event.lane.name == "prepare":
                self._sort(event.result)
            elif event.lane.name == "small":
                yield from event.result
            else:
                yield from self._drawn(cast("Run", work), *event.result)

    def _sort(self, looked_at: list[Prepared]) -> None:
        for found in looked_at:
            if found.num_shards > 1:
                self._open.append(_Large(found.item, found.num_shards))
            else:
                self._small.append(found)

    def _drawn(self, run: Run, outcome: Outcome) -> Iterator[Outcome]:
        picture = next(large for large in self._open if large.item == run.item)
        picture.in_flight -= 1
        picture.attempts = max(picture.attempts, outcome.attempts)
        picture.drawn += outcome.shards_done
        if self._told is not None:
            self._told(run.item.name, picture.drawn, picture.num_shards)
        if outcome.status != DONE:
            picture.failure = outcome
        if picture.in_flight == 0 and not picture.has_more:
            self._open.remove(picture)
            if picture.failure is not None and picture.failure.reason == ProcessDied.code:
                yield picture.failure
            else:  # after another failure, too: finishing fails in the same way, says so and tidies up
                self._submit(picture)

    def _submit(self, picture: _Large) -> None:
        item = picture.item
        self._finishing[item.name] = picture.attempts
        task = _finish.options(memory=WORKER_BYTES, num_gpus=self._workers.gpu_share).remote(self._order, item)

        def told(future: "Future[Outcome]") -> None:
            error = future.exception()
            died = f"{item.image}: the task that finishes it has died ({error}); run the same command again"
            self._outbox.put(Outcome(item, FAILED, ProcessDied.code, died) if error else future.result())

        task.future().add_done_callback(told)

    def _restart(self, error: BaseException) -> None:
        """Opens the lanes anew with what was in flight. What is done by then costs a look."""
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise error
        log.warning("the pipeline broke down (%s); it is started again", error)
        lanes, self._lanes = self._lanes, {}
        for name, lane in lanes.items():
            lane.abort()
            for work in lane.in_flight.values():
                self._lane(name).put(work)
