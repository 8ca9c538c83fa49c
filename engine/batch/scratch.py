"""Folders for temporary files of processes that may be killed."""

import os
import shutil
import tempfile
from pathlib import Path

from engine.store import FileLock, storage_errors

_PREFIX = "engine-scratch-"


class Scratch:
    """A folder of this process alone, on this machine's own disk.

    It is locked, and the lock ends with the process: whoever makes the next one removes what the dead have left.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for left in root.glob(f"{_PREFIX}*"):
            _remove_unheld(left)
        with storage_errors(root):
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = FileLock.try_take(self.path / "lock")
        assert lock is not None  # the name is new
        self._lock = lock

    def clear(self) -> None:
        """Removes all that lies in the folder."""
        for path in self.path.iterdir():
            if path.name != "lock":
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def _remove_unheld(folder: Path) -> None:
    if not os.path.exists(folder / "lock"):  # another process is about to lock it, or it is another user's
        return
    lock = FileLock.try_take(folder / "lock")
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
