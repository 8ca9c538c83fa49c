"""`engine restore` with small shards, to be killed: a server that runs it once per line of standard input, in a fork.

A line is a JSON object: `arguments` of the command, `notes` (the file that each computed shard is noted in),
`failpoint` and `kill_after_s` (null for none). The answer is the exit status, negative for a signal, and the seconds
that it took. The fork saves the start of an interpreter; this process itself computes nothing.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import engine.guide
import engine.planning
from engine.cli import app
from engine.console import Console  # noqa: F401  loaded here, once
from engine.restoration import _Work
from engine.tiling.grid import Grid, ShardKey


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


def child(order: dict) -> int:
    """The command's exit code."""
    note_computed(Path(order["notes"]))
    if order["failpoint"] is not None:
        os.environ["ENGINE_FAILPOINT"] = order["failpoint"]
    os.cpu_count = lambda: 1
    sys.stdout = sys.stderr = open(order["notes"] + ".log", "a")  # noqa: SIM115
    try:
        app(order["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def fork_job(order: dict) -> tuple[int, float]:
    """Exit status and seconds."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = child(order)
        finally:
            os._exit(status)
    if order["kill_after_s"] is not None:
        time.sleep(order["kill_after_s"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - started


def main() -> None:
    small()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork_job(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
