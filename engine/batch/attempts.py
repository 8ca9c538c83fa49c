"""Who was at work when a process died: intents, made before each attempt and removed after it.

A picture whose decoder crashes is refused by `engine.isolate`. What is counted here is rarer: the process that restores
dies or hangs, and Ray gives its work to another one. The loss of a node is nobody's fault and does not count; nor do
the intents of an earlier cluster, whose nodes are all gone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from engine.store import storage_errors

MAX_SHARED = 2
"""Deaths after which a picture is tried once more in a process of its own, and blamed if that dies as well."""


class Attempts:
    """The intents of all pictures, in a folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, name: str, *, node: str) -> None:
        """Says that this process, on this node, starts to work on a picture. What a power cut loses does not count."""
        folder = self._of(name)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{uuid4().hex}.json").write_text(json.dumps({"name": name, "node": node, "pid": os.getpid()}))

    def end(self, name: str) -> None:
        """The picture has ended, well or not: nothing is held against it any more."""
        shutil.rmtree(self._of(name), ignore_errors=True)

    def deaths(self, name: str, *, living: Collection[str]) -> int:
        """How many processes died at work on a picture, on nodes that are alive."""
        count = 0
        for path in self._of(name).glob("*.json"):
            with suppress(OSError, ValueError):
                count += json.loads(path.read_bytes())["node"] in living
        return count

    def _of(self, name: str) -> Path:
        return self._folder / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
