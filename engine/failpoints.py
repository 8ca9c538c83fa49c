"""Named places where a test may kill the process or fail a system call.

``ENGINE_FAILPOINT=NAME:N:ACTION`` acts at the Nth time (from 1) that this process passes NAME; ACTION is ``kill``
(SIGKILL, as the out-of-memory killer would), ``segv`` (a crash), ``hang``, ``enospc`` or ``eio`` (the OSError of a full
or a failing disk). Several are separated by semicolons. Without the variable a failpoint costs one look-up. Nothing but
tests sets it.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV}
_counts: Counter[str] = Counter()
_counting = threading.Lock()


def hit(name: str) -> None:
    """Pass the place called `name`; raises OSError or ends the process if that was asked for."""
    wanted = os.environ.get("ENGINE_FAILPOINT")
    if wanted is None:
        return
    for one in wanted.split(";"):
        target, occurrence, action = one.split(":")
        if target == name:
            _act(name, int(occurrence), action)


def _act(name: str, occurrence: int, action: str) -> None:
    with _counting:  # shards are written in a thread of their own
        _counts[name] += 1
        if _counts[name] != occurrence:
            return
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    if action == "hang":
        time.sleep(1e6)
    raise OSError(_ERRNO[action], f"failpoint {name}:{occurrence}:{action}")
