"""The memory of this process, as Linux counts it and glibc keeps it. Other systems and C libraries do as they do."""

import ctypes
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h
_KEPT_BLOCK_BYTES = 1 << 30
_THREAD_HEAP_BYTES = 64 << 20
"""Threads but the first have heaps of this size; an empty one is kept where as much is to be spared."""


def process_memory(kind: Literal["VmRSS", "VmHWM", "VmData"]) -> int | None:
    """Bytes resident now (VmRSS), at most so far (VmHWM), or private and writable (VmData); None where nothing counts.

    `getrusage` would not do: its peak begins with that of the process which started this one (proc_pid_status(5)).
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def available_memory() -> int | None:
    """Bytes that this machine can still give, or its control group (version 2), where that is less; None: unknown."""
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    found = None if told is None else int(told[1]) * 1024
    with suppress(OSError, ValueError):  # no such group, or "max"
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        cached = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        left += sum(map(int, cached))  # given back where it is needed
        found = left if found is None else min(found, left)
    return found


def keep_freed_memory() -> None:
    """Lets what is freed be used again in place of going back to the system, up to `return_freed_memory`.

    A network frees and asks for the same megabytes in every layer; to have each page mapped and zeroed anew took more
    than half of its time (measured: 2.1 times faster without).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)  # the most that it takes
        mallopt(_M_TOP_PAD, _THREAD_HEAP_BYTES)


def share_one_heap() -> None:
    """Lets the threads to come share the heap of the first: with dozens, what each ever needed at most adds up."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Gives back to the system what is free by now."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def return_freed_memory_for_ever(every_s: float = 60.0) -> None:
    """Lets a thread do it now and then, as long as the process lives.

    For processes that serve for months: what has been kept by then fits what is asked for next less and less. To map a
    process' pages anew once a minute costs nothing that can be measured.
    """

    def returning() -> None:
        while True:
            time.sleep(every_s)
            return_freed_memory()

    threading.Thread(target=returning, name="memory", daemon=True).start()
