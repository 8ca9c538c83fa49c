"""Kill the process anywhere: the next run ends with the same bytes and makes nothing twice that had a record."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.forked import JobServer, job_server

JOB = Path(__file__).with_name("storage_job.py")
DONE, FULL, FAILED = 0, 10, 11
NUM_SHARDS = 4 + 1 + 1
"""Of the job's picture, 37 px high and 53 wide, in shards of 32 px; then 19x27, then 10x14."""


class Jobs:
    """Runs the job of storage_job.py; exit statuses are negative for signals."""

    def __init__(self, server: JobServer) -> None:
        self._server = server

    def run(self, out: Path, **options: Any) -> int:
        out.mkdir(exist_ok=True)
        return self._server.run(str(out), **options)[0]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with job_server(JOB) as server:
        yield Jobs(server)


@pytest.fixture
def memory_path(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: a killed process leaves the same behind, and fsync costs nothing."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(jobs, tmp_path_factory) -> dict[str, bytes]:
    """Every file of the published output of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert jobs.run(out) == DONE
    assert len(computed(out)) == NUM_SHARDS
    return objects(out)


def objects(out: Path) -> dict[str, bytes]:
    final = out / "scan.zarr"
    files = {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    files.pop("_engine/lock", None)  # empty; stays when the process is killed right after the rename
    return files


def computed(out: Path) -> list[str]:
    notes = out / "computed.txt"
    return notes.read_text().split() if notes.exists() else []


def recorded(out: Path) -> set[str]:
    return {json.loads(path.read_bytes())["key"] for path in out.glob("scan*.zarr/_engine/ledger/*/*.json")}


def check_rerun(jobs: Jobs, out: Path, undisturbed: dict[str, bytes]) -> None:
    """Runs the interrupted job again and checks every promise; `out` is deleted."""
    finished, before = recorded(out), len(computed(out))
    assert jobs.run(out) == DONE
    again = computed(out)[before:]
    assert len(again) == len(set(again))
    assert set(again).isdisjoint(finished)
    assert len(finished) + len(again) == NUM_SHARDS
    assert objects(out) == undisturbed
    assert sorted(path.name for path in out.iterdir() if path.name != "computed.txt") == ["scan.zarr"]
    assert list(out.rglob("*.partial")) == []
    shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        # Two writes per shard (object and record), besides the lay-out; each write passes these twice, or once.
        ("temp-write", 4 * NUM_SHARDS),
        ("fsync", 2 * NUM_SHARDS),
        ("rename", 4 * NUM_SHARDS),
        ("record", 2 * NUM_SHARDS),
        ("publish", 2),
    ],
)
def test_kill_at_every_failpoint(jobs, memory_path, undisturbed, name, at_least):
    for occurrence in count(1):
        out = memory_path / str(occurrence)
        status = jobs.run(out, failpoint=f"{name}:{occurrence}:kill")
        if status == DONE:
            assert occurrence > at_least
            break
        assert status == -signal.SIGKILL
        check_rerun(jobs, out, undisturbed)


@pytest.mark.slow
def test_kill_at_any_moment(jobs, tmp_path, undisturbed):
    start = time.perf_counter()
    assert jobs.run(tmp_path / "timed") == DONE
    whole_s = time.perf_counter() - start
    statuses = []
    for moment in range(24):
        out = tmp_path / str(moment)
        statuses.append(jobs.run(out, kill_after_s=whole_s * moment / 24))
        check_rerun(jobs, out, undisturbed)
    assert statuses.count(-signal.SIGKILL) >= 12  # the later ones may find a faster run over already


@pytest.mark.slow
@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("name", ["temp-write", "fsync", "rename", "record", "publish"])
def test_a_failing_disk_at_every_fifth_failpoint(jobs, memory_path, undisturbed, name, action):
    expected = FULL if action == "enospc" else FAILED
    for occurrence in count(1, step=5):
        out = memory_path / str(occurrence)
        status = jobs.run(out, failpoint=f"{name}:{occurrence}:{action}")
        if status == DONE:
            assert occurrence > 1
            break
        assert status == expected
        assert list(out.rglob("*.partial")) == []
        check_rerun(jobs, out, undisturbed)


def test_killed_again_and_again(jobs, tmp_path, undisturbed):
    """Every run gets only a little further than the one before, and that is enough."""
    out = tmp_path / "out"
    for _ in range(NUM_SHARDS):
        assert jobs.run(out, failpoint="record:2:kill") == -signal.SIGKILL
    assert len(recorded(out)) == NUM_SHARDS
    check_rerun(jobs, out, undisturbed)


def test_a_full_disk_and_then_a_larger_one(jobs, tmp_path, undisturbed):
    """A real file system, not a failpoint: its shards do not fit, after growing it they do."""
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        assert jobs.run(out) == FULL
        assert list(out.rglob("*.partial")) == []
        finished = recorded(out)
        assert 0 < len(finished) < NUM_SHARDS
        assert jobs.run(out) == FULL  # still full: still the same typed error, nothing lost
        assert recorded(out) >= finished
        before = len(computed(out))
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        finished = recorded(out)
        assert jobs.run(out) == DONE
        assert set(computed(out)[before:]).isdisjoint(finished)
        assert objects(out) == undisturbed
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_read_only_disk(jobs, tmp_path):
    out = tmp_path / "fixed"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        assert jobs.run(out) == FAILED
    finally:
        subprocess.run(["umount", str(out)], check=True)
