# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
"""A stream of small works through a pool of actors, as a Ray Data pipeline that is fed while it runs.

    driver ── put ──► feed (an actor) ──► read task ──► map_batches(actors) ──► driver

Ray Data reads from sources that it can read again: the feed keeps what it was given, by number, so that a read task
that was lost tells the same rows once more; a row whose result has arrived is told as an empty one. Rows are
descriptors of a few hundred bytes, one per block; pixels never pass through here.
"""

import asyncio
import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_TAKEN = b""

Batch = dict[str, list[Any]]
"""Rows as Ray Data hands them to an actor: one work in the column "work"."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors, and what each may use."""

    size: int
    num_cpus: float
    memory_bytes: int
    num_gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """What a lane says: the result of a work, or that it has broken down."""

    lane: "Lane"
    number: int
    result: Any
    error: BaseException | None = None


class Lane:
    """One pool at work; `put` returns at once, results arrive in `outbox`."""

    def __init__(self, name: str, actor: type, made: bytes, pool: Pool, outbox: "queue.Queue[Any]") -> None:
        """`made` is given to each actor when it starts."""
        self.name = name
        self.in_flight: dict[int, object] = {}
        self._outbox = outbox
        self._next = 0
        self._taken: list[int] = []
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._feed = cast("Any", ray.remote(_Feed)).options(num_cpus=0, scheduling_strategy=here).remote()
        context = DataContext.get_current()
        context.target_max_block_size = 1  # a row leaves its block at once: rows are all there is
        context.enable_progress_bars = False
        context.op_resource_reservation_enabled = False  # of what is not there: half of the driver's time
        source = ray.data.read_datasource(_FeedSource(self._feed), override_num_blocks=1, num_cpus=0)
        self._stream = source.map_batches(
            actor,
            batch_size=1,
            compute=ActorPoolStrategy(size=pool.size),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            memory=pool.memory_bytes,
            fn_constructor_args=(made,),
        )
        self._follower = threading.Thread(target=self._follow, name=f"lane-{name}", daemon=True)
        self._follower.start()

    def put(self, work: object) -> None:
        """Adds a work to the end of the line."""
        number, self._next = self._next, self._next + 1
        self.in_flight[number] = work
        self._feed.put.remote(pickle.dumps((number, work)), self._taken)
        self._taken = []

    def take(self, event: Event) -> object:
        """Strikes the work that an event tells of from those in flight."""
        self._taken.append(event.number)
        return self.in_flight.pop(event.number)

    def end(self) -> None:
        """Ends the stream when what is in the line is done; Ray Data then takes the pool down."""
        self._feed.put.remote(None, [])

    def join(self, timeout_s: float) -> None:
        """Waits for that, so long at most."""
        self._follower.join(timeout_s)

    def abort(self) -> None:
        """Ends the stream as it is: its read task fails, and Ray Data takes the pool down."""
        ray.kill(self._feed)

    def _follow(self) -> None:
        try:
            for batch in self._stream.iter_batches(batch_size=None, prefetch_batches=0):
                for answer in cast("Batch", batch)["answer"]:
                    self._outbox.put(Event(self, *pickle.loads(answer)))
        except BaseException as error:
            self._outbox.put(Event(self, -1, None, error))


def answer(batch: Batch, act: Callable[[bytes], bytes]) -> Batch:
    """What an actor of a pool does with a batch: `act` on each row; an answer begins with the number of its row."""
    return {"answer": [act(row) for row in batch["work"] if row != _TAKEN]}


class _Feed:
    """The line of works, as an actor. Asynchronous: many wait in `take` while one puts."""

    def __init__(self) -> None:
        self._rows: list[bytes | None] = []
        self._changed = asyncio.Condition()

    async def put(self, row: bytes | None, taken: list[int]) -> None:
        """Adds a row, and forgets the content of those whose results have arrived."""
        async with self._changed:
            self._rows.append(row)
            for number in taken:
                self._rows[number] = _TAKEN
            self._changed.notify_all()

    async def take(self, number: int) -> bytes | None:
        """The row of this number, as soon as there is one; None is the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < len(self._rows))
            return self._rows[number]


class _FeedSource(Datasource):
    def __init__(self, feed: object) -> None:
        self._feed = feed

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        feed = cast("Any", self._feed)

        def read() -> Iterator[pa.Table]:
            number = 0
            while (row := cast("bytes | None", ray.get(feed.take.remote(number)))) is not None:
                yield pa.table({"work": [row]})
                number += 1

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


logging.getLogger("ray.data").setLevel(logging.WARNING)
