"""A run goes on as if nothing had happened, stops when asked, and ends in a checkpoint that the engine loads."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import TrainingError
from engine.models.card import read_card
from engine.models.checkpoint import load
from engine.models.cra_srgan.generator import CraSrgan
from engine.train import run as running
from engine.train.checkpoints import State
from engine.train.dataset import Batch, ScaleBatch, batch_of
from engine.train.losses import l1
from engine.train.recipes import RECIPES, Recipe
from engine.train.run import Part, Run, finish, newest_state, train, unfinished
from engine.train.stages import GLOBAL, LOCAL, Draw, LossWeights, Stage
from engine.train.step import super_resolution_loss
from engine.train.trainer import Trainer, averages_of
from tests.networks import TINY, random_checkpoint
from tests.train.conftest import soft_noise

PLAIN = LossWeights(pixel=1.0)
FULL = LossWeights(pixel=1.0, hole=0.1, edge=0.1, frequency=0.1, perceptual=0.1, style=0.1, adversarial=0.01)


def stage(name: str, task: str, trains: tuple[str, ...], *draws: Draw, losses: LossWeights = PLAIN) -> Stage:
    return Stage(name, task, trains, 2e-3, draws, losses, steps=6, window_px=16)  # type: ignore[arg-type]


RECIPE = Recipe(
    name="tiny",
    model=TINY,
    warmup_steps=2,
    stages=(
        stage("inpainting", "inpainting", GLOBAL, Draw(0.5, 1, 16, factor=1), Draw(0.5, 1, 16, factor=2)),
        stage("super-resolution", "super-resolution", LOCAL, Draw(1.0, 1, 16, levels=1)),
        stage("joint", "joint", ("",), Draw(0.5, 1, 16, factor=1, levels=1), Draw(0.5, 1, 16, levels=1), losses=FULL),
    ),
)
STAGES = pytest.mark.parametrize("chosen", RECIPE.stages, ids=[one.name for one in RECIPE.stages])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_of(data: Path, folder: Path, **options: object) -> Run:
    return Run(RECIPE, data, folder, "CC0", **options)  # type: ignore[arg-type]


class StopAfter:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def on(run: Run, chosen: Stage, steps: int = 1000) -> State:
    """Goes on with a stage for so many steps; its state on the disk."""
    running._Stage(run, chosen, Part(), None).train(StopAfter(steps))
    return newest_state(run, chosen)


def same(one: State, other: State) -> bool:
    told = [(state.step, state.skipped, state.bad) for state in (one, other)]
    return (
        told[0] == told[1]
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    )


@STAGES
def test_a_stage_that_went_on_equals_an_undisturbed_one(chosen, data, tmp_path):
    whole, parts = run_of(data, tmp_path / "whole"), run_of(data, tmp_path / "parts")
    undisturbed = on(whole, chosen)
    for steps in (2, 1):
        assert not same(on(parts, chosen, steps), undisturbed)
    assert same(on(parts, chosen), undisturbed)
    assert undisturbed.step == 6
    prefixes = {name.partition(".")[0] for name in undisturbed.tensors}
    wanted = {"network", "average", "optimiser"}
    assert prefixes == (wanted | {"critic", "critic_optimiser"} if chosen.losses.adversarial else wanted)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
from tests.train.test_run import run_of
from engine.train import run as running
torch.set_num_threads(1)
running.SAVE_EVERY_S = 0.0
run, dies_at = run_of(Path(sys.argv[1]), Path(sys.argv[2])), int(sys.argv[3])
done = 0
def told(logs):
    global done
    done += 1
    if done == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
running.train(run, part=running.Part(told=told))
"""


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Run:
    """A run that nobody disturbed."""
    run = run_of(data, tmp_path_factory.mktemp("whole"))
    train(run)
    return run


@pytest.mark.parametrize("dies_at", [1, 4, 8, 13, 17])
def test_killed_across_the_stages_a_run_ends_the_same(dies_at, whole, data, tmp_path):
    program = KILLED.format(repository=str(Path(__file__).resolve().parents[2]))
    for number in (dies_at, 1000):
        command = [sys.executable, "-c", program, str(data), str(tmp_path / "killed"), str(number)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == (-signal.SIGKILL if number == dies_at else 0), ended.stderr
    for chosen in RECIPE.stages:
        found = newest_state(run_of(data, tmp_path / "killed"), chosen)
        assert same(newest_state(whole, chosen), found), chosen.name


@STAGES
def test_a_stage_changes_only_what_it_trains(chosen, data, tmp_path):
    run = run_of(data, tmp_path)
    trainer = running._Stage(run, chosen, Part(), None).trainer
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    for step in range(3):
        trainer.advance(batch_of(run.pictures(chosen), chosen, seed=1, step=step))
    changed = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(chosen.trains) for name in changed)
    averaged = {name for name, value in trainer.averages.items() if not torch.equal(value, before[name])}
    assert averaged <= changed


def kept_bytes(run: Run, chosen: Stage) -> tuple[int, list[torch.Tensor]]:
    """What a step holds for its way back, and the gradients that it finds."""
    trainer = running._Stage(run, chosen, Part(), None).trainer
    batch = batch_of(run.pictures(chosen), chosen, seed=1, step=0)
    held = trainer.held_bytes(batch)
    trainer._found(batch).loss.backward()
    return held, [p.grad for p in trainer.network.parameters() if p.grad is not None]


@STAGES
def test_recomputing_holds_less_and_finds_the_same(chosen, data, tmp_path):
    (much, wanted), (little, found) = (
        kept_bytes(run_of(data, tmp_path, recompute=recompute), chosen) for recompute in (False, True)
    )
    assert little < much
    assert len(found) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_looking_changes_nothing(data, tmp_path):
    run, chosen = run_of(data, tmp_path), RECIPE.stages[2]
    trainer = running._Stage(run, chosen, Part(), None).trainer
    trainer.advance(batch_of(run.pictures(chosen), chosen, seed=1, step=0))
    before = trainer.saved()
    trainer.look(batch_of(run.pictures(chosen), chosen, seed=1, step=1))
    assert same(trainer.saved(), before)


def test_a_whole_run_ends_in_a_checkpoint_that_loads(data, tmp_path):
    run = run_of(data, tmp_path)
    assert unfinished(run) == "inpainting is at step 0 of 6"
    train(run)
    assert unfinished(run) is None
    card = finish(run, threads=1)
    loaded = load(str(tmp_path / "tiny.safetensors"))
    assert loaded.card == card
    assert loaded.card.config == TINY
    assert card.training["data"]["licence"] == "CC0"
    assert {name: entry["steps"] for name, entry in card.training["stages"].items()} == {
        s.name: 6 for s in RECIPE.stages
    }
    stored, joint = load_file(tmp_path / "tiny.safetensors"), trained(run, RECIPE.stages[2])
    assert all(torch.equal(stored[name], value.half()) for name, value in joint.items())  # it trained everything
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    train(run)  # a finished run trains nothing again
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    sheet = cv2.imread(str(tmp_path / "sheets" / "joint-00000006.png"))
    assert sheet.shape[0] == 512
    validated = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "validation" in line]
    assert [(one["stage"], one["step"]) for one in validated] == [
        (s.name, step) for s in RECIPE.stages for step in (0, 6)
    ]


def trained(run: Run, chosen: Stage) -> dict[str, torch.Tensor]:
    """What a stage has made of the weights that are its own."""
    found = averages_of(newest_state(run, chosen))
    return {name: value for name, value in found.items() if name.startswith(chosen.trains)}


def test_a_stage_starts_from_what_the_others_trained(data, tmp_path):
    run = run_of(data, tmp_path)
    train(run, ("inpainting", "super-resolution"))
    joint = running._Stage(run, RECIPE.stages[2], Part(), None).trainer
    for chosen in RECIPE.stages[:2]:
        for name, value in trained(run, chosen).items():
            assert torch.equal(joint.network.state_dict()[name], value), name


def test_stages_that_were_left_out_are_joined_from_the_others(data, tmp_path):
    run = run_of(data, tmp_path)
    train(run, ("inpainting", "super-resolution"))
    finish(run, threads=1)
    stored = load_file(tmp_path / "tiny.safetensors")
    for chosen in RECIPE.stages[:2]:
        for name, value in trained(run, chosen).items():
            assert torch.equal(stored[name], value.half()), name


@pytest.mark.parametrize("how", ["file", "signal"])
def test_a_run_ends_after_the_step_when_asked(how, data, tmp_path):
    run = run_of(data, tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def told(_: object) -> None:
        if how == "file":
            (tmp_path / "stop").touch()
        else:
            signal.raise_signal(signal.SIGTERM)

    train(run, part=Part(told=told))
    assert newest_state(run, RECIPE.stages[0]).step == 1
    assert not list(tmp_path.glob("super-resolution*"))
    assert signal.getsignal(signal.SIGTERM) == before


def harmed(batch: Batch, how: str) -> Batch:
    assert isinstance(batch, ScaleBatch)
    low = batch.low.clone()
    low[0, 0, 3, 3] = {"nan": math.nan, "inf": math.inf}[how]
    return ScaleBatch(low, batch.levels)


@pytest.mark.parametrize("pixel_loss", ["l1", "charbonnier"])
def test_a_loss_that_is_not_finite_is_skipped_whatever_its_slope(pixel_loss, data, tmp_path):
    """The slope of |x| is 0 where x is not a number."""
    run, chosen = run_of(data, tmp_path), replace(RECIPE.stages[1], pixel_loss=pixel_loss)
    trainer = running._Stage(run, chosen, Part(), None).trainer
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    batch = batch_of(run.pictures(chosen), chosen, seed=1, step=0)
    assert isinstance(batch, ScaleBatch)
    batch.levels[0][0, 0, 3, 3] = math.nan
    trainer.advance(batch)
    assert (trainer.state.skipped, trainer.state.bad) == (1, 1)
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())


def test_steps_of_the_critic_that_are_not_finite_count(data, tmp_path):
    run, chosen = run_of(data, tmp_path), RECIPE.stages[2]
    trainer = running._Stage(run, chosen, Part(), None).trainer
    weight = next(iter(trainer.critic.parameters()))
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.nan)
    for step in range(2):
        trainer.advance(batch_of(run.pictures(chosen), chosen, seed=1, step=step))
    assert torch.equal(weight.detach(), before)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.advance(batch_of(run.pictures(chosen), chosen, seed=1, step=2))


def test_what_does_not_fit_into_memory_is_told_before_the_first_step(data, tmp_path, monkeypatch):
    run, told = run_of(data, tmp_path), []
    train(run, ("inpainting",), part=Part(told=told.append))
    monkeypatch.setattr(running, "available_memory", lambda: 10_000)
    with pytest.raises(TrainingError, match=r"super-resolution on 1 crops holds [\d,]+ bytes, 10,000 are free"):
        train(run, part=Part(told=told.append))
    assert len(told) == 6


def test_pictures_are_looked_at_before_the_first_step(data, tmp_path):
    small = cv2.imread(str(data / "a.png"))[:31]
    folder = tmp_path / "data"
    folder.mkdir()
    cv2.imwrite(str(folder / "small.png"), small)
    with pytest.raises(TrainingError, match=r"inpainting takes crops of 32 px, the largest .* has 31 px"):
        train(run_of(folder, tmp_path / "run"))
    (folder / "a.png").write_bytes((data / "a.png").read_bytes())
    (folder / "torn.png").write_bytes((data / "a.png").read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"torn\.png: cannot be decoded"):
        train(run_of(folder, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.state"))


def test_what_starts_from_nothing_of_its_kind_is_refused(data, tmp_path):
    with pytest.raises(TrainingError, match="goes on from 1 other model"):
        train(Run(replace(RECIPE, continues=True), data, tmp_path, "CC0"))
    with pytest.raises(TrainingError, match="0 of the 1 tensors"):
        Trainer(RECIPE, RECIPE.stages[1], 6, start={"something": torch.zeros(1)})


def test_states_from_other_weights_are_refused(data, tmp_path):
    one, other = (str(random_checkpoint(tmp_path / str(seed), TINY, seed=seed)) for seed in (1, 2))
    train(run_of(data, tmp_path / "run", start_from=one), ("inpainting",))
    with pytest.raises(TrainingError, match="another recipe"):
        train(run_of(data, tmp_path / "run", start_from=other))


@pytest.mark.parametrize("how", ["nan", "inf"])
@pytest.mark.parametrize(("bad", "raises"), [((0, 1, 2), True), ((0, 1, 3, 4), False)])
def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run(how, bad, raises, data, tmp_path):
    run, chosen = run_of(data, tmp_path), RECIPE.stages[1]
    trainer = running._Stage(run, chosen, Part(), None).trainer
    pictures = run.pictures(chosen)

    def go_on() -> None:
        for step in range(6):
            batch = batch_of(pictures, chosen, seed=1, step=step)
            trainer.advance(harmed(batch, how) if step in bad else batch)

    if raises:
        with pytest.raises(TrainingError, match="3 steps in a row"):
            go_on()
    else:
        go_on()
        assert trainer.state.skipped == len(bad)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())


def test_a_gradient_that_is_not_finite_is_skipped(data, tmp_path):
    run, chosen = run_of(data, tmp_path), RECIPE.stages[1]
    trainer = running._Stage(run, chosen, Part(), None).trainer
    weight = next(p for p in trainer.network.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    hook = weight.register_hook(lambda gradient: gradient * math.nan)
    trainer.advance(batch_of(run.pictures(chosen), chosen, seed=1, step=0))
    hook.remove()
    assert trainer.state.skipped == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())


def test_the_rate_rises_and_falls_with_the_steps():
    trainer = Trainer(RECIPE, RECIPE.stages[1], 100)
    rates = []
    for step in range(101):
        trainer.state.step = step
        rates.append(trainer.rate())
    assert max(rates) == pytest.approx(2e-3, rel=0.01)
    assert rates[0] == pytest.approx(1e-3, rel=0.01)
    assert rates[100] == pytest.approx(2e-5)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_state_of_another_recipe_is_refused(data, tmp_path):
    on(run_of(data, tmp_path), RECIPE.stages[0], 1)
    other = replace(RECIPE, seed=21)
    with pytest.raises(TrainingError, match="another recipe"):
        train(Run(other, data, tmp_path, "CC0"))


def test_an_unknown_stage_is_refused(data, tmp_path):
    with pytest.raises(TrainingError, match="polish"):
        train(run_of(data, tmp_path), ("polish",))


def test_nothing_trained_is_no_checkpoint(data, tmp_path):
    with pytest.raises(TrainingError, match="0 of 3"):
        finish(run_of(data, tmp_path), threads=1)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="0 training pictures"):
        train(run_of(tmp_path / "empty", tmp_path / "run"))


def test_features_of_nothing_trained_are_refused(data, tmp_path):
    lonely = replace(RECIPE.stages[1], losses=LossWeights(style=1.0))
    with pytest.raises(TrainingError, match="0 losses train it"):
        train(Run(replace(RECIPE, stages=(lonely,)), data, tmp_path, "CC0"))
    report = RECIPES["report"]()
    small = replace(report, model=TINY, stages=(replace(report.stages[1], steps=1),))
    with pytest.raises(TrainingError, match="give --features"):
        train(Run(small, data, tmp_path, "CC0"))


ABLATIONS = {
    "A: one size of patch": replace(RECIPE, model=replace(TINY, multi_scale=False)),
    "B: no fusion": replace(RECIPE, model=replace(TINY, fusion=False)),
    "C: no edges": replace(RECIPE, model=replace(TINY, edge=False)),
    "D: no frequencies": replace(RECIPE, model=replace(TINY, frequency=False)),
    "E: a single stage": replace(RECIPE, stages=RECIPE.stages[2:]),
    "F: other losses": RECIPE.without("adversarial", "style", "perceptual", "edge"),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_run_to_a_checkpoint(name, data, tmp_path):
    run = Run(ABLATIONS[name], data, tmp_path, "CC0").shortened(6)
    train(run)
    card = finish(run, threads=1)
    assert load(str(tmp_path / "tiny.safetensors")).card == card
    assert sum(entry["steps"] for entry in card.training["stages"].values()) == 6


def test_ablations_leave_losses_out():
    without = RECIPES["gan"]().without("adversarial", "style", "perceptual")
    (chosen,) = without.stages
    assert (chosen.losses.adversarial, chosen.losses.style, chosen.losses.needs_features) == (0.0, 0.0, False)
    assert chosen.losses.pixel == 1.0


def test_a_shorter_run_keeps_the_shares(data, tmp_path):
    shorter = Run(RECIPES["lite"](), data, tmp_path, "CC0").shortened(390)
    assert [one.steps for one in shorter.recipe.stages] == [120, 20, 50, 120, 80]


def test_the_command_line_trains_stops_and_goes_on(tmp_path):
    (tmp_path / "data").mkdir()
    cv2.imwrite(str(tmp_path / "data" / "a.png"), soft_noise(512, 512))
    command = [sys.executable, "-m", "engine.cli", "train", "--data", "data", "--data-licence", "CC0"]
    command += ["--out", "run", "--recipe", "lite", "--steps", "12", "--stage", "head"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as stopped:
        while not list((tmp_path / "run").glob("head-*.state")):
            assert stopped.poll() is None
            time.sleep(0.05)
        (tmp_path / "run" / "stop").touch()
        said, _ = stopped.communicate()
    assert stopped.returncode == 0
    assert "stopped: head is at step " in said
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "stopped" not in ended.stdout
    assert read_card(tmp_path / "run" / "lite.safetensors").training["stages"]["head"]["steps"] == 4


def taught(recipe: Recipe) -> Recipe:
    """Its enlargement alone, learnt from a teacher."""
    (enlarging,) = (one for one in recipe.stages if one.name == "super-resolution")
    return replace(recipe, stages=(replace(enlarging, losses=LossWeights(pixel=0.5, taught=0.5)),))


def test_a_student_learns_from_its_teacher(data, tmp_path):
    teacher = random_checkpoint(tmp_path, TINY, seed=3)
    run = Run(taught(RECIPE), data, tmp_path / "run", "CC0", teacher=str(teacher))
    train(run)
    entries = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    first, last = (one["validation"] for one in entries if "validation" in one)
    assert last < first
    assert finish(run, threads=1).training["teacher"] == load(str(teacher)).card.sha256


def test_what_the_teacher_says_is_a_loss_of_its_own(data, tmp_path):
    """The student that is its teacher pays nothing for it; beside another one each level counts."""
    one, other = (load(str(random_checkpoint(tmp_path, TINY, seed=seed))).network for seed in (1, 2))
    batch = batch_of(run_of(data, tmp_path).pictures(RECIPE.stages[1]), RECIPE.stages[1], seed=1, step=0)
    weights = LossWeights(pixel=0.0, taught=1.0)
    network = CraSrgan(TINY, padding="same")
    network.load_state_dict(one.state_dict())
    teachers = [CraSrgan(TINY, padding="same") for _ in range(2)]
    for teacher, source in zip(teachers, (one, other), strict=True):
        teacher.load_state_dict(source.state_dict())
    same, different = (super_resolution_loss(network, batch, weights, l1, teacher=teacher) for teacher in teachers)
    assert float(same.loss.detach()) == 0
    assert float(different.loss.detach()) > 0.01


def test_a_student_without_a_teacher_is_told(data, tmp_path):
    with pytest.raises(TrainingError, match="--teacher"):
        train(Run(taught(RECIPE), data, tmp_path, "CC0"))
