"""Scratch folders: one for each process; what the dead leave is removed, what is held is not."""

import os
import signal
import subprocess
import sys
import tempfile

from engine.batch.scratch import Scratch

OWNER = """
import sys
from engine.batch.scratch import Scratch
scratch = Scratch()
(scratch.path / "pixels").write_bytes(b"1")
print(scratch.path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next_and_what_is_held_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = owner.stdout.readline().strip()
        first = Scratch()
        assert os.path.exists(f"{left}/pixels")
        owner.send_signal(signal.SIGKILL)
    second = Scratch()
    assert not os.path.exists(left)
    assert first.path.exists()
    for scratch in (first, second):
        (scratch.path / "folder").mkdir()
        scratch.clear()
        assert [path.name for path in scratch.path.iterdir()] == ["lock"]
        scratch.close()
    assert list(tmp_path.iterdir()) == []
