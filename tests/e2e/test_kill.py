"""Kill `engine restore` anywhere: the next run ends with the same bytes and computes no recorded shard again."""

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.bag import make_bag
from engine.errors import OutputBusy
from engine.tiling.damage import Kind
from engine.upkeep import verify_outputs
from tests.forked import JobServer, job_server
from tests.networks import TINY, random_checkpoint
from tests.outputs import timeless

JOB = Path(__file__).with_name("kill_job.py")
NUM_MOMENTS = 20
KILLED = -signal.SIGKILL


@dataclass
class Scene:
    """One job and what an undisturbed run of it makes."""

    server: JobServer
    arguments: list[str]
    undisturbed: dict[str, bytes]
    num_shards: int

    def run(self, out: Path, **options: Any) -> int:
        return self.server.run([*self.arguments, "--out", str(out)], notes(out), **options)


def notes(out: Path) -> str:
    """Where the shards stand that are computed."""
    return f"{out}.notes"


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server(JOB) as server:
        yield server


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that is possible: a killed process leaves the same behind, and fsync costs nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)


def scene_of(server: JobServer, folder: Path, arguments: list[str]) -> Scene:
    scene = Scene(server, arguments, {}, 0)
    out = folder / "undisturbed"
    scene.run(out)
    assert (out / "a.zarr").is_dir(), (folder / "undisturbed.notes.log").read_text()
    scene.undisturbed = timeless(out)
    scene.num_shards = len(computed(out))
    return scene


@pytest.fixture(scope="module")
def scene(server, folder) -> Scene:
    rng = np.random.default_rng(0)
    image, mask = folder / "a.png", folder / "m.png"
    missing = np.zeros((40, 100), np.uint8)
    missing[12:25, 25:70] = 255
    cv2.imwrite(str(image), rng.integers(0, 256, (40, 100, 3), dtype=np.uint8))
    cv2.imwrite(str(mask), missing)
    model = random_checkpoint(folder, TINY)
    options = ["--mask", str(mask), "--scale", "2", "--model", str(model)]
    made = scene_of(server, folder, ["restore", str(image), *options, "--format", "ome-zarr", "--format", "png"])
    assert made.num_shards == 12
    return made


@pytest.fixture
def out(folder) -> Iterator[Path]:
    yield folder / "out"
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def computed(out: Path) -> list[str]:
    path = Path(notes(out))
    return path.read_text().split() if path.exists() else []


def recorded(out: Path) -> set[str]:
    return {json.loads(path.read_bytes())["key"] for path in out.glob("a*.zarr/_engine/ledger/*/*.json")}


def check_rerun(scene: Scene, out: Path) -> None:
    """Runs the interrupted job again and checks every promise."""
    finished, before = recorded(out), len(computed(out))
    assert scene.run(out) == 0, out.with_name(out.name + ".notes.log").read_text()
    again = computed(out)[before:]
    assert len(again) == len(set(again))
    assert set(again).isdisjoint(finished)
    assert len(finished) + len(again) == scene.num_shards
    assert timeless(out) == scene.undisturbed
    assert not list(out.rglob("*.partial"))
    assert not list(out.glob("*.inprogress.zarr"))


FAILPOINTS = [
    *(("temp-write", n) for n in (1, 2, 6, 15)),
    *(("fsync", n) for n in (1, 4, 11)),
    *(("rename", n) for n in (1, 2, 5, 10, 25)),
    *(("record", n) for n in (1, 2, 9, 20)),
    *(("publish", n) for n in (1, 2)),
]


@pytest.mark.parametrize(("name", "occurrence"), FAILPOINTS, ids=[f"{name}-{n}" for name, n in FAILPOINTS])
def test_a_kill_at_every_named_place(name, occurrence, scene, out):
    assert scene.run(out, failpoint=f"{name}:{occurrence}:kill") == KILLED
    check_rerun(scene, out)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kills_at_moments_spread_over_a_job(scene, folder, out):
    """Each kill hits a job of its own; at least some must have hit before, and some after, the first record."""
    progress, chance = [], random.Random(0)
    for moment in range(NUM_MOMENTS):
        begun = moment * (scene.num_shards + 1) // NUM_MOMENTS
        scene.run(out, kill=(notes(out), begun, chance.uniform(0.0, 0.02 if begun else 0.2)))
        progress.append(len(recorded(out)))
        check_rerun(scene, out)
        for path in folder.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(set(progress)) >= 3, progress


def test_one_job_killed_again_and_again(scene, out):
    """Killed at every third record until it is through: no kill costs more than the shard it hit."""
    kills = 0
    while scene.run(out, failpoint="record:4:kill") == KILLED:
        kills += 1
        assert len(recorded(out)) >= kills
        assert kills <= scene.num_shards
    assert kills >= 3
    assert len(computed(out)) <= scene.num_shards + 2 * kills  # the shard in the writer, and the next one
    assert timeless(out) == scene.undisturbed


def test_a_black_picture_resumes_as_done(server, folder, out):
    """Zarr takes a chunk of zeros for one that is not there; a finished black shard must count as finished."""
    image = folder / "black" / "a.png"
    image.parent.mkdir()
    cv2.imwrite(str(image), np.zeros((70, 200, 3), np.uint8))
    scene = scene_of(server, image.parent, ["restore", str(image), "--format", "ome-zarr", "--model", model_of(folder)])
    assert scene.run(out, failpoint="record:9:kill") == KILLED
    assert len(recorded(out)) >= 4
    check_rerun(scene, out)
    before = len(computed(out))
    assert scene.run(out) == 0
    assert len(computed(out)) == before


def model_of(folder: Path) -> str:
    return str(random_checkpoint(folder, TINY))


def test_a_parameter_that_changes_pixels_never_mixes(scene, out):
    """Two plans in one folder: the killed one's work stays, and is of no use to the other."""
    assert scene.run(out, failpoint="record:8:kill") == KILLED
    halves = recorded(out)
    boxed = Scene(scene.server, [*scene.arguments, "--box", "0,0,40,99"], {}, 0)
    before = len(computed(out))
    assert boxed.run(out) == 0
    assert set(computed(out)[before:]) >= halves  # computed anew, none taken over
    assert len(list(out.glob("*.inprogress.zarr"))) == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["rename", "fsync-folder"])
def test_a_kill_while_formats_are_added(name, scene, folder, out):
    """In a published canvas: nothing is called damaged that is not, no bag is made, and any command goes on."""
    added = Scene(scene.server, [*scene.arguments, "--format", "jpeg", "--format", "iiif"], {}, 0)
    states, ends = [], []
    for occurrence in count(1):
        shutil.copytree(folder / "undisturbed", out)
        status = added.run(out, failpoint=f"{name}:{occurrence}:kill")
        finished = timeless(out)
        if status == 0:
            break
        assert status == KILLED
        scratch = out / "a.zarr" / "_engine" / "scratch"
        if scratch.exists():
            with pytest.raises(OutputBusy):
                make_bag(out, folder / "bag")
        kinds = {problem.kind for verdict in verify_outputs([out]) for problem in verdict.problems}
        assert kinds <= {Kind.OUTDATED}
        states.append((scratch.exists(), (out / "a.jpg").exists(), bool(kinds)))
        runs = [added] if occurrence % 2 else [scene, added]
        for run in runs:
            assert run.run(out) == 0, out.with_name(out.name + ".notes.log").read_text()
            assert not scratch.exists()
            assert not list(out.rglob("*.partial"))
            assert [verdict.problems for verdict in verify_outputs([out])] == [()]
        ends.append(timeless(out))
        shutil.rmtree(out)
    assert all(end == finished for end in ends)
    assert len(set(states)) >= 2, states
