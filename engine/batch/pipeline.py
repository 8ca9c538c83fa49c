# pyright: reportUnknownMemberType=false
"""A batch on a Ray cluster: mask actors plan, tile actors restore, tasks finish; the driver counts.

    items ──► prepare ──► one shard ───► bundles ──► lane "small" ──────────────────────────► outcome
                    └───► many shards ─► runs ─────► lane "large" ──► all drawn ──► finish ──► outcome

A bundle is of small pictures, each restored in one go. A run is of up to 8 shards of a large one, whose canvas is laid
out by `prepare`. The lanes have actors of their own, so that a giant never holds up the small. All state is in the
output folder (receipts, records, intents): killed anywhere, the same command goes on.
"""

import logging
import pickle
import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import ray
from ray import cloudpickle

from engine.batch.actors import Preparer, TileActor, finish
from engine.batch.inputs import Item
from engine.batch.lane import Event, Lane, Pool
from engine.batch.nursery import LostChildError
from engine.batch.tiles import Bundle, Prepared, Preparing, Restoring, Run
from engine.batch.work import DONE, FAILED, Drawn, Order, Outcome, Workers
from engine.errors import BatchError, BatchStalled, NotEnoughMemory, PlanError, ProcessDied, TooFewCpus, TooFewGpus
from engine.geometry import ceil_div

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
PREPARER_BYTES = WORKER_BYTES // 2
WORKERS_PER_PREPARER = 16
MAX_RESTARTS = 3
CLOSING_S = 5.0
STARTING_S = 300.0
"""What a busy cluster may take to start a process anew."""


def preparers(workers: int) -> int:
    """Actors that look at pictures for so many tile actors of a lane."""
    return ceil_div(workers, WORKERS_PER_PREPARER)


def booked_bytes(workers: Workers) -> int:
    """The memory that Ray keeps for so many; they rarely have as much at the same time."""
    return _tasks(workers) * WORKER_BYTES + preparers(workers.count) * PREPARER_BYTES


def _tasks(workers: Workers) -> int:
    """The tile actors of both lanes, and a task that finishes."""
    return 2 * workers.count + 1


def check_cluster(workers: Workers) -> None:
    """Raises TooFewCpus, TooFewGpus, NotEnoughMemory where pools would starve: Ray then waits for ever, in silence."""
    who, tasks = f"{workers.count} workers", _tasks(workers)
    _check_there("CPU", tasks * LANE_CPUS + preparers(workers.count) * PREPARER_CPUS, TooFewCpus, who)
    _check_there("GPU", tasks * workers.gpu_share, TooFewGpus, f"{who} with --gpu-share {workers.gpu_share:g}")
    _check_there("memory", booked_bytes(workers), NotEnoughMemory, who)


def _check_there(kind: str, needed: float, error: type[PlanError], who: str) -> None:
    there = float(cast("dict[str, float]", ray.cluster_resources()).get(kind, 0))
    if there < needed:
        raise error(
            f"{who} need {needed:,.12g} of the cluster's {kind}, it has {there:,.12g}; give fewer, or add nodes"
        )


def _made(kind: type, *arguments: object) -> bytes:
    return cast("bytes", cast("Any", cloudpickle).dumps((kind, arguments)))


_finish = cast("Any", ray.remote)(max_retries=3, retry_exceptions=[LostChildError], num_cpus=LANE_CPUS)(finish)


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
        self._ended: list[Lane] = []
        """Lanes that have nothing more to do, or were given up; Ray Data takes them down."""
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
                if not more and "prepare" in self._lanes and not self._in_flight("prepare"):
                    self._end("prepare")
                self._release()
                if not more and not self._busy():
                    self._end(*self._lanes)
                    until = time.monotonic() + CLOSING_S
                    for lane in self._ended:
                        lane.join(max(0.0, until - time.monotonic()))
                    return
                yield from self._next_event()
        finally:
            self._abort()

    def _end(self, *names: str) -> None:
        for name in names:
            self._ended.append(self._lanes.pop(name))
            self._ended[-1].end()

    def _abort(self) -> None:
        """Ends all lanes as they are. The interpreter dies where Ray is shut down under a thread of Ray Data."""
        lanes = (*self._ended, *self._lanes.values())
        for lane in lanes:
            lane.abort()
        for lane in lanes:
            lane.join(STARTING_S)

    def _wants_more(self) -> bool:
        """Whether so little is planned ahead that another handful of pictures may be looked at."""
        return (
            self._in_flight("prepare") < 2 * self._preparers
            and len(self._small) < 4 * self._workers.count * BUNDLE_ITEMS
            and len(self._open) + len(self._finishing) < OPEN_PER_WORKER * self._workers.count
        )

    def _busy(self) -> bool:
        waiting = self._small or self._open or self._finishing
        return bool(waiting) or any(lane.in_flight for lane in self._lanes.values())

    def _in_flight(self, name: str) -> int:
        return len(self._lanes[name].in_flight) if name in self._lanes else 0

    def _lane(self, name: str) -> Lane:
        """The lane of this name, opened when it is asked for first."""
        if name not in self._lanes:
            if name == "prepare":
                pool = Pool(self._preparers, PREPARER_CPUS, PREPARER_BYTES)
                self._lanes[name] = Lane(name, Preparer, _made(Preparing, self._order), pool, self._outbox)
            else:
                made = _made(Restoring, self._order, self._workers)
                self._lanes[name] = Lane(name, TileActor, made, self._tiles, self._outbox)
        return self._lanes[name]

    def _release(self) -> None:
        """Gives the lanes what they can take: bundles, smaller where little is left, and runs of the open pictures."""
        while self._small and self._in_flight("small") < 2 * self._workers.count:
            self._lane("small").put(self._bundle())
        while self._in_flight("large") < 2 * self._workers.count:
            picture = next((large for large in self._open if large.has_more), None)
            if picture is None:
                return
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
            if found.num_shards == 0:
                self._submit(found.item)
            elif found.num_shards > 1:
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
                self._submit(picture.item, picture.attempts)

    def _submit(self, item: Item, attempts: int = 1) -> None:
        self._finishing[item.name] = attempts
        body = pickle.dumps((self._order, item))
        task = _finish.options(memory=WORKER_BYTES, num_gpus=self._workers.gpu_share).remote(body)

        def told(future: "Future[bytes]") -> None:
            error = future.exception()
            if error is None:
                self._outbox.put(pickle.loads(future.result()))
            else:
                code = ProcessDied.code if isinstance(error, LostChildError) else BatchError.code
                lost = f"{item.image}: it is drawn, and was lost while it was finished ({error}); run again"
                self._outbox.put(Outcome(item, FAILED, code, lost))

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
            self._ended.append(lane)
            for work in lane.in_flight.values():
                self._lane(name).put(work)
