"""`engine restore` with small shards, to be killed."""

import os
import sys
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter  # noqa: F401  typer loads it late

import engine.guide
import engine.planning
from engine import isolate
from engine.cli import app
from engine.console import Console  # noqa: F401  loaded here, once
from engine.restoration import _Work
from engine.tiling.grid import Grid, ShardKey
from tests.forked import serve


def small() -> None:
    """Shards of 64 px, and a guide that is smaller than the picture."""
    engine.planning.Grid = partial(Grid, chunk_px=32, shard_px=64)  # type: ignore[misc]
    engine.guide.GUIDE_PX = 32


def note_computed(notes: Path) -> None:
    """Write down each shard that is computed, before it is."""
    true = _Work.__call__

    def noted(self: _Work, key: ShardKey):
        with notes.open("a") as file:
            file.write(f"{key.name}\n")
        return true(self, key)

    _Work.__call__ = noted


def job(arguments: list[str], notes: str) -> int:
    """The command's exit code. Each computed shard is noted in the file `notes`."""
    note_computed(Path(notes))
    os.cpu_count = lambda: 1
    sys.stdout = sys.stderr = open(f"{notes}.log", "a")  # noqa: SIM115
    try:
        app(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    small()
    isolate.in_child(os.getpid, subject=Path(__file__))  # forks share its server
    serve(job)
