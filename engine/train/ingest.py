# pyright: reportUnknownMemberType=false
"""Batches made by Ray Data: tasks on all nodes read pictures and draw crops and damage, ahead of the training.

A batch is a pure function of the stage and the number of the step, so where it is made changes nothing, and a run that
goes on has the batches that it would have had.
"""

import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import ray
import torch
from ray.data import DataContext

from engine.train.dataset import MOST_DECODED_BYTES, Batch, Pictures, batch_of
from engine.train.run import Part, Run
from engine.train.stages import Stage

MADE_AHEAD = 8
STREAM_STEPS = 1000
"""Batches of one stream: Ray Data plans all of its tasks before the first runs."""
TASK_CPUS = 0.25
_pictures: dict[tuple[Run, str], Pictures] = {}
"""Of this process: those of one stage, decoded once for many batches."""


def streamed(run: Run, part: Part, stage: Stage, first: int, last: int) -> Iterator[Batch]:
    """The batches of one of the processes that train, in their order."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a batch leaves its task at once
    for start in range(first, last, STREAM_STEPS):
        count = min(STREAM_STEPS, last - start)
        make = partial(_made, run=run, rank=part.rank, world=part.world, stage=stage, first=start)
        rows = ray.data.range(count, override_num_blocks=count)
        for row in rows.map(make, num_cpus=TASK_CPUS, concurrency=MADE_AHEAD).iter_rows():
            yield cast("Batch", pickle.loads(cast("dict[str, bytes]", row)["batch"]))


def _made(row: dict[str, Any], *, run: Run, rank: int, world: int, stage: Stage, first: int) -> dict[str, bytes]:
    """A batch as bytes: it is read once, by the process that trains."""
    torch.set_num_threads(1)
    if (run, stage.name) not in _pictures:
        _pictures.clear()
        _pictures[run, stage.name] = run.pictures(stage, most_bytes=MOST_DECODED_BYTES // MADE_AHEAD)
    pictures, step = _pictures[run, stage.name], first + int(row["id"])
    return {"batch": pickle.dumps(batch_of(pictures, stage, seed=run.recipe.seed, step=step, rank=rank, world=world))}
