"""What the measurements of batches share. Does nothing by itself.

Pictures from seeds; a running `engine restore` that can be ended with all its processes; digests of what it left; the
file of figures.
"""

import atexit
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import psutil

from engine.geometry import Size
from engine.outputs import BATCH
from engine.receipt import read_receipt
from engine.store import digest_of
from engine.tiling.seal import seal
from engine.train.damage import LIGHT, damage_mask

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
TILE_ACTOR = "MapWorker(MapBatches(TileActor))"
ENDING_S = 30.0
_GRAIN = 8

Processes = Callable[[], list[psutil.Process]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to make: where below a folder, how large, and whether parts of it are missing."""

    name: str
    """With its suffix: `.png`, `.jpg` or `.tif`, and sub-folders where it has slashes."""
    size: Size
    masked: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), its seconds, what it told of each picture."""

    exit_code: int
    seconds: float
    told: list[dict[str, Any]]
    said: str
    """Its standard error."""

    def checked(self, *, exit_code: int = 0) -> "Ended":
        if self.exit_code != exit_code:
            reasons = [f"{one['input']}: {one['reason']}" for one in self.told if one["reason"] is not None]
            raise SystemExit(f"exit {self.exit_code} instead of {exit_code}: {self.said[-4000:]}\n{reasons}")
        return self


def make_pictures(folder: Path, pictures: Iterable[Picture], *, seed: int, masks: Path | None = None) -> int:
    """Writes the pictures, the same bytes for the same seed; how many there are.

    With a folder for masks, each picture gets one, empty where nothing is missing: a batch takes masks for all or none.
    """
    count = 0
    for number, picture in enumerate(pictures):
        path = folder / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        one = 100_003 * seed + number
        options = [cv2.IMWRITE_PNG_COMPRESSION, 1] if path.suffix == ".png" else []
        cv2.imwrite(str(path), pixels(picture.size, seed=one), options)
        if masks is not None:
            mask = np.zeros((picture.size.h, picture.size.w), np.uint8)
            if picture.masked:
                mask[damage_mask(picture.size, seed=one, share=LIGHT)] = 255
            beside = (masks / picture.name).with_suffix(".mask.png")
            beside.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(beside), mask)
        count += 1
    return count


def pixels(size: Size, *, seed: int) -> np.ndarray:
    """(h, w, 3) uint8: soft blobs with grain, so that neither the network nor the codecs see a flat picture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (size.h // 32 + 2, size.w // 32 + 2, 3), dtype=np.uint8)
    blobs = cv2.resize(coarse, (size.w, size.h), interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(0, 2 * _GRAIN, (size.h, size.w, 3), dtype=np.uint8)
    return cv2.subtract(cv2.add(blobs, grain), np.full_like(grain, _GRAIN))


@contextmanager
def workspace() -> Generator[Path]:
    """A temporary folder ($TMPDIR says where), removed at the end, and also when this process is asked to end."""
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory(prefix="engine-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


class Command:
    """A command of the engine that runs in a session of its own, with all the processes that it starts."""

    def __init__(self, arguments: Sequence[str | Path], *, environment: Mapping[str, str] | None = None) -> None:
        """`arguments` as behind `engine`; the environment is added to this process's own."""
        self._files = tempfile.TemporaryDirectory(prefix="engine-command-", ignore_cleanup_errors=True)
        self._out, self._err = (Path(self._files.name) / name for name in ("stdout", "stderr"))
        told = {"PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0", "TMPDIR": self._files.name}
        self.started = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.cli", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **told, **(environment or {})},
                start_new_session=True,
            )
        atexit.register(self._end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def told(self) -> list[dict[str, Any]]:
        """What `--json` has told so far, one object per picture."""
        text = self._out.read_text(errors="replace")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]

    def processes(self) -> list[psutil.Process]:
        """The command and all that it has started, whoever their parents are now."""
        found = {process.pid: process for process in psutil.process_iter() if _session(process.pid) == self.pid}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                found.setdefault(process.pid, process)
        return list(found.values())

    def tile_actors(self) -> list[psutil.Process]:
        """The processes that restore or draw now, of both lanes."""
        return [process for process in self.processes() if TILE_ACTOR in command_line(process)]

    def wait(self, *, timeout_s: float | None = None) -> Ended:
        """Waits for the end, and ends what the command left running."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit(f"not ended after {timeout_s:g} s: {self._err.read_text()[-4000:]}") from None
        except BaseException:
            self.kill()
            raise
        return self._ended(code)

    def kill(self) -> Ended:
        """`kill -9` of the command and all its processes, as when the power fails."""
        self._end()
        return self._ended(self._process.wait())

    def _end(self) -> None:
        end_all(self.processes)

    def _ended(self, code: int) -> Ended:
        seconds = time.monotonic() - self.started
        until = time.monotonic() + ENDING_S
        while self.processes() and time.monotonic() < until and code >= 0:
            time.sleep(0.05)  # Ray's last processes see that the driver is gone
        self._end()
        atexit.unregister(self._end)
        return Ended(code, seconds, self.told(), self._err.read_text(errors="replace"))


def restore_arguments(
    source: Path,
    out: Path | str,
    *,
    workers: int,
    scale: int,
    masks: Path | None = None,
    formats: Sequence[str] = ("ome-zarr",),
) -> list[str]:
    """The command line of a batch that tells of each picture on its standard output."""
    found = ["restore", str(source), "--out", str(out), "--scale", str(scale), "--model", "lite"]
    found += ["--workers", str(workers), "--json"]
    if masks is not None:
        found += ["--mask", str(masks)]
    for name in formats:
        found += ["--format", name]
    return found


def command_line(process: psutil.Process) -> str:
    """What a process is called; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def end_all(processes: Processes) -> None:
    """Kills until none is left: one may start another while it is looked for."""
    while found := processes():
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def _session(pid: int) -> int:
    """The session of a process; 0 where it has ended, or waits for its parent to see that it has."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, _, _, session, *_ = text[text.rindex(")") + 2 :].split()
    return 0 if state == "Z" else int(session)


def digests(out: Path) -> dict[str, str]:
    """The sha256 of every stored file below a folder, by its path; of receipts without when they were finished.

    The batch's own folder is left out (see `batch_files`), and so are locks, which are empty and may stay.
    """
    found: dict[str, str] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and path.name != "lock" and name.split("/")[0] != BATCH:
            receipt = read_receipt(path) if path.suffix == ".json" else None
            if receipt is None:
                found[name] = digest_of(path).sha256
            else:
                del receipt["finished"]
                found[name] = hashlib.sha256(seal(receipt)).hexdigest()
    return found


def batch_files(out: Path) -> list[str]:
    """The paths below the batch's own folder."""
    return sorted(path.relative_to(out).as_posix() for path in (out / BATCH).rglob("*") if path.is_file())


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """The files that only one run left, or that differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def spread(values: Sequence[float], *, digits: int = 3) -> dict[str, Any]:
    """A median and the values that it is of."""
    return {"median": round(median(values), digits), "each": [round(value, digits) for value in values]}


def record(key: str, figures: Mapping[str, Any], *, into: str = "batch") -> None:
    """Stores the figures under a key of a file, with the command that made them and on what."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{into}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stored[key] = {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpus": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **figures,
    }
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
