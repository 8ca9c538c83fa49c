"""Where training pictures come from: files below a folder, objects below ``s3://``, members of tars in either.

A tar counts as a folder: its members lie where it lies. Those of a bucket are downloaded once by each process.
"""

import atexit
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.errors import TrainingError
from engine.objects import Objects, Place, local_copy, objects_at

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}
TAR = ".tar"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture as it is stored."""

    name: str
    """With slashes, below what was searched."""
    read: Callable[[], bytes]

    def decode(self, flags: int) -> NDArray[np.uint8]:
        """As `cv2.imread` of a file. Raises TrainingError."""
        found = cv2.imdecode(np.frombuffer(self.read(), np.uint8), flags)
        if found is None:
            raise TrainingError(f"{self.name}: cannot be decoded; remove it from the training pictures")
        return found.astype(np.uint8, copy=False)


def find(root: Place) -> list[Encoded]:
    """All pictures below a folder or a prefix, by name. Raises TrainingError for a tar that cannot be read."""
    return sorted(_found(root), key=lambda one: one.name)


def _found(root: Place) -> Iterator[Encoded]:
    objects = objects_at(root)
    keys = objects.keys()
    for key in keys:
        suffix = PurePosixPath(key).suffix.lower()
        if suffix in SUFFIXES:
            yield Encoded(key, partial(_object, objects, key))
        elif suffix == TAR:
            tar = root / key
            yield from _members(tar if isinstance(tar, Path) else _downloaded(str(tar)), PurePosixPath(key).parent)


def _object(objects: Objects, key: str) -> bytes:
    found = objects.get(key)
    if found is None:
        raise TrainingError(f"{key}: 1 training picture is gone since the others were found; start again")
    return found


def _members(tar: Path, below: PurePosixPath) -> Iterator[Encoded]:
    try:
        with tarfile.open(tar, "r:") as opened:
            found = [(one.name, one.offset_data, one.size) for one in opened if one.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise TrainingError(f"{tar}: cannot be read as an uncompressed tar ({error}); make it anew") from error
    for name, offset, num_bytes in found:
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            yield Encoded(str(below / name), partial(_part, tar, offset, num_bytes))


def _part(file: Path, offset: int, num_bytes: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(num_bytes)


@cache
def _downloaded(url: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="engine-")
    atexit.register(folder.cleanup)
    return local_copy(url, Path(folder.name))
