"""Jobs that can be killed: a server that forks a child for each order, and the client that tests talk to.

A fork saves the start of an interpreter. The server computes nothing and starts no thread, so forking it is safe; a
child ends as an interpreter does, after its threads.
"""

import json
import os
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

    def run(self, *arguments: Any, failpoint: str | None = None, kill: tuple[str, int, float] | None = None) -> int:
        """One job's exit status, negative for the signal that ended it.

        `kill`: a file, so many lines, and the seconds after these are there at which the job is killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, failpoint, kill]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


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
        arguments, failpoint, kill = json.loads(line)
        child = get_context("fork").Process(target=_run, args=(job, arguments, failpoint))
        child.start()
        if kill is not None:
            path, num_lines, seconds = kill
            while child.is_alive() and _lines(Path(path)) < num_lines:
                time.sleep(0.001)
            time.sleep(seconds)
            child.kill()
        child.join()
        sys.stdout.write(json.dumps(child.exitcode) + "\n")
        sys.stdout.flush()


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _run(job: Callable[..., int], arguments: list[Any], failpoint: str | None) -> None:
    if failpoint is not None:
        os.environ["ENGINE_FAILPOINT"] = failpoint
    sys.exit(job(*arguments))
