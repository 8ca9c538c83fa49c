"""A folder of outputs: which folders below it hold pictures, and whether a batch is at work in it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import StorageError
from engine.store import is_locked, storage_errors

BATCH = "_batch"
"""The batch's own folder in its folder of outputs: its lock, its catalog, its attempts."""

_OURS = re.compile(r"_engine|_batch|.+\.[0-9a-f]{16}\.inprogress\.zarr|.+\.[0-9a-f]{32}\.(partial|replaced)")


def batch_lock(out: Path) -> Path:
    """The lock that the driver of a batch holds while it runs."""
    return out / BATCH / "lock"


def output_folders(out: Path) -> Iterator[Path]:
    """`out` and, in the order of their names, the folders below it that may hold pictures: the input's are mirrored.

    No canvas, IIIF folder, unfinished work or link is gone into, nor what belongs to a batch. Raises StorageError for a
    folder that cannot be listed.
    """
    yield out
    with storage_errors(out), os.scandir(out) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in names:
        if not _OURS.fullmatch(name) and not _is_output(out / name):
            yield from output_folders(out / name)


def runs_batch(path: Path) -> bool:
    """Whether a batch is at work in a folder that holds `path`, at any depth."""
    return any(_is_held(folder) for folder in path.absolute().parents)


def _is_held(out: Path) -> bool:
    try:
        return is_locked(batch_lock(out))
    except StorageError:  # what this user may not look at is no batch of theirs
        return False


def _is_output(folder: Path) -> bool:
    """Whether a folder is one output: by what it holds, since a folder of pictures may have any name."""
    if folder.suffix == ".zarr":
        return (folder / "_engine").is_dir() or (folder / "zarr.json").is_file()
    return folder.suffix == ".iiif" and (folder / "info.json").is_file()
