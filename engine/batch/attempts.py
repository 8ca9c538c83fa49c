"""Who was at work when a process died: intents, made before each attempt and removed after it.

A picture whose decoder crashes is refused by `engine.isolate`. What is counted here is rarer: the process that restores
dies or hangs, and Ray gives its work to another one. The loss of a node is nobody's fault and does not count; nor do
the intents of an earlier cluster, whose nodes are all gone. Ray gives the work of a lost node to others seconds before
it tells that the node is lost, so each node that counts is called.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from engine.outputs import BATCH
from engine.store import storage_errors

Nodes = Mapping[str, tuple[str, int]]
"""Those of the cluster that live, as far as it knows: where each listens."""
ANSWER_S = 2.0
MAX_SHARED = 2
"""Deaths after which a picture is tried once more in a process of its own, and blamed if that dies as well."""


class Attempts:
    """The intents of all pictures of a batch, in its folder of outputs."""

    def __init__(self, out: Path) -> None:
        self._folder = out / BATCH / "attempts"

    def forget(self) -> None:
        """For a driver that begins: whoever died under an earlier one did not die under it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, name: str, *, node: str) -> None:
        """Says that this process, on this node, starts to work on a picture. What a power cut loses does not count."""
        folder = self._of(name)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{uuid4().hex}.json").write_text(json.dumps({"name": name, "node": node, "pid": os.getpid()}))

    def end(self, name: str) -> None:
        """The picture has ended, well or not: nothing is held against it any more."""
        shutil.rmtree(self._of(name), ignore_errors=True)

    def deaths(self, name: str, *, node: str, living: Nodes) -> int:
        """How many processes died at work on a picture, on nodes that are alive; `node`: the one that asks."""
        count = 0
        for path in self._of(name).glob("*.json"):
            with suppress(OSError, ValueError):
                there = json.loads(path.read_bytes())["node"]
                count += there == node or (there in living and _answers(living[there]))
        return count

    def _of(self, name: str) -> Path:
        return self._folder / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, ANSWER_S).close()
    except OSError:
        return False
    return True
