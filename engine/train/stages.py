"""The curriculum as data: what each stage trains, on what, for how long."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["coarse", "inpainting", "super-resolution", "joint"]

GLOBAL = ("guide.", "local.head.")
LOCAL = (
    "local.null_guide",
    "local.trunk.",
    "local.fusion.",
    "local.edge.",
    "local.frequency.",
    "local.adapt.",
    "local.stages.",
)


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the summed losses; zero leaves one out."""

    pixel: float = 1.0
    """Of the enlarged pictures."""
    hole: float = 1.0
    """Of the fills; an error there of the harmonic fill's size counts 1."""
    edge: float = 0.0
    frequency: float = 0.0


@dataclass(frozen=True, slots=True)
class Draw:
    """One kind of batch and how often it is drawn."""

    probability: float
    batch: int
    side_px: int
    """Guide side (damaged batches) or input side (scale batches), in pixels, a multiple of 8."""
    factor: int = 0
    """Native pixels per guide pixel; 0 draws intact pictures without a guide."""
    levels: int = 0
    """Number of x2 steps supervised."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum. Its weights start from those that the stages before it trained."""

    name: str
    task: Task
    trains: tuple[str, ...]
    """Prefixes of the parameters that this stage changes."""
    budget_share: float
    """Share of the run's wall clock."""
    learning_rate: float
    draws: tuple[Draw, ...]
    losses: LossWeights
    guide_rate_factor: float = 1.0
    """Learning rate of the guide relative to the rest."""
    window_px: int = 96
    """Side of the native window on which the local half is trained (damaged batches)."""
