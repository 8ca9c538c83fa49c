"""What is wrong with the stored files of one canvas, file by file."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine.errors import StorageError
from engine.objects import Place
from engine.store import digest_of, open_regular
from engine.tiling.canvas import damaged_metadata, ledger_folder, stored_plan
from engine.tiling.grid import ShardKey
from engine.tiling.layout import object_key
from engine.tiling.ledger import Ledger, Record
from engine.tiling.plan import Plan

Progress = Callable[[Place, int], None]
"""Told each file that was read, and its length in bytes."""


class Kind(StrEnum):
    """How a file is not as it was stored."""

    CHANGED = "changed"
    TRUNCATED = "truncated"
    MISSING = "missing"
    SWAPPED = "swapped"
    """A shard, a canvas or a receipt in the place of another one."""
    UNREADABLE = "unreadable"
    RECORD = "record damaged"
    METADATA = "metadata damaged"
    OUTDATED = "outdated"
    """A receipt, or the copy of it, that does not tell of the last run."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad file. `key` is given for shards and records."""

    path: Place
    name: str
    """For people: ``shard 0/3.5``, ``record 0/3.5``, ``plan``, ``metadata 0/zarr.json``, ``receipt``, ``png`` ..."""
    kind: Kind
    key: ShardKey | None = None


def canvas_problems(root: Path, *, plan: Plan | None, plan_id: str, progress: Progress) -> Iterator[Problem]:
    """Reads every file of the canvas in `root` that was published under `plan_id`, or is in progress.

    Without `plan` the grid is not known, so only shards that have a record are looked for. In a canvas in progress a
    shard without a record is work to do, not damage.
    """
    if stored_plan(root) is None:
        yield missing_or(Kind.METADATA, root / "_engine" / "plan.json", "plan")
    else:
        for path in damaged_metadata(root):
            yield missing_or(Kind.METADATA, path, f"metadata {path.relative_to(root)}")
    ledger = Ledger(ledger_folder(root), plan_id=plan_id)
    bad: list[tuple[Record, Path]] = []
    for key in sorted(ledger.keys()) if plan is None or is_working(root) else plan.grid.all_keys():
        path = root / object_key(key.level, key.iy, key.ix)
        record = _peek(ledger, key)
        if record is None:
            record_path = ledger_folder(root) / f"{key.name}.json"
            kind = Kind.RECORD if record_path.exists() else Kind.MISSING
            yield Problem(record_path, f"record {key.name}", kind, key)
        elif not is_as_recorded(path, record, progress):
            bad.append((record, path))
    for record, path in bad:
        yield Problem(path, f"shard {record.key.name}", _shard_kind(path, record, bad), record.key)


def is_working(root: Path) -> bool:
    """Whether a folder's name is that of an output in progress."""
    return root.name.endswith(".inprogress.zarr")


def is_as_recorded(path: Path, record: Record, progress: Progress) -> bool:
    """Whether a shard's object has the recorded length and digest."""
    try:
        if path.stat().st_size != record.num_bytes:
            return False
        digest = digest_of(path)
    except (OSError, StorageError):
        return False
    progress(path, digest.num_bytes)
    return digest.sha256 == record.sha256


def file_kind(path: Path, *, num_bytes: int) -> Kind:
    """How a file that is not as recorded differs from what it was, `num_bytes` long."""
    try:
        found = path.stat().st_size
        if path.is_dir():
            return Kind.CHANGED
        with open_regular(path) as stream:
            while stream.read(1 << 20):
                pass
    except (FileNotFoundError, NotADirectoryError):
        return Kind.MISSING
    except OSError:
        return Kind.UNREADABLE
    return Kind.TRUNCATED if found < num_bytes else Kind.CHANGED


def missing_or(kind: Kind, path: Path, name: str) -> Problem:
    """The problem of a file that is either gone or bad in the given way."""
    return Problem(path, name, kind if os.path.lexists(path) else Kind.MISSING)


def _shard_kind(path: Path, record: Record, bad: list[tuple[Record, Path]]) -> Kind:
    kind = file_kind(path, num_bytes=record.num_bytes)
    if kind in (Kind.MISSING, Kind.UNREADABLE):
        return kind
    # Two shards that changed places are both bad: the bytes here are those that another bad one should hold.
    found = digest_of(path).sha256
    return Kind.SWAPPED if any(other.sha256 == found for other, _ in bad) else kind


def _peek(ledger: Ledger, key: ShardKey) -> Record | None:
    try:
        return ledger.peek(key)
    except StorageError:
        return None
