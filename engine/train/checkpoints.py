"""Where a training run is, on the disk: safetensors that are there whole or not at all.

    <stage>-<step>-<digest>.state    everything to go on as if nothing had happened: the two newest are kept
    <stage>.safetensors              the averaged weights so far, float16
    lock                             held by the command that trains

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

KEPT = 2
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
    """The folder of a run, for one at a time; what killed ones had begun to write is removed. Raises OutputBusy."""
    lock = FileLock.try_take(folder / "lock")
    if lock is None:
        raise OutputBusy(f"{folder}: 1 run is at work in it; wait for its end, or choose another --out")
    try:
        remove_partials(folder)
        yield
    finally:
        lock.release()


def save_state(folder: Path, stage: str, state: State, *, of: str) -> Path:
    """Stores a state durably and removes older ones. `of` tells runs apart that must not be mixed."""
    told = {"of": of, "step": state.step, "skipped": state.skipped, "bad": state.bad, "seconds": state.seconds}
    data = save(state.tensors, {"state": json.dumps(told)})
    digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
    path = folder / f"{stage}-{state.step:08d}-{digest}.state"
    make_folders(folder)
    write_atomic(path, data)
    for _, old in _states(folder, stage)[:-KEPT]:
        with storage_errors(old):
            old.unlink(missing_ok=True)
    return path


def load_state(folder: Path, stage: str, *, of: str) -> State | None:
    """The newest state that is whole, or None. Raises TrainingError for one of another run."""
    for _, path in reversed(_states(folder, stage)):
        with storage_errors(path):
            data = path.read_bytes()
        if not path.stem.endswith(f"-{hashlib.sha256(data).hexdigest()[:_DIGITS]}"):
            continue
        told = _told(data)
        if told is None:
            continue
        if told.pop("of") != of:
            raise TrainingError(
                f"{path}: is of another recipe, network or number of steps; give each run 1 folder (--out) of its own"
            )
        return State(**told, tensors=load(data))
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


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Averaged weights, float16."""
    make_folders(path.parent)
    write_atomic(path, save({name: value.half().cpu().contiguous() for name, value in weights.items()}))
