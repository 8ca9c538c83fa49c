"""Kill the process anywhere: the next run ends with the same bytes and makes nothing twice that had a record."""

import hashlib
import json
import os
import random
import re
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

from tests.faults.storage_job import DONE, FAILED, FULL, LARGE, SMALL, job
from tests.forked import JobServer, job_server

JOB = Path(__file__).with_name("storage_job.py")
NUM_SHARDS = SMALL.grid.num_shards
NOTES = "computed.txt"
RANDOM = re.compile(r"(?<=\.)[0-9a-f]{32}(?=\.)")
SHARD_NAMED = re.compile(r"/(?P<level>\d)/c/0/(?P<iy>\d)/(?P<ix>\d)|/_engine/ledger/(?P<record>\d/\d\.\d)\.json")
POINTS = {
    # Two objects per shard (it and its record), besides the lay-out; most places are passed before and after.
    "open": 2 * NUM_SHARDS,
    "temp-write": 4 * NUM_SHARDS,
    "fsync": 2 * NUM_SHARDS,
    "fsync-folder": 4 * NUM_SHARDS,
    "rename": 2 * NUM_SHARDS,
    "link": 2 * NUM_SHARDS,
    "mkdir": NUM_SHARDS,
    "record": 2 * NUM_SHARDS,
    "publish": 2,
    "read": 4 * NUM_SHARDS,
}
"""Each failpoint, and how often the job passes it at least."""


class Jobs:
    """Runs the job of storage_job.py; exit statuses are negative for signals."""

    def __init__(self, server: JobServer) -> None:
        self._server = server

    def run(self, out: Path, size: str = "small", **options: Any) -> int:
        out.mkdir(exist_ok=True)
        return self._server.run(str(out), size, **options)


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


NO_SPACE = ("read", "enospc")
"""Reading needs no space."""


def objects(out: Path) -> dict[str, bytes]:
    final = out / "scan.zarr"
    files = {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    files.pop("_engine/lock", None)  # empty; stays when the process is killed right after the rename
    return files


def computed(out: Path) -> list[str]:
    notes = out / NOTES
    return notes.read_text().split() if notes.exists() else []


def recorded(out: Path) -> set[str]:
    return {json.loads(path.read_bytes())["key"] for path in out.glob("scan*.zarr/_engine/ledger/*/*.json")}


@pytest.fixture(scope="module")
def states() -> set[str]:
    """What the reruns of this module found: their end depends on nothing else, so each state is run from once."""
    return set()


def state(out: Path) -> str:
    """A digest of every folder and file that a rerun finds, whatever random names its temporary files have."""
    found = [(RANDOM.sub("", str(path.relative_to(out))), path) for path in out.rglob("*") if path.name != NOTES]
    contents = [(name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "") for name, path in found]
    return hashlib.sha256(json.dumps(sorted(contents)).encode()).hexdigest()


def check_rerun(out: Path, undisturbed: dict[str, bytes], states: set[str]) -> None:
    """Runs the interrupted job again, in this process, and checks every promise; `out` is deleted."""
    found = state(out)
    if found in states:
        shutil.rmtree(out)
        return
    finished, before = recorded(out), len(computed(out))
    assert job(str(out)) == DONE
    again = computed(out)[before:]
    assert len(again) == len(set(again))
    assert set(again).isdisjoint(finished)
    assert len(finished) + len(again) == NUM_SHARDS
    assert objects(out) == undisturbed
    assert sorted(path.name for path in out.iterdir() if path.name != NOTES) == ["scan.zarr"]
    assert list(out.rglob("*.partial")) == []
    shutil.rmtree(out)
    states.add(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in POINTS if name != "read"])
def test_kill_at_every_failpoint(jobs, memory_path, undisturbed, states, name):
    for occurrence in count(1):
        out = memory_path / str(occurrence)
        status = jobs.run(out, failpoint=f"{name}:{occurrence}:kill")
        if status == DONE:
            assert occurrence > POINTS[name]
            break
        assert status == -signal.SIGKILL
        check_rerun(out, undisturbed, states)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "action"),
    [(name, action) for name in POINTS for action in ("eio", "enospc") if (name, action) != NO_SPACE],
)
def test_a_failing_disk_at_every_failpoint(jobs, memory_path, undisturbed, states, name, action):
    for occurrence in count(1):
        out = memory_path / str(occurrence)
        # In a process of its own: Zarr writes siblings at once, and one may still be under way when another has failed.
        status = jobs.run(out, failpoint=f"{name}:{occurrence}:{action}")
        if status == DONE:
            assert occurrence > POINTS[name]
            break
        assert status == (FULL if action == "enospc" else FAILED)
        assert list(out.rglob("*.partial")) == []
        check_message(out)
        check_rerun(out, undisturbed, states)


def check_message(out: Path) -> None:
    """The error names the file that failed, and that of a shard (or of its record) while shards are made."""
    message = out.with_name(f"{out.name}.error").read_text()
    assert message.startswith(str(out))
    shards, noted = recorded(out), computed(out)
    if noted and len(shards) < NUM_SHARDS:
        named = SHARD_NAMED.search(message)
        assert named is not None, message
        shard = named["record"] or f"{named['level']}/{named['iy']}.{named['ix']}"
        # A shard's record is looked for before the shard is begun: the next one may be named too.
        assert shard in noted or shard == list(SMALL.grid.all_keys())[len(noted)].name, message


@pytest.mark.slow
def test_kill_at_any_moment(jobs, memory_path, undisturbed, states):
    statuses, chance = [], random.Random(0)
    for moment in range(24):
        out = memory_path / str(moment)
        begun = moment * (NUM_SHARDS + 1) // 24
        statuses.append(jobs.run(out, kill=(str(out / NOTES), begun, chance.uniform(0.0, 0.01))))
        check_rerun(out, undisturbed, states)
    assert statuses.count(-signal.SIGKILL) >= 12  # the others may have been over already


def test_killed_again_and_again(jobs, tmp_path, undisturbed, states):
    """Every run gets only a little further than the one before, and that is enough."""
    out = tmp_path / "out"
    for _ in range(NUM_SHARDS):
        assert jobs.run(out, failpoint="record:2:kill") == -signal.SIGKILL
    assert len(recorded(out)) == NUM_SHARDS
    check_rerun(out, undisturbed, states)


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


def test_twelve_mebibytes_fill_within_five_seconds(jobs, tmp_path):
    """Shards as large as real ones are in relation to the disk: the sixteenth or so does not fit."""
    out, roomy = tmp_path / "small", tmp_path / "roomy"
    out.mkdir()
    roomy.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        assert jobs.run(out, "large") == FULL
        failed_s = time.time() - (out / "computed.txt").stat().st_mtime  # since the last shard that was begun
        assert failed_s <= 5
        message = out.with_name("small.error").read_text()
        assert SHARD_NAMED.search(message)
        assert re.search(r"[\d,]+ bytes needed, [\d,]+ bytes free", message)
        finished, before = recorded(out), len(computed(out))
        assert 10 <= len(finished) < LARGE.grid.num_shards
        assert list(out.rglob("*.partial")) == []
        subprocess.run(["mount", "-o", "remount,size=40m", str(out)], check=True)
        assert jobs.run(out, "large") == DONE
        assert set(computed(out)[before:]).isdisjoint(finished)
        assert jobs.run(roomy, "large") == DONE
        assert objects(out) == objects(roomy)
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
