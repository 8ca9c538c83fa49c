"""A service as users start it: a process of its own, on loopback, with a small network."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import requests

from tests.networks import TINY, random_checkpoint


@dataclass
class Service:
    """A running `engine serve`."""

    store: Path
    model: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "engine.cli", "serve", "--store", str(self.store), "--port", str(self.port)]
        command += ["--model", str(self.model), *self.options]
        environment = {**os.environ, "RAY_worker_niceness": "0", "TMPDIR": str(self.store.parent)}
        with (self.store.parent / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until = time.monotonic() + 100
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.1)
        raise AssertionError((self.store.parent / "log").read_text()[-4000:])

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def kill(self) -> None:
        """As when the power fails."""
        assert self.process is not None
        for process in self.processes():
            process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> float:
        """Asks it to end; seconds until it has."""
        assert self.process is not None
        started = time.monotonic()
        left = self.processes()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        taken = time.monotonic() - started
        psutil.wait_procs(left, timeout=10)
        self.process = None
        return taken

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        headers = {**self.headers, **more.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=60, **more)

    def submit(self, image: bytes, mask: bytes | None = None, options: str = "{}", **headers: str) -> requests.Response:
        files: dict[str, Any] = {"image": ("scan.png", image), "options": (None, options)}
        if mask is not None:
            files["mask"] = ("mask.png", mask)
        return self.ask("POST", "/v1/restorations", files=files, headers=headers)

    def ended(self, job: dict[str, Any], *, within_s: float = 100) -> dict[str, Any]:
        """The job when it has ended."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            answer = self.ask("GET", job["links"]["self"])
            assert answer.status_code == 200, answer.text
            if answer.json()["state"] in ("done", "failed"):
                return answer.json()
            time.sleep(0.1)
        raise AssertionError(f"not ended: {answer.text}")


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("network"), TINY)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie below it."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="s", dir=shm if shm.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def service(network) -> Iterator[Service]:
    """One for all tests that leave it running."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="s", dir=shm if shm.is_dir() else None))
    running = Service(path / "store", network)
    running.start()
    yield running
    running.stop()
    shutil.rmtree(path, ignore_errors=True)


def picture(h: int = 90, w: int = 130, *, seed: int = 0) -> np.ndarray:
    """(h, w, 3) RGB"""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (h // 6 + 2, w // 6 + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


def hole(h: int = 90, w: int = 130) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    mask[20:40, 30:70] = 255
    return mask
