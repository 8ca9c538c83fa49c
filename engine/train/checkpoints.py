"""Where a training run is, on the disk: safetensors that are there whole or not at all.

    <stage>-<step>-<digest>.state    everything to go on as if nothing had happened: the newest and the one before
    lock                             held by the command that trains
    stop                             asks it to end

A state is known by the digest of its bytes, which is in its name: one that was cut off or changed is never chosen.
"""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.errors import OutputBusy, TrainingError
from engine.store import FileLock, make_folders, remove_partials, storage_errors, write_atomic

STOP = "stop"
_DIGITS = 16
_NAME = re.compile(rf"(.+)-(\d{{8,}})-([0-9a-f]{{{_DIGITS}}})\.state")


@dataclass(slots=True)
class State:
    """Position and memory of one stage."""

    step: int = 0
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    bad: int = 0
    """Of these, the last in a row."""
    seconds: float = 0.0
    """Wall clock spent in this stage, over all its runs."""
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights, averages and the memory of the optimisers."""


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """The folder of a run, for one at a time; what earlier ones had begun to write, or were told, is removed.

    Raises OutputBusy.
    """
    lock = FileLock.try_take(folder / "lock")
    if lock is None:
        raise OutputBusy(f"{folder}: 1 run is at work in it; wait for its end, or choose another --out")
    try:
        remove_partials(folder)
        (folder / STOP).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def save_state(folder: Path, stage: str, state: State, *, of: str) -> Path:
    """Stores a state durably; of the others it keeps the newest of fewer steps. `of` tells runs apart.

    What has more steps was damaged, or this one would have followed it.
    """
    told = {"of": of, "step": state.step, "skipped": state.skipped, "bad": state.bad, "seconds": state.seconds}
    data = save(state.tensors, {"state": json.dumps(told)})
    digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
    path = folder / f"{stage}-{state.step:08d}-{digest}.state"
    make_folders(folder)
    write_atomic(path, data)
    others = [(step, other) for step, other in _states(folder, stage) if other != path]
    kept = max((step for step, _ in others if step < state.step), default=None)
    for step, other in others:
        if step != kept:
            with storage_errors(other):
                other.unlink(missing_ok=True)
    return path


def load_state(folder: Path, stage: str, *, of: str) -> State | None:
    """The newest state that is whole, or None where there are no states.

    Raises TrainingError for one of another run, and where none is whole.
    """
    states = _states(folder, stage)
    for _, path in reversed(states):
        with storage_errors(path):
            data = path.read_bytes()
        if not path.stem.endswith(f"-{hashlib.sha256(data).hexdigest()[:_DIGITS]}"):
            continue
        told = _told(data)
        if told is None:
            continue
        if told.pop("of") != of:
            raise TrainingError(
                f"{path}: is of another recipe, network, number of steps or other models (--start-from, --teacher); "
                "give each run 1 folder (--out) of its own"
            )
        return State(**told, tensors=load(data))
    if states:
        raise TrainingError(
            f"{states[-1][1]}: 0 of {len(states)} states of this stage are whole; remove them to train it again"
        )
    return None


def _told(data: bytes) -> dict[str, Any] | None:
    """What a state says of itself; None where it is no safetensors file of ours."""
    try:
        length = int.from_bytes(data[:8], "little")
        return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    except (ValueError, KeyError, SafetensorError):
        return None


def _states(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """From the oldest to the newest."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.state"))
    return sorted((int(named[2]), path) for named, path in found if named is not None and named[1] == stage)
