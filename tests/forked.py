"""Jobs that can be killed: a server that forks a child for each order, and the client that tests talk to.

A fork saves the start of an interpreter. The server computes nothing and starts no thread, so forking it is safe; a
child ends as an interpreter does, after its threads.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


class JobServer:
    """The client's end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, *arguments: Any, failpoint: str | None = None, kill_after_s: float | None = None
    ) -> tuple[int, float]:
        """One job's exit status, negative for the signal that ended it, and its seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, failpoint, kill_after_s]) + "\n")
        self._process.stdin.flush()
        status, seconds = json.loads(self._process.stdout.readline())
        return status, seconds


@contextmanager
def job_server(script: Path) -> Generator[JobServer]:
    """Starts a script that calls `serve`."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield JobServer(process)
        process.communicate()


def serve(job: Callable[..., int]) -> None:
    """Runs `job(*arguments)`, which returns its exit status, in a fork for each line of standard input."""
    for line in sys.stdin:
        arguments, failpoint, kill_after_s = json.loads(line)
        started = time.monotonic()
        child = get_context("fork").Process(target=_run, args=(job, arguments, failpoint))
        child.start()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        sys.stdout.write(json.dumps([child.exitcode, time.monotonic() - started]) + "\n")
        sys.stdout.flush()


def _run(job: Callable[..., int], arguments: list[Any], failpoint: str | None) -> None:
    if failpoint is not None:
        os.environ["ENGINE_FAILPOINT"] = failpoint
    sys.exit(job(*arguments))
