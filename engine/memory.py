"""The memory of this process, as Linux counts it."""

import re
from pathlib import Path
from typing import Literal


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
