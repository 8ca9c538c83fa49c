"""Sizes of the damage detector, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """Widths of a detector, from the grid of 2 px to that of 16 px, and its decision."""

    channels: tuple[int, ...] = (24, 40, 64, 80)
    threshold: float = 0.5
    """Of the probability from which a pixel counts as missing."""
