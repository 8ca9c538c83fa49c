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

from engine.train.run import newest_state, train
from tests.train.test_run import RECIPE, run_of

pytestmark = pytest.mark.timeout(400)

PROGRAM = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
from tests.train.test_run import run_of
from engine.train import loop, run as running
from engine.train.loop import train_on_ray
train_on_ray(run_of(Path(sys.argv[1]), Path(sys.argv[2])), workers=int(sys.argv[3]))
"""
REPOSITORY = str(Path(__file__).resolve().parents[2])


def start(data: Path, folder: Path, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.format(repository=REPOSITORY), str(data), str(folder), str(workers)]
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def validated(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(one["stage"], one["step"], one["validation"]) for one in lines if "validation" in one]


def test_one_worker_makes_the_steps_of_the_plain_loop(data, tmp_path):
    torch.set_num_threads(1)
    plain = run_of(data, tmp_path / "plain")
    train(plain)
    with start(data, tmp_path / "ray", 1) as running:
        assert running.wait() == 0, running.stderr.read()[-3000:]  # type: ignore[union-attr]
    for mine, theirs in zip(validated(tmp_path / "plain"), validated(tmp_path / "ray"), strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2] == pytest.approx(theirs[2], abs=1e-6)
    for chosen in RECIPE.stages:
        one, other = (newest_state(run_of(data, tmp_path / name), chosen) for name in ("plain", "ray"))
        assert one.step == other.step == 6
        for name, value in one.tensors.items():
            assert torch.allclose(value.float(), other.tensors[name].float(), atol=1e-6), name


def test_two_workers_share_their_gradients_and_survive_a_death(data, tmp_path):
    folder = tmp_path / "ray"
    with start(data, folder, 2) as running:
        killed = False
        while running.poll() is None:
            if not killed and list(folder.glob("super-resolution-*.state")):
                for process in psutil.Process(running.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if "RayTrainWorker" in " ".join(process.cmdline()):
                            process.send_signal(signal.SIGKILL)
                            killed = True
                            break
            time.sleep(0.05)
        assert running.wait() == 0, running.stderr.read()[-3000:]  # type: ignore[union-attr]
    assert killed
    assert [newest_state(run_of(data, folder), chosen).step for chosen in RECIPE.stages] == [6, 6, 6]
    assert [one[:2] for one in validated(folder)] == [(s.name, step) for s in RECIPE.stages for step in (0, 6)]
