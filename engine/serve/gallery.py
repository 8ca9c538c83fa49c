"""The pictures of a store as views: which canvas shows what, opened once and kept for a while."""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from engine.errors import NotFound, NotReady, StorageError
from engine.receipt import Job
from engine.serve.view import Difference, Growing, Stored, View
from engine.tiling.canvas import Canvas, stored_plan
from engine.tiling.layout import stored_metadata

RESTORED, ORIGINAL, MASK, DIFFERENCE = "restored", "original", "mask", "difference"
LAYERS = (RESTORED, ORIGINAL, MASK, DIFFERENCE)
OVERVIEW = "overview.npy"
_MOST_OPEN = 64
_MOST_ANSWERS_BYTES = 64 << 20
_MOST_ANSWER_BYTES = 1 << 20
"""A tile, not a whole picture."""
_ENTRY_BYTES = 4096
"""What keeping an answer takes besides, rounded up: there are at most so many that all can be looked through."""


def exported(folder: Path, fmt: str) -> Path:
    """Where the restored picture of a folder lies as a file; `ome-zarr` is zipped."""
    if fmt == "ome-zarr":
        return folder / f"{RESTORED}.ozx"
    return Job(folder, None, folder / "out", RESTORED, (fmt,)).targets[fmt]


class Gallery:
    """Opens views, and keeps what was sent of finished ones: many look at the same tiles, at small levels above all.

    Threads may ask at the same time.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, str], View] = OrderedDict()
        self._answers = LRUCache[tuple[Path, str], bytes](
            _MOST_ANSWERS_BYTES, getsizeof=lambda data: len(data) + _ENTRY_BYTES
        )
        self._lock = threading.Lock()

    def view(self, folder: Path, layer: str) -> View:
        """A layer of the picture in a folder. Raises NotFound for one that it has not, NotReady for one to come."""
        if layer == DIFFERENCE:
            return Difference(self.view(folder, RESTORED), self.view(folder, ORIGINAL))
        if layer not in LAYERS:
            raise NotFound(f"{layer!r} is none of the layers {', '.join(LAYERS)}")
        final = folder / "out" / f"{layer}.zarr"
        found = self.opened(folder, layer)
        if isinstance(found, Stored) or (found is not None and not final.exists()):
            return found
        made = self._opened(folder, final, layer)
        with self._lock:
            self._open[folder, layer] = made
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return made

    def opened(self, folder: Path, layer: str) -> View | None:
        """What is kept of a layer: it takes no time, and may have been finished or dropped since."""
        with self._lock:
            found = self._open.get((folder, layer))
            if found is not None:
                self._open.move_to_end((folder, layer))
        return found

    def forget(self, folder: Path) -> None:
        """Drops what is kept of a picture."""
        with self._lock:
            for layer in LAYERS:
                self._open.pop((folder, layer), None)
            for key in [key for key in self._answers if key[0] == folder]:
                del self._answers[key]

    def answer(self, folder: Path, tag: str) -> bytes | None:
        """What was sent before of a finished picture."""
        with self._lock:
            return self._answers.get((folder, tag))

    def keep_answer(self, folder: Path, tag: str, data: bytes) -> None:
        """Keeps what is sent of a finished picture, where it is small."""
        if len(data) <= _MOST_ANSWER_BYTES:
            with self._lock:
                self._answers[folder, tag] = data

    @staticmethod
    def _opened(folder: Path, final: Path, layer: str) -> View:
        try:
            if final.exists():
                return Stored(Canvas.load(final), stored_metadata(final).icc)
            for root in final.parent.glob(f"{layer}.*.inprogress.zarr"):
                plan = stored_plan(root)
                if plan is not None and layer == RESTORED:
                    overview = np.load(folder / OVERVIEW, allow_pickle=False)
                    return Growing(Canvas.join(plan, final.parent), overview, stored_metadata(root).icc)
        except (StorageError, OSError, ValueError):
            if not folder.exists():
                raise NotFound("the picture was dropped") from None
        raise NotReady(f"{layer}: 0 pixels are there yet; ask again in a second")
