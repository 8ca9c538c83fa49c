"""Runs the work of a canvas shard by shard, skipping what is finished."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from engine.tiling.canvas import AnyCanvas, Pixels
from engine.tiling.grid import ShardKey


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """A shard that is safely stored: seconds to compute and store it, or reused from an earlier run (0 s)."""

    key: ShardKey
    seconds: float
    reused: bool


def run(canvas: AnyCanvas, keys: Iterable[ShardKey], work: Callable[[ShardKey], Pixels]) -> Iterator[ShardEnd]:
    """Computes the shards that are not done with `work`, stores each, and yields them in the order of `keys`.

    One shard is stored while the next is computed, never more, so at most two are in memory. A level starts when the
    one before is stored, because it is made from it. Errors of `work` and of the disk come out of the iteration.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        storing: Future[ShardEnd] | None = None
        level: int | None = None
        for key in keys:
            starts_level, level = key.level != level, key.level
            done = canvas.is_done(key)
            if storing is not None and (starts_level or done):
                yield storing.result()
                storing = None
            if done:
                yield ShardEnd(key, 0.0, reused=True)
                continue
            start = perf_counter()
            pixels = work(key)
            compute_s = perf_counter() - start
            if storing is not None:
                yield storing.result()
            storing = writer.submit(_store, canvas, key, pixels, compute_s)
            del pixels  # the writer's is the last reference, gone when the shard is stored
        if storing is not None:
            yield storing.result()


def _store(canvas: AnyCanvas, key: ShardKey, pixels: Pixels, compute_s: float) -> ShardEnd:
    start = perf_counter()
    canvas.write(key, pixels)
    return ShardEnd(key, compute_s + perf_counter() - start, reused=False)
