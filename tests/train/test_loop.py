"""A run resumes as if nothing had happened, stops when asked, and ends in a checkpoint that the engine loads."""

import json
import math
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import engine.train.loop as loop
from engine.errors import TrainingError
from engine.models.checkpoint import load
from engine.train.loop import Run, finish, train
from engine.train.recipes import Recipe
from engine.train.stages import GLOBAL, LOCAL, Draw, LossWeights, Stage
from tests.networks import TINY

SECOND_PER_STEP = 1.0
"""Of the clock that the tests drive: budgets in seconds become budgets in steps."""


def stage(name: str, task: str, trains: tuple[str, ...], *draws: Draw) -> Stage:
    return Stage(name, task, trains, 1 / 3, 2e-3, draws, LossWeights(pixel=1.0), window_px=16)  # type: ignore[arg-type]


RECIPE = Recipe(
    name="tiny",
    model=TINY,
    warmup_steps=2,
    stages=(
        stage("inpainting", "inpainting", GLOBAL, Draw(0.5, 1, 16, factor=1), Draw(0.5, 1, 16, factor=2)),
        stage("super-resolution", "super-resolution", LOCAL, Draw(1.0, 1, 16, levels=1)),
        stage("joint", "joint", ("",), Draw(0.5, 1, 16, factor=1, levels=1), Draw(0.5, 1, 16, levels=1)),
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), cv2.resize(noise, (96, 96), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Time passes only when it is looked at, so a budget is a number of steps."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += SECOND_PER_STEP
        return now[0]

    class Clock:
        pass

    Clock.monotonic = staticmethod(monotonic)
    monkeypatch.setattr(loop, "time", Clock)


def run_of(data: Path, folder: Path, steps: int, **options: object) -> Run:
    return Run(RECIPE, data, folder, 3 * steps * SECOND_PER_STEP, "CC0", **options)  # type: ignore[arg-type]


def never() -> bool:
    return False


class StopAfter:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def step_of(folder: Path, name: str) -> int:
    state = loop.load_state(folder / f"{name}.state")
    assert state is not None
    return state.step


@pytest.mark.parametrize("index", range(3), ids=[s.name for s in RECIPE.stages])
def test_a_resumed_stage_equals_an_undisturbed_one(index, data, tmp_path):
    chosen = RECIPE.stages[index]
    for name, parts in (("whole", [6]), ("parts", [2, 1, 3])):
        run = run_of(data, tmp_path / name, 6)
        run.folder.mkdir()
        for steps in parts:
            loop._Trainer(run, chosen).run(StopAfter(steps))
    assert step_of(tmp_path / "whole", chosen.name) == step_of(tmp_path / "parts", chosen.name) == 6
    whole, parts = (loop.load_state(tmp_path / name / f"{chosen.name}.state") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.weights[name]) for name, value in whole.weights.items())
    assert all(torch.equal(value, parts.ema[name]) for name, value in whole.ema.items())
    assert (tmp_path / "whole" / f"{chosen.name}.safetensors").read_bytes() == (
        tmp_path / "parts" / f"{chosen.name}.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("index", range(3), ids=[s.name for s in RECIPE.stages])
def test_a_stage_changes_only_what_it_trains(index, data, tmp_path):
    chosen = RECIPE.stages[index]
    run = run_of(data, tmp_path, 3)
    trainer = loop._Trainer(run, chosen)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.run(StopAfter(3))
    changed = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(chosen.trains) for name in changed)
    averaged = {name for name, value in trainer.state.ema.items() if not torch.equal(value, before[name])}
    assert averaged <= changed


def test_a_whole_run_ends_in_a_checkpoint_that_loads(data, tmp_path):
    run = run_of(data, tmp_path, 3)
    last = train(run)
    assert last == tmp_path / "joint.safetensors"
    card = finish(run, threads=1)
    loaded = load(str(tmp_path / "tiny.safetensors"))
    assert loaded.card == card
    assert loaded.card.config == TINY
    assert card.training["data"]["licence"] == "CC0"
    assert {name: entry["steps"] for name, entry in card.training["stages"].items()} == {
        s.name: step_of(tmp_path, s.name) for s in RECIPE.stages
    }
    # The joint stage trained everything, so its averages are the checkpoint.
    stored, joint = load_file(tmp_path / "tiny.safetensors"), load_file(tmp_path / "joint.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in joint.items())
    assert train(run) == last  # a finished run trains nothing again
    assert all(torch.equal(value, joint[name]) for name, value in load_file(last).items())


def test_a_stage_starts_from_what_the_others_trained(data, tmp_path):
    run = run_of(data, tmp_path, 2)
    train(run, ("inpainting", "super-resolution"))
    joint = loop._Trainer(run, RECIPE.stages[2])
    sources = [(load_file(tmp_path / f"{s.name}.safetensors"), s.trains) for s in RECIPE.stages[:2]]
    for found, prefixes in sources:
        for name, value in found.items():
            if name.startswith(prefixes):
                assert torch.equal(joint.network.state_dict()[name], value.float()), name


def test_stages_that_were_left_out_are_joined_from_the_others(data, tmp_path):
    run = run_of(data, tmp_path, 2)
    train(run, ("inpainting", "super-resolution"))
    finish(run, threads=1)
    stored = load_file(tmp_path / "tiny.safetensors")
    for chosen in RECIPE.stages[:2]:
        for name, value in load_file(tmp_path / f"{chosen.name}.safetensors").items():
            if name.startswith(chosen.trains):
                assert torch.equal(stored[name], value), name


def test_a_stop_file_ends_the_run_after_the_step(data, tmp_path, monkeypatch):
    run = run_of(data, tmp_path, 50)
    true = loop._Trainer._step

    def step(self):
        if self.state.step == 1:
            (tmp_path / "stop").touch()
        return true(self)

    monkeypatch.setattr(loop._Trainer, "_step", step)
    train(run)
    assert step_of(tmp_path, "inpainting") == 2
    assert not (tmp_path / "joint.state").exists()


def test_a_signal_ends_the_run_after_the_step_and_handlers_come_back(data, tmp_path, monkeypatch):
    run = run_of(data, tmp_path, 50)
    before = signal.getsignal(signal.SIGTERM)
    true = loop._Trainer._step

    def step(self):
        signal.raise_signal(signal.SIGTERM)
        return true(self)

    monkeypatch.setattr(loop._Trainer, "_step", step)
    train(run)
    assert step_of(tmp_path, "inpainting") == 1
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("bad", "raises"), [((0, 1, 2), True), ((0, 1, 3, 4), False)])
def test_three_bad_steps_in_a_row_end_the_run(bad, raises, data, tmp_path, monkeypatch):
    run = run_of(data, tmp_path, 6)
    true = loop._Trainer._loss

    def loss_of(self, draw):
        loss, logs = true(self, draw)
        return (loss * math.nan if self.state.step in bad else loss), logs

    monkeypatch.setattr(loop._Trainer, "_loss", loss_of)
    trainer = loop._Trainer(run, RECIPE.stages[0])
    if raises:
        with pytest.raises(TrainingError, match="3 steps in a row"):
            trainer.run(StopAfter(6))
    else:
        trainer.run(StopAfter(6))
        assert trainer.state.skipped == len(bad)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())


def test_an_unknown_stage_is_refused(data, tmp_path):
    with pytest.raises(TrainingError, match="polish"):
        train(run_of(data, tmp_path, 1), ("polish",))


def test_nothing_trained_is_no_checkpoint(data, tmp_path):
    with pytest.raises(TrainingError, match="0 of 3"):
        finish(run_of(data, tmp_path, 1), threads=1)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="0 pictures"):
        train(run_of(tmp_path / "empty", tmp_path / "run", 1))


def test_the_log_holds_a_line_per_interval(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 2)
    run = run_of(data, tmp_path, 50)
    loop._Trainer(run, RECIPE.stages[0]).run(StopAfter(4))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(math.isfinite(line["loss"]) and line["rate"] > 0 for line in lines)
