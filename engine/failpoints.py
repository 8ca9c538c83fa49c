"""Named places where a test may kill the process or fail a system call.

``ENGINE_FAILPOINT=NAME:N:ACTION`` acts at the Nth time (from 1) that this process passes NAME; ACTION is ``kill``
(SIGKILL, as the out-of-memory killer would), ``enospc`` or ``eio`` (the OSError of a full or a failing disk).
Without the variable a failpoint costs one look-up. Nothing but tests sets it.
"""

import errno
import os
import signal
import threading
from collections import Counter

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_counts: Counter[str] = Counter()
_counting = threading.Lock()


def hit(name: str) -> None:
    """Pass the place called `name`; raises OSError or ends the process if that was asked for."""
    wanted = os.environ.get("ENGINE_FAILPOINT")
    if wanted is None:
        return
    target, occurrence, action = wanted.split(":")
    if target != name:
        return
    with _counting:  # shards are written in a thread of their own
        _counts[name] += 1
        if _counts[name] != int(occurrence):
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(_ERRNO[action], f"failpoint {wanted}")
