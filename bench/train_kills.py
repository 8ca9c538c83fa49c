"""What a training run loses when it is killed: nothing that it had stored, and not a bit of the rest.

    python bench/train_kills.py [steps] [workers] [saves] [--steps N]

steps    A run across all stages of `lite` and an adversarial one, killed (SIGKILL) at 20 random steps, beside one that
         nobody disturbs: weights, averages, memory of the optimisers, critic and the loss of every step, bit for bit.
workers  The same by two processes of Ray Train, of which a random one is killed 5 times: steps and last losses.
saves    A process that stores states is killed, or finds the disk full, at every place of every save: a state that is
         whole is there each time, no older than the one before.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from _batch_setup import REPOSITORY, Picture, command_line, make_pictures, record

from engine import failpoints
from engine.errors import StorageFull
from engine.geometry import Size
from engine.train.checkpoints import State, load_state, save_state
from engine.train.recipes import gan, lite
from engine.train.run import Run, newest_state

KILLS, WORKER_KILLS, SAVES = 20, 5, 20
BETWEEN_S = 15.0
MOST_DIFFERENCE = 1e-6
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, "bench")
from train_kills import place, run_of
from engine.train import run as running
data, folder, steps, dies_at, workers = sys.argv[1:]
running.SAVE_EVERY_S, running.LOG_EVERY_STEPS = 5.0, 1
torch.set_num_threads(1)
run = run_of(Path(data), Path(folder), int(steps))
at = place(run)
def told(logs):
    global at
    at += 1
    if at == int(dies_at):
        os.kill(os.getpid(), signal.SIGKILL)
if int(workers):
    from engine.train.loop import train_on_ray
    train_on_ray(run, workers=int(workers))
else:
    running.train(run, part=running.Part(told=told))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASURED), help="all where none is given")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    all_hold = True
    with tempfile.TemporaryDirectory(prefix="t") as name:
        data = Path(name, "data")
        make_pictures(data, [Picture(f"{n}.png", Size(800, 800)) for n in range(4)], seed=1)
        for what in options.what or MEASURED:
            found = MEASURED[what](data, Path(name, what), options.steps)
            print(what, found, flush=True)
            record(f"kills: {what}", found, into="train")
            all_hold &= bool(found["holds"])
    raise SystemExit(not all_hold)


def run_of(data: Path, folder: Path, steps: int) -> Run:
    recipe = lite()
    recipe = replace(recipe, stages=(*recipe.stages, *gan().stages))
    return Run(recipe, data, folder, "made").shortened(steps)


def place(run: Run) -> int:
    """Steps that are stored."""
    return sum(newest_state(run, stage).step for stage in run.recipe.stages)


def start(data: Path, folder: Path, steps: int, *, dies_at: int = 0, workers: int = 0) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, str(data), str(folder), str(steps), str(dies_at), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def ended(process: "subprocess.Popen[bytes]", *, code: int = 0) -> None:
    assert process.wait() == code, f"exit {process.returncode} instead of {code}"


def kill_steps(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    whole, killed = folder / "whole", folder / "killed"
    ended(start(data, whole, steps))
    total = place(run_of(data, whole, steps))
    for dies_at in sorted(random.Random(0).sample(range(1, total), KILLS)):
        ended(start(data, killed, steps, dies_at=dies_at), code=-signal.SIGKILL)
    ended(start(data, killed, steps))
    runs = [run_of(data, one, steps) for one in (whole, killed)]
    differing, tensors = 0, 0
    for stage in runs[0].recipe.stages:
        one, other = (newest_state(run, stage) for run in runs)
        assert one.tensors.keys() == other.tensors.keys()
        assert (one.step, one.skipped, one.bad) == (other.step, other.skipped, other.bad)
        tensors += len(one.tensors)
        differing += sum(not torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    logs = [told(one) for one in (whole, killed)]
    same = logs[0] == logs[1] and len(logs[0]) >= total
    return {
        "steps": total,
        "kills": KILLS,
        "tensors": tensors,
        "differing": differing,
        "same_losses": same,
        "holds": same and not differing,
    }


def kill_workers(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    whole, killed = folder / "whole", folder / "killed"
    ended(start(data, whole, steps, workers=2))
    chance, kills = random.Random(0), 0
    process = start(data, killed, steps, workers=2)
    struck_at, before = time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.2)
        now = place(run_of(data, killed, steps)) if killed.is_dir() else 0
        if kills < WORKER_KILLS and now > before and time.monotonic() - struck_at > BETWEEN_S:
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [one for one in children if "RayTrainWorker" in command_line(one)]
            if workers:
                with suppress(psutil.NoSuchProcess):
                    chance.choice(workers).kill()
                    kills, struck_at, before = kills + 1, time.monotonic(), now
    ended(process)
    logs = [told(one) for one in (whole, killed)]
    counts = [place(run_of(data, one, steps)) for one in (whole, killed)]
    last = max(abs(one["loss"] - other["loss"]) for one, other in zip(*(ends(log) for log in logs), strict=True))
    return {
        "steps": counts,
        "kills": kills,
        "last_losses_differ_by": last,
        "holds": counts[0] == counts[1] and kills == WORKER_KILLS and last <= MOST_DIFFERENCE,
    }


def told(folder: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def ends(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last step of each stage."""
    return list({line["stage"]: line for line in log if "loss" in line}.values())


def kill_saves(_data: Path, folder: Path, _steps: int) -> dict[str, Any]:
    passed = list(recorded(folder / "counted").elements())
    lost: list[str] = []
    points = 0
    for action in ("kill", "enospc"):
        seen: Counter[str] = Counter()
        for name in passed:
            seen[name] += 1
            where = f"{name}:{seen[name]}:{action}"
            at = folder / where.replace(":", "-")
            saved = in_child(at, where)
            found = load_state(at, "joint", of="x") if at.is_dir() else None
            points += 1
            if (found.step if found else 0) not in (saved, saved + 1) or (
                found is not None and not torch.equal(found.tensors["a"], torch.full((1000,), float(found.step)))
            ):
                lost.append(where)
    return {"saves": SAVES, "points": points, "lost": lost, "holds": not lost and points >= 100}


def save_all(folder: Path) -> int:
    """As many states as are asked for, one after another; the last that was stored."""
    for step in range(1, SAVES + 1):
        tensors = {"a": torch.full((1000,), float(step))}
        try:
            save_state(folder, "joint", State(step, tensors=tensors), of="x")
        except StorageFull:
            return step - 1
        (folder / "saved").write_text(str(step))
    assert len(list(folder.glob("*.state"))) == 2
    return SAVES


def recorded(folder: Path) -> Counter[str]:
    """How often each failpoint is passed."""
    counts: Counter[str] = Counter()
    with mock.patch("engine.store.hit", lambda name: counts.update([name])):
        save_all(folder)
    return counts


def in_child(folder: Path, where: str) -> int:
    """Saves in a process that has a failpoint; the last step that it knows to be stored."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        os.environ["ENGINE_FAILPOINT"] = where
        failpoints._counts.clear()
        save_all(folder)
        os._exit(0)
    os.waitpid(child, 0)
    saved = folder / "saved"
    return int(saved.read_text() or 0) if saved.exists() else 0


MEASURED = {"saves": kill_saves, "steps": kill_steps, "workers": kill_workers}


if __name__ == "__main__":
    main()
