"""What the measurements of the endpoint share: a service as users start it, and what they send. Does nothing itself."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import requests
from _batch_setup import REPOSITORY, command_line, pixels

from engine.geometry import Size

MIB = 1 << 20
STARTING_S = 120.0
SIDE_PX, SCALE = 160, 2
"""Of the pictures that loads are made of."""


@dataclass(slots=True)
class Endpoint:
    """A running `engine serve`."""

    store: Path
    options: tuple[str, ...]
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def front(self) -> psutil.Process:
        """The process that answers HTTP."""
        return psutil.Process(self.process.pid)

    def processes(self) -> list[psutil.Process]:
        return [self.front, *self.front.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        """The processes that restore."""
        return [one for one in self.processes() if "ServeReplica:engine:Replica" in command_line(one)]

    def wait_ready(self) -> float:
        """Seconds until it would do new work."""
        started = time.monotonic()
        while time.monotonic() - started < STARTING_S:
            try:
                if requests.get(f"{self.url}/readyz", timeout=5).ok:
                    return time.monotonic() - started
            except requests.ConnectionError:
                pass
            time.sleep(0.1)
        raise SystemExit(f"the service is not ready after {STARTING_S:g} s")

    def kill(self) -> None:
        """As when the power fails."""
        for process in self.processes():
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        left = self.processes()
        self.process.terminate()
        self.process.wait(120)
        psutil.wait_procs(left, timeout=20)

    def restart(self) -> None:
        self.process = _start(self.store, self.options, self.port)

    def ended(self, job: dict[str, Any], *, every_s: float = 0.1) -> dict[str, Any]:
        """The job when it has ended, well or not."""
        while job["state"] not in ("done", "failed"):
            time.sleep(every_s)
            job = requests.get(self.url + job["links"]["self"], timeout=60).json()
        return job


@contextmanager
def endpoint(*options: str) -> Generator[Endpoint]:
    """A service with a store of its own, ready; it is ended and its store removed."""
    home = Path(tempfile.mkdtemp(prefix="s"))
    port = free_port()
    running = Endpoint(home / "store", options, port, _start(home / "store", options, port))
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(store: Path, options: tuple[str, ...], port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "engine.cli", "serve", "--store", str(store), "--port", str(port), *options]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def form(seed: int, side: int, *, scale: int = 1, masked: bool = True) -> dict[str, Any]:
    """The files of a request for a picture of its own, `requests`' way."""
    image = cv2.imencode(".png", pixels(Size(side, side), seed=seed))[1].tobytes()
    files: dict[str, Any] = {"image": ("scan.png", image), "options": (None, json.dumps({"scale": scale}))}
    if masked:
        mask = np.zeros((side, side), np.uint8)
        cv2.line(mask, (side // 8, side // 8), (side // 2, side // 3), 255, max(2, side // 40))
        files["mask"] = ("mask.png", cv2.imencode(".png", mask)[1].tobytes())
    return files


def body(files: dict[str, Any]) -> tuple[bytes, str]:
    """The same as bytes, and their content type."""
    made = requests.Request("POST", "http://here/", files=files).prepare()
    assert isinstance(made.body, bytes)
    return made.body, made.headers["Content-Type"]


def post(service: Endpoint, seed: int, *, side: int = SIDE_PX, scale: int = SCALE) -> dict[str, Any] | None:
    """A job, or None where it was not accepted."""
    try:
        answer = requests.post(f"{service.url}/v1/restorations", files=form(seed, side, scale=scale), timeout=60)
    except requests.RequestException:
        return None
    return answer.json() if answer.status_code in (200, 202) else None


def capacity(service: Endpoint, *, count: int = 40) -> float:
    """Pictures a second with a full queue."""
    jobs = [job for seed in range(count) if (job := post(service, 10_000_000 + seed))]
    for job in jobs[: count // 4]:
        service.ended(job)
    started = time.monotonic()
    for job in jobs[count // 4 :]:
        service.ended(job)
    return (count - count // 4) / (time.monotonic() - started)
