"""State of a training run on disk: complete enough to go on as if nothing had happened.

Weights that others may load are safetensors (see `models.checkpoint`); this file is for the run that wrote it alone.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(slots=True)
class RunState:
    """Position and memory of one stage."""

    step: int = 0
    seconds: float = 0.0
    """Wall clock spent in this stage, over all its runs."""
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ema: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimiser: dict[str, object] = field(default_factory=dict[str, object])


def save_state(path: Path, state: RunState) -> None:
    """Replace the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    fields = ("step", "seconds", "skipped", "weights", "ema", "optimiser")
    with partial.open("wb") as file:
        torch.save({name: getattr(state, name) for name in fields}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path) -> RunState | None:
    """The state at `path`, or None where there is none. Loads tensors and plain values only."""
    if not path.exists():
        return None
    return RunState(**torch.load(path, map_location="cpu", weights_only=True))
