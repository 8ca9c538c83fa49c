"""The immutable description of the work on one picture, and whether it can be done here at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.errors import NotEnoughDisk, NotEnoughMemory
from engine.geometry import Size
from engine.store import free_bytes, nearest_folder, storage_errors
from engine.tiling.grid import Grid

DISK_RESERVE_BYTES = 64 << 20
MAX_SIDE_PX = 1 << 20
MAX_SHARDS = 1 << 20
"""Of all levels of an output; with shards of 2048 px, the largest one has a third of them."""

_LAYOUT_VERSION = 1  # raised when the same pixels would be stored as other bytes
_NAME_BYTES = 255  # what the usual file systems hold
_INTEGERS = ("channels", "chunk_px", "shard_px", "projected_ram_bytes", "projected_disk_bytes")
_TEXTS = ("name", "dtype", "input_sha256", "mask_sha256", "model", "model_sha256")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the pixels of one output, and what they are expected to cost.

    `size` is in output pixels. `mask_sha256` is "none" where no mask was given. `parameters` holds every number and
    word that changes a pixel (scale, box, precision, tile, batch, threads, versions). `name` is the stem of the output
    and, like the projections, no part of `plan_id`.
    """

    name: str
    size: Size
    channels: int
    dtype: str
    grid: Grid
    input_sha256: str
    mask_sha256: str
    model: str
    model_sha256: str
    parameters: Mapping[str, int | float | str]
    projected_ram_bytes: int
    projected_disk_bytes: int

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "uint16"):
            raise ValueError(f"an output holds uint8 or uint16, not {self.dtype}")
        if self.grid.size != self.size:
            raise ValueError(f"a grid of {self.grid.size} does not divide an output of {self.size}")
        if not 1 <= self.channels <= 4:
            raise ValueError(f"an output has 1 to 4 channels, not {self.channels}")
        if self.size.long_side > MAX_SIDE_PX or self.grid.num_shards > MAX_SHARDS:
            raise ValueError(f"an output of {self.size} is too large to be stored in shards of {self.grid.shard_px} px")
        unusable = self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name
        if unusable or len(os.fsencode(self.name)) > _NAME_BYTES:
            raise ValueError(f"{self.name!r} cannot be the name of an output")

    @property
    def plan_id(self) -> str:
        """sha256 in hexadecimal of what changes a stored byte: the same id, the same output."""
        identity = self.to_json()
        for field in ("name", "projected_ram_bytes", "projected_disk_bytes"):
            del identity[field]
        identity["layout_version"] = _LAYOUT_VERSION
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def working_folder(self, out: Path) -> Path:
        """Where the output grows inside `out` until it is published."""
        return working_folder(out, self.name, self.plan_id)

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`; `from_json` reads them back."""
        return {
            "name": self.name,
            "size_px": [self.size.h, self.size.w],
            "channels": self.channels,
            "dtype": self.dtype,
            "chunk_px": self.grid.chunk_px,
            "shard_px": self.grid.shard_px,
            "input_sha256": self.input_sha256,
            "mask_sha256": self.mask_sha256,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "parameters": dict(self.parameters),
            "projected_ram_bytes": self.projected_ram_bytes,
            "projected_disk_bytes": self.projected_disk_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Plan":
        """The plan that `to_json` wrote; KeyError, TypeError or ValueError where `data` is something else."""
        fields = cast("dict[str, Any]", dict(data))
        for values, types in (
            ([*fields["size_px"], *(fields[name] for name in _INTEGERS)], {int}),
            ([fields[name] for name in _TEXTS], {str}),
            ([*dict(fields["parameters"]).values()], {int, float, str}),
        ):
            if not {type(value) for value in values} <= types:
                raise TypeError(f"{values} are not all of {types}")
        size = Size(*fields.pop("size_px"))
        grid = Grid(size, fields.pop("chunk_px"), fields.pop("shard_px"))
        return cls(size=size, grid=grid, **fields)


def working_folder(out: Path, name: str, plan_id: str) -> Path:
    """Where the output called `name` of the plan with this id grows inside `out` until it is published."""
    return out / f"{name}.{plan_id[:16]}.inprogress.zarr"


def canvas_bytes(grid: Grid, channels: int, dtype: str) -> int:
    """Bytes of all levels before compression."""
    return sum(size.num_pixels for size in grid.level_sizes) * channels * np.dtype(dtype).itemsize


def validate(plan: Plan, *, out: Path, max_memory_bytes: int | None) -> None:
    """Refuses a plan that cannot finish, before anything is written.

    `max_memory_bytes` None sets no limit on memory. What an earlier run of the same plan has stored already needs no
    space again. Raises NotEnoughMemory, NotEnoughDisk (`DISK_RESERVE_BYTES` must stay free) or StorageReadOnly.
    """
    check_memory(plan, max_memory_bytes)
    _check_writable(out)
    needed = plan.projected_disk_bytes + DISK_RESERVE_BYTES - _stored_bytes(plan.working_folder(out))
    free = free_bytes(out)
    if needed > free:
        raise NotEnoughDisk(
            f"{plan.name}: needs {needed:,} bytes of disk at {out}, {free:,} are free; "
            "free some space, choose another --out, or lower the scale"
        )


def check_memory(plan: Plan, max_memory_bytes: int | None) -> None:
    """Raises NotEnoughMemory; None sets no limit."""
    if max_memory_bytes is not None and plan.projected_ram_bytes > max_memory_bytes:
        raise NotEnoughMemory(
            f"{plan.name}: needs {plan.projected_ram_bytes:,} bytes of memory, {max_memory_bytes:,} are allowed; "
            "raise --max-memory, or lower the scale or the size of the tiles"
        )


def _check_writable(out: Path) -> None:
    """Permission bits do not tell (root, read-only mounts, quotas): an unnamed file does, and leaves no trace."""
    folder = nearest_folder(out)
    with storage_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def _stored_bytes(folder: Path) -> int:
    """Bytes of disk that the files below a folder occupy; 0 where there is none."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_blocks * 512 for path in paths)
