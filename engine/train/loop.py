"""A training run in one process: stage after stage, resumable at any moment.

A run is a folder: `<stage>.state` (everything needed to go on), `<stage>.safetensors` (the averaged weights so far),
`log.jsonl`. A file named `stop` in it, SIGTERM or SIGINT end the run after the current step. Deliberately absent:
Ray, more than one process, adversarial training.
"""

import json
import logging
import math
import platform
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from engine.errors import TrainingError
from engine.models.card import Card, Value
from engine.models.checkpoint import save
from engine.models.cra_srgan.generator import CraSrgan
from engine.train.checkpoints import RunState, load_state, save_state
from engine.train.dataset import Pictures, damaged_batch, scale_batch
from engine.train.recipes import Recipe
from engine.train.stages import Draw, Stage
from engine.train.step import Logs, coarse_loss, inpainting_loss, joint_loss, super_resolution_loss

log = logging.getLogger(__name__)

SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50
MAX_BAD_STEPS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Where a recipe runs and with what."""

    recipe: Recipe
    data: Path
    """Folder of training pictures; `photos` and `scenes` below it are told apart where they exist."""
    folder: Path
    budget_s: float
    data_licence: str
    """Of the pictures; goes on the card."""
    device: str = "cpu"
    start_from: Path | None = None
    """Weights (safetensors) that the first stage starts from."""


def train(run: Run, stages: tuple[str, ...] = ()) -> Path:
    """Run or resume the recipe's stages (or only those named); the path of the last weights."""
    run.folder.mkdir(parents=True, exist_ok=True)
    names = [stage.name for stage in run.recipe.stages]
    unknown = sorted(set(stages) - set(names))
    if unknown:
        raise TrainingError(
            f"stage {unknown[0]!r} is not among the {len(names)} of {run.recipe.name}: {', '.join(names)}"
        )
    weights = run.folder / f"{names[-1]}.safetensors"
    with _stop_flag(run.folder / "stop") as stopped:
        for stage in run.recipe.stages:
            if stages and stage.name not in stages:
                continue
            weights = _Trainer(run, stage).run(stopped)
            if stopped():
                break
    return weights


@contextmanager
def _stop_flag(stop_file: Path) -> Generator["_Stop"]:
    stop = _Stop(stop_file)
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False

    def on_signal(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or self._file.exists()


class _Trainer:
    """One stage of one run."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run_spec, self.stage = run, stage
        recipe = run.recipe
        torch.manual_seed(recipe.seed)  # pyright: ignore[reportUnknownMemberType]
        torch.set_flush_denormal(True)  # gradients fade out of known regions: denormals make a step four times as long
        self.device = torch.device(run.device)
        self.precision = autocast_precision(run.device)
        self.network = CraSrgan(recipe.model, padding="same").on(self.device)
        self._start_weights()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trains))
        self.optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0.0)
        self.state = load_state(self._path("state")) or RunState()
        if self.state.step:
            self.network.load_state_dict(self.state.weights)
            self.optimiser.load_state_dict(self.state.optimiser)
        else:
            self.state.ema = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.pictures = _pictures(run.data, stage)
        self.budget_s = run.budget_s * stage.budget_share

    def _path(self, suffix: str) -> Path:
        return self.run_spec.folder / f"{self.stage.name}.{suffix}"

    def _start_weights(self) -> None:
        """What the stages before this one trained, each taken from its own file."""
        sources: list[tuple[Path, tuple[str, ...]]] = []
        if self.run_spec.start_from is not None:
            sources.append((self.run_spec.start_from, ("",)))
        for earlier in self.run_spec.recipe.stages:
            if earlier.name == self.stage.name:
                break
            sources.append((self.run_spec.folder / f"{earlier.name}.safetensors", earlier.trains))
        for path, prefixes in sources:
            if path.exists():
                found = {k: v.float() for k, v in load_file(path).items() if k.startswith(prefixes)}
                self.network.load_state_dict(found, strict=False)

    def _groups(self) -> list[dict[str, object]]:
        stage = self.stage
        named = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        guide = [p for n, p in named if n.startswith("guide.")]
        rest = [p for n, p in named if not n.startswith("guide.")]
        rate = stage.learning_rate
        groups: list[dict[str, object]] = [{"params": rest, "factor": 1.0, "lr": rate}]
        if guide:
            groups.append({"params": guide, "factor": stage.guide_rate_factor, "lr": rate})
        return groups

    def run(self, stopped: "_Stop") -> Path:
        """Steps until the budget is spent or a stop is asked for."""
        saved_at = started = time.monotonic()
        before_s = self.state.seconds
        bad = 0
        while self.state.seconds < self.budget_s and not stopped():
            loss, logs = self._step()
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad >= MAX_BAD_STEPS:
                raise TrainingError(
                    f"{self.stage.name}: {bad} steps in a row were not finite (limit {MAX_BAD_STEPS}) at step "
                    f"{self.state.step}; lower the learning rate and resume from the last state"
                )
            now = time.monotonic()
            self.state.seconds = before_s + now - started
            self.state.step += 1
            if self.state.step % LOG_EVERY_STEPS == 0:
                self._log(loss, logs)
            if now - saved_at > SAVE_EVERY_S:
                self._save()
                saved_at = now
        self._save()
        return self._path("safetensors")

    def _step(self) -> tuple[float, Logs]:
        draw = self._draw()
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, logs = self._loss(draw)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run_spec.recipe.clip_norm)
        if not bool(torch.isfinite(norm)):
            self.state.skipped += 1
            return math.nan, logs
        self.optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        self._average()
        return float(loss.detach()), logs

    def _draw(self) -> Draw:
        rng = np.random.default_rng((self.run_spec.recipe.seed, _stage_seed(self.stage), self.state.step, 1))
        draws = self.stage.draws
        return draws[int(rng.choice(len(draws), p=[draw.probability for draw in draws]))]

    def _loss(self, draw: Draw) -> tuple[Tensor, Logs]:
        seed = (self.run_spec.recipe.seed, _stage_seed(self.stage), self.state.step)
        stage = self.stage
        if draw.factor == 0:
            scale = scale_batch(self.pictures, seed=seed, batch=draw.batch, low_px=draw.side_px, levels=draw.levels).to(
                self.device
            )
            return super_resolution_loss(self.network, scale, stage.losses)
        damaged = damaged_batch(
            self.pictures,
            seed=seed,
            batch=draw.batch,
            guide_px=draw.side_px,
            factor=draw.factor,
            window_px=stage.window_px,
            levels=draw.levels,
        ).to(self.device)
        loss = {"coarse": coarse_loss, "inpainting": inpainting_loss, "joint": joint_loss}[stage.task]
        return loss(self.network, damaged, stage.losses, stage.window_px)

    def _rate(self) -> float:
        """Cosine to 1 % of the peak over the stage's wall clock, after a linear warm-up in steps."""
        warm = min(1.0, (self.state.step + 1) / self.run_spec.recipe.warmup_steps)
        done = min(1.0, self.state.seconds / self.budget_s)
        return self.stage.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.run_spec.recipe.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                self.state.ema[name].lerp_(parameter.detach(), 1 - decay)

    def _log(self, loss: float, logs: Logs) -> None:
        state = self.state
        entry = {
            "stage": self.stage.name,
            "step": state.step,
            "seconds": round(state.seconds, 1),
            "loss": loss,
            "rate": self._rate(),
            "skipped": state.skipped,
        } | logs
        with (self.run_spec.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        left_s = self.budget_s - state.seconds
        log.info("%s step %d loss %.4f, %.0f s left", self.stage.name, state.step, loss, left_s)

    def _save(self) -> None:
        self.state.weights = dict(self.network.state_dict())
        self.state.optimiser = self.optimiser.state_dict()
        save_state(self._path("state"), self.state)
        partial = self._path("safetensors.partial")
        save_file({name: value.half().contiguous() for name, value in self.state.ema.items()}, partial)
        partial.replace(self._path("safetensors"))


def finish(run: Run, *, threads: int) -> Card:
    """Join what the stages have trained so far into one checkpoint, `<recipe>.safetensors`, with its card."""
    recipe = run.recipe
    weights: dict[str, Tensor] = {}
    history: dict[str, Value] = {}
    for stage in recipe.stages:
        path = run.folder / f"{stage.name}.safetensors"
        if not path.exists():
            continue
        found = load_file(path)
        weights |= found if not weights else {k: v for k, v in found.items() if k.startswith(stage.trains)}
        state = load_state(run.folder / f"{stage.name}.state")
        if state is not None:
            history[stage.name] = {
                "steps": state.step,
                "seconds": round(state.seconds),
                "skipped_steps": state.skipped,
            }
    if not weights:
        raise TrainingError(f"{run.folder}: 0 of {len(recipe.stages)} stages have weights; train one first")
    training: dict[str, Value] = {
        "data": {
            "pictures": {
                stage.name: len(_pictures(run.data, stage)) for stage in recipe.stages if stage.name in history
            },
            "licence": run.data_licence,
        },
        "recipe": recipe.name,
        "seed": recipe.seed,
        "stages": history,
        "hardware": f"{platform.machine()} CPU, {threads} thread(s) per stage" if run.device == "cpu" else run.device,
        "precision": f"{autocast_precision(run.device)} products, fp32 weights",
        "torch": torch.__version__,
    }
    path = run.folder / f"{recipe.name}.safetensors"
    return save(
        path,
        weights,
        config=recipe.model,
        name=recipe.name,
        degradation=recipe.degradation,
        licence="Apache-2.0",
        training=training,
        numbers={},
    )


def _pictures(data: Path, stage: Stage) -> Pictures:
    """Whole compositions and detail for holes, detail alone for super-resolution."""
    photos, scenes = data / "photos", data / "scenes"
    widest_px = max(draw.side_px * max(draw.factor, 1) << draw.levels for draw in stage.draws)
    if not photos.is_dir():
        return Pictures([data], min_side_px=widest_px)
    folders = [photos] if stage.task == "super-resolution" or not scenes.is_dir() else [photos, scenes]
    return Pictures(folders, min_side_px=widest_px)


def autocast_precision(device: str) -> str:
    """`bf16` where the device multiplies it in hardware, else `fp32`: emulated bf16 takes nearly twice as long."""
    if device != "cpu":
        return "bf16"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def _stage_seed(stage: Stage) -> int:
    """A number that keeps the stages' samples apart."""
    return sum(stage.name.encode())
