"""What is freed stays with the process until it is given back."""

import ctypes
import subprocess
import sys

import pytest

MIB = 1 << 20

PROGRAM = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from engine.memory import keep_freed_memory, process_memory, return_freed_memory, return_freed_memory_for_ever

def rise():
    before = process_memory("VmRSS")
    blocks = [np.ones(8 << 20, np.uint8) for _ in range(16)]
    held = np.ones(1 << 10, np.uint8)  # above them: the top of the heap is not all that can be given back
    del blocks
    return process_memory("VmRSS") - before, held

if sys.argv[1] == "keep":
    keep_freed_memory()
with ThreadPoolExecutor(1) as thread:
    kept, held = thread.submit(rise).result() if sys.argv[2] == "thread" else rise()
    before = process_memory("VmRSS")
    if sys.argv[3:]:
        return_freed_memory_for_ever(every_s=0.05)
        until = time.monotonic() + 20
        while time.monotonic() < until and before - process_memory("VmRSS") < 100 << 20:
            time.sleep(0.05)
    else:
        return_freed_memory()
    print(kept, before - process_memory("VmRSS"))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc lets one choose")
@pytest.mark.parametrize("where", ["first", "thread"])
def test_freed_memory_is_kept_until_it_is_returned(where):
    kept, returned = _run("keep", where)
    assert kept > 100 * MIB
    assert returned > 100 * MIB
    kept, _ = _run("leave", where)
    assert kept < 100 * MIB  # what would be otherwise


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc lets one choose")
def test_a_thread_returns_it_now_and_then():
    kept, returned = _run("keep", "thread", "for ever")
    assert min(kept, returned) > 100 * MIB


def _run(*options: str) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [int(each) for each in done.stdout.split()]
