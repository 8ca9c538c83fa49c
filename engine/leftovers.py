"""What runs that were killed or given up left in a folder of outputs, and its removal."""

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine import generated_map
from engine.errors import UnreadableInput
from engine.outputs import BATCH, output_folders, runs_batch
from engine.receipt import read_receipt, receipt_copy, receipt_path, unfinished_exports
from engine.store import FileLock, is_locked, storage_errors
from engine.tiling.canvas import stored_plan
from engine.tiling.plan import working_folder

QUIET_S = 3600
"""A half-written file that changed within this time may still have a writer: an export alone holds no lock."""

_RANDOM = r"\.[0-9a-f]{32}"
_WORKING = re.compile(r"(?P<name>.+)\.(?P<plan>[0-9a-f]{16})\.inprogress\.zarr")
_PARTIAL = re.compile(rf"(?P<target>.+?)(?:{_RANDOM}\.partial)+")
_REPLACED = re.compile(rf"(?P<target>.+){_RANDOM}\.replaced")
_OF_A_CANVAS = re.compile(r"zarr\.json|_engine|\d+|.+\.partial")


class Sort(StrEnum):
    """What a leftover is."""

    IN_PROGRESS = "in progress"
    """Unfinished work: the same command would go on with it."""
    PARTIAL = "partial"
    REPLACED = "replaced"
    SCRATCH = "scratch"
    EXPORT = "unfinished export"
    """A file with its final name that no receipt names yet."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or folder that nobody uses, and the bytes of disk that its removal frees."""

    path: Path
    sort: Sort
    num_bytes: int


def stale(out: Path) -> list[Leftover]:
    """What lies in the folder of outputs `out`, or below it, and may go, exports first; nothing is changed.

    Left out: all of a batch that is at work, what another process holds the lock of, what does not look like our own
    work inside and out, and all of a picture whose old output was renamed aside but whose new one has no name yet:
    there the next run finishes the swap. So is a canvas that `verify` took back for its repair.
    """
    if not out.is_dir():
        raise UnreadableInput(f"{out}: is no folder; give what `restore` wrote to --out")
    with storage_errors(out):
        folders = list(output_folders(out))
        # Exports come first, for they are known by what lies in the others.
        exports = [Leftover(path, Sort.EXPORT, _disk_bytes(path)) for folder in folders for path in _unfinished(folder)]
        found = (_leftover(child) for folder in folders for child in sorted(_children(folder)))
        return [*exports, *(leftover for leftover in found if leftover is not None)]


def clean(leftovers: Iterable[Leftover]) -> Iterator[Leftover]:
    """Removes what `stale` found, each looked at once more, and yields what was removed."""
    for leftover in leftovers:
        with storage_errors(leftover.path):
            path = leftover.path
            is_one = path in _unfinished(path.parent) if leftover.sort is Sort.EXPORT else _leftover(path) is not None
            if is_one and _remove(leftover):
                yield leftover


def _children(folder: Path) -> Iterator[Path]:
    """What may be a leftover: all in a folder of outputs, and what a kill leaves inside canvases and of a batch."""
    yield from folder.iterdir()
    yield from folder.glob("*.zarr/_engine/*")
    yield from folder.glob(f"{BATCH}/**/*.partial")


def _unfinished(out: Path) -> list[Path]:
    """Exports of runs that were cut short before their receipt: only their canvas knows whose they are."""
    if runs_batch(out / "any"):
        return []
    canvases = [scratch.parents[1] for scratch in sorted(out.glob("*.zarr/_engine/scratch"))]
    idle = [canvas for canvas in canvases if stored_plan(canvas) and not is_locked(canvas / "_engine" / "lock")]
    return [path for canvas in idle for path in unfinished_exports(canvas, _picture(canvas))]


def _leftover(path: Path) -> Leftover | None:
    sort = None if path.is_symlink() else _sort(path)
    return None if sort is None or runs_batch(path) else Leftover(path, sort, _disk_bytes(path))


def _sort(path: Path) -> Sort | None:
    """What kind of leftover a path is; None for everything that is to stay."""
    if path.parent.name == "_engine":
        return _sort_inside(path)
    sort = None
    if named := _WORKING.fullmatch(path.name):
        sort = Sort.IN_PROGRESS if _is_working_canvas(path, named["plan"]) and not _waits(path) else None
    elif _PARTIAL.fullmatch(path.name):
        sort = Sort.PARTIAL if _is_quiet(path) else None
    elif _REPLACED.fullmatch(path.name):
        sort = Sort.REPLACED if path.is_file() or _is_like_canvas(path) else None
    return None if sort is None or _in_swap(path) or _in_use(path) else sort


def _sort_inside(path: Path) -> Sort | None:
    """What a kill between two steps may leave inside a published canvas; one in progress goes, or stays, as a whole."""
    canvas = path.parent.parent
    if _WORKING.fullmatch(canvas.name) or stored_plan(canvas) is None or is_locked(path.parent / "lock"):
        return None
    if path.name == "scratch" and path.is_dir():
        return Sort.SCRATCH
    return Sort.PARTIAL if _PARTIAL.fullmatch(path.name) and _is_quiet(path) else None


def _picture(path: Path) -> str:
    """The name of the picture that a path in a folder of outputs belongs to, without the suffix of a format."""
    if named := _WORKING.fullmatch(path.name):
        return named["name"]
    named = _PARTIAL.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return Path(path.name if named is None else named["target"]).stem.removesuffix(Path(generated_map.SUFFIX).stem)


def _in_use(path: Path) -> bool:
    """Whether a process is at work on the picture that a path belongs to."""
    name = _picture(path)
    working = [child for child in path.parent.iterdir() if (m := _WORKING.fullmatch(child.name)) and m["name"] == name]
    return any(is_locked(canvas / "_engine" / "lock") for canvas in (*working, path.with_name(f"{name}.zarr")))


def _in_swap(path: Path) -> bool:
    """Whether an output of the picture was renamed aside and none has its name since: nothing of it may go."""
    name = _picture(path)
    for child in path.parent.iterdir():
        named = _REPLACED.fullmatch(child.name)
        if named and _picture(child) == name and not os.path.lexists(path.with_name(named["target"])):
            return True
    return False


def _is_working_canvas(folder: Path, plan_id: str) -> bool:
    """Whether a folder with the name of our work in progress holds that, or what a removal left of it, and no more."""
    plan = stored_plan(folder)
    return _is_like_canvas(folder) and (plan is None or plan.plan_id.startswith(plan_id))


def _is_like_canvas(folder: Path) -> bool:
    return folder.is_dir() and all(_OF_A_CANVAS.fullmatch(child.name) for child in folder.iterdir())


def _waits(folder: Path) -> bool:
    """Whether a canvas is an output already, which only has to be published: one that `verify` took back, say."""
    receipt = read_receipt(receipt_copy(folder)) or read_receipt(receipt_path(folder.parent, _picture(folder)))
    return (
        receipt is not None
        and "ome-zarr" in receipt["outputs"]
        and working_folder(folder.parent, _picture(folder), receipt["plan_id"]) == folder
        and not (folder.parent / receipt["outputs"]["ome-zarr"]["name"]).exists()
    )


def _is_quiet(path: Path) -> bool:
    newest = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
    return time.time() - newest > QUIET_S


def _remove(leftover: Leftover) -> bool:
    if leftover.sort is not Sort.IN_PROGRESS:
        _delete(leftover.path)
        return True
    lock = FileLock.try_take(leftover.path / "_engine" / "lock")
    if lock is None:  # taken since
        return False
    try:
        (leftover.path / "_engine" / "plan.json").unlink(missing_ok=True)  # half a removal is a lay-out to make again
        shutil.rmtree(leftover.path)
    finally:
        lock.release()
    return True


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _disk_bytes(path: Path) -> int:
    """Bytes of disk that a file, or all files below a folder, occupy."""
    files = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    return sum(os.lstat(file).st_blocks * 512 for file in (files if path.is_dir() else (path,)))
