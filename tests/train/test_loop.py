"""Training on Ray: the same steps as without it, whoever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from engine.errors import TooFewGpus
from engine.train.loop import train_on_ray
from engine.train.run import newest_state, train, unfinished
from tests.train.test_run import RECIPE, run_of

pytestmark = pytest.mark.timeout(400)

STEPS = 300
PROGRAM = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
from tests.train.test_run import run_of
from engine.train import loop, run as running
from engine.train.checkpoints import owned
from engine.train.loop import train_on_ray
data, folder, workers, steps = sys.argv[1:]
run = run_of(Path(data), Path(folder)).shortened(int(steps))
with owned(run.folder):
    train_on_ray(run, workers=int(workers))
"""
REPOSITORY = str(Path(__file__).resolve().parents[2])


def start(data: Path, folder: Path, workers: int, steps: int, **environment: str) -> subprocess.Popen[str]:
    """Given its paths as a user gives them, relative to where it is called."""
    paths = [os.path.relpath(path, folder.parent) for path in (data, folder)]
    command = [sys.executable, "-c", PROGRAM.format(repository=REPOSITORY), *paths, str(workers), str(steps)]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": REPOSITORY, **environment},
    )


def workers_of(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train now."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it has just ended
        for process in psutil.Process(running.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def validated(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(one["stage"], one["step"], one["validation"]) for one in lines if "validation" in one]


def test_one_worker_makes_the_steps_of_the_plain_loop(data, tmp_path):
    torch.set_num_threads(1)
    plain = run_of(data, tmp_path / "plain")
    train(plain)
    with start(data, tmp_path / "ray", 1, 18) as running:
        assert running.wait() == 0, running.stderr.read()[-3000:]  # type: ignore[union-attr]
    for mine, theirs in zip(validated(tmp_path / "plain"), validated(tmp_path / "ray"), strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2] == pytest.approx(theirs[2], abs=1e-6)
    for chosen in RECIPE.stages:
        one, other = (newest_state(run_of(data, tmp_path / name), chosen) for name in ("plain", "ray"))
        assert one.step == other.step == 6
        for name, value in one.tensors.items():
            assert torch.allclose(value.float(), other.tensors[name].float(), atol=1e-6), name


def test_two_workers_share_their_gradients_stop_together_and_survive_a_death(data, tmp_path):
    folder, run = tmp_path / "ray", run_of(data, tmp_path / "ray").shortened(STEPS)
    with start(data, folder, 2, STEPS) as running:
        while not list(folder.glob("inpainting-*.state")):
            assert running.poll() is None
            time.sleep(0.05)
        running.terminate()
        assert running.wait() == 0, running.stderr.read()[-3000:]  # type: ignore[union-attr]
    assert unfinished(run) is not None
    with start(data, folder, 2, STEPS) as running:
        killed = False
        while running.poll() is None:
            if not killed and list(folder.glob("super-resolution-*.state")):
                for process in workers_of(running)[:1]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
                        killed = True
            time.sleep(0.05)
        assert running.wait() == 0, running.stderr.read()[-3000:]  # type: ignore[union-attr]
    assert killed
    assert unfinished(run) is None
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == len(run.recipe.stages) * (STEPS // 3 // 50)  # every fiftieth once
    assert [one[:2] for one in validated(folder)] == [(s.name, at) for s in RECIPE.stages for at in (0, STEPS // 3)]


def test_what_would_fail_again_is_not_tried_again(data, tmp_path):
    with start(data, tmp_path / "ray", 2, 18, ENGINE_FAILPOINT="temp-write:2:enospc") as running:
        workers: set[int] = set()
        while running.poll() is None:
            workers |= {process.pid for process in workers_of(running)}
            time.sleep(0.05)
        said = running.stderr.read()  # type: ignore[union-attr]
    assert running.returncode == 1
    assert "TrainingError" in said
    assert "no space left" in said
    assert len(workers) <= 4  # Ray begins anew, and is told
    assert not list((tmp_path / "ray").glob("*.state"))


def test_what_would_wait_for_ever_is_refused(data, tmp_path):
    with pytest.raises(TooFewGpus, match="need 1 of this machine's GPU, it has 0"):
        train_on_ray(run_of(data, tmp_path, device="cuda"), workers=1)
