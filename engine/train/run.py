"""A training run in one process: stage after stage, resumable at any moment.

A run is a folder: the states and weights of `engine.train.checkpoints`, `log.jsonl`, `sheets/` of fixed crops, events
for TensorBoard where it is installed. A file named `stop` in it, SIGTERM or SIGINT end the run after the current step.
"""

import hashlib
import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from engine.errors import TrainingError
from engine.models.card import Card, Value
from engine.models.checkpoint import load, read_weights, save
from engine.models.cra_srgan.generator import CraSrgan
from engine.objects import Place
from engine.store import write_atomic
from engine.train.checkpoints import State, load_state, save_state, save_weights
from engine.train.dataset import Batch, Pictures, batch_of
from engine.train.discriminator import Vgg19
from engine.train.overlays import Overlays
from engine.train.recipes import Recipe
from engine.train.sources import find
from engine.train.stages import Stage
from engine.train.step import Logs
from engine.train.trainer import Trainer, Wrap

log = logging.getLogger(__name__)

SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50
VALIDATION_BATCHES = 4
VALIDATION_SEED = 7_000_001
SHEET_PICTURES = 4

Batches = Callable[[Stage, int, int], Iterable[Batch]]
"""The batches of a stage from a step up to, not including, another."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where a recipe runs and with what."""

    recipe: Recipe
    data: Place
    """Folder or prefix of training pictures; `photos`, `scenes` and `film_damage` (overlays) below are told apart."""
    folder: Path
    data_licence: str
    """Of the pictures; goes on the card."""
    device: str = "cpu"
    start_from: str | None = None
    """An embedded name or a file, whose weights the first stage starts from."""
    vgg19: Path | None = None
    """Its weights, where a stage compares its features."""
    teacher: str | None = None
    """An embedded name or a file, where a stage learns from a larger network."""
    recompute: bool = False
    """Gradient checkpointing: less memory, more time."""
    compiled: bool = False
    """By `torch.compile`."""

    def shortened(self, steps: int) -> "Run":
        """The same in so many steps."""
        stages = self.recipe.stages
        counts = [stage.num_steps(len(self.pictures(stage))) for stage in stages]
        shares = [max(1, round(steps * count / sum(counts))) for count in counts]
        shorter = tuple(replace(stage, steps=share, epochs=0) for stage, share in zip(stages, shares, strict=True))
        return replace(self, recipe=replace(self.recipe, stages=shorter))

    def pictures(self, stage: Stage) -> Pictures:
        """Whole compositions and detail for holes, detail alone for super-resolution."""
        widest_px = max(draw.side_px * max(draw.factor, 1) << draw.levels for draw in stage.draws)
        found = find(self.data)
        photos, scenes, films = (
            [one for one in found if one.name.startswith(f"{name}/")] for name in ("photos", "scenes", "film_damage")
        )
        if not photos:
            chosen = [one for one in found if not one.name.startswith("film_damage/")]
        else:
            chosen = photos if stage.task == "super-resolution" else photos + scenes
        return Pictures(chosen, min_side_px=widest_px, overlays=Overlays(films))


@dataclass(frozen=True, slots=True)
class Part:
    """Of several processes that train together, one; alone by default."""

    rank: int = 0
    world: int = 1
    wrap: Wrap | None = None
    told: Callable[[Logs], None] = lambda _: None
    """Hears of every step."""


def train(
    run: Run, stages: tuple[str, ...] = (), *, part: Part | None = None, batches: Batches | None = None
) -> Path | None:
    """Runs or resumes the stages (or only those named); the last weights, None where it was stopped before any.

    `batches`: where they come from, if not from pictures in memory. Raises TrainingError and StorageError.
    """
    part = part or Part()
    names = [stage.name for stage in run.recipe.stages]
    unknown = sorted(set(stages) - set(names))
    if unknown:
        raise TrainingError(
            f"stage {unknown[0]!r} is not among the {len(names)} of {run.recipe.name}: {', '.join(names)}"
        )
    last: Path | None = None
    with _stop_flag(run.folder / "stop") as stopped:
        for stage in run.recipe.stages:
            if not stages or stage.name in stages:
                _Stage(run, stage, part, batches).train(stopped)
                last = run.folder / f"{stage.name}.safetensors"
                if stopped():
                    break
    return last


class _Stage:
    """One stage of a run, from wherever it is to its end."""

    def __init__(self, run: Run, stage: Stage, part: Part, batches: Batches | None) -> None:
        self.run, self.stage, self.part = run, stage, part
        self.pictures = run.pictures(stage)
        num_steps = stage.num_steps(len(self.pictures))
        vgg19 = Vgg19(run.vgg19).to(run.device) if run.vgg19 is not None else None
        self.trainer = Trainer(
            run.recipe,
            stage,
            num_steps,
            device=run.device,
            precision=autocast_precision(run.device),
            start=_start_weights(run, stage),
            vgg19=vgg19,
            teacher=_teacher(run.teacher) if stage.losses.taught and run.teacher is not None else None,
            wrap=part.wrap,
            recompute=run.recompute,
            compiled=run.compiled,
        )
        self.of = fingerprint(run, stage, num_steps)
        self.events: Any = None
        state = load_state(run.folder, stage.name, of=self.of)
        self.resumed = state is not None
        if state is not None:
            self.trainer.restore(state)
        self.batches = batches or self._made

    def _made(self, stage: Stage, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            yield batch_of(
                self.pictures,
                stage,
                seed=self.run.recipe.seed,
                step=step,
                rank=self.part.rank,
                world=self.part.world,
            )

    def train(self, stopped: Callable[[], bool]) -> None:
        trainer = self.trainer
        started = saved_at = time.monotonic()
        before_s = trainer.state.seconds
        if trainer.state.step >= trainer.num_steps or stopped():
            return
        self.events = _events(self.run.folder) if self.part.rank == 0 else None
        if self.part.rank == 0:
            self._forget()
        if not self.resumed:
            self._save(validate=True)
        for batch in self.batches(self.stage, trainer.state.step, trainer.num_steps):
            logs = trainer.advance(batch)
            now = time.monotonic()
            trainer.state.seconds = before_s + now - started
            self.part.told(logs)
            if trainer.state.step % LOG_EVERY_STEPS == 0:
                self._log(logs)
            if now - saved_at > SAVE_EVERY_S:
                self._save(validate=False)
                saved_at = now
            if stopped():
                break
        self._save(validate=trainer.state.step >= trainer.num_steps)
        if self.events is not None:
            self.events.close()

    def _save(self, *, validate: bool) -> None:
        """A sheet, the weights, a state; at the beginning and the end of a stage its loss on a fixed set, too.

        The state comes last: what it follows is there.
        """
        if self.part.rank != 0:
            return
        trainer, folder = self.trainer, self.run.folder
        save_weights(folder / f"{self.stage.name}.safetensors", trainer.averages)
        batches = [
            batch_of(self.pictures, self.stage, seed=VALIDATION_SEED, step=number)
            for number in range(VALIDATION_BATCHES if validate else 1)
        ]
        found = [trainer.look(batch) for batch in batches]
        pairs = [pair for one in found for pair in one.pairs[-1:]]
        if pairs:
            path = folder / "sheets" / f"{self.stage.name}-{trainer.state.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), sheet(pairs[:SHEET_PICTURES]))
        if validate:
            self._write({"validation": float(np.mean([float(one.loss) for one in found]))})
        save_state(folder, self.stage.name, trainer.saved(), of=self.of)

    def _forget(self) -> None:
        """What is logged of steps that a dead process made, and that are made again."""
        path, last = self.run.folder / "log.jsonl", self.trainer.state.step if self.resumed else -1
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
            kept = [one for one in entries if one["stage"] != self.stage.name or one["step"] <= last]
            write_atomic(path, "".join(json.dumps(one) + "\n" for one in kept).encode())

    def _log(self, logs: Logs) -> None:
        if self.part.rank == 0:
            state = self.trainer.state
            self._write({"rate": self.trainer.rate(), "skipped": state.skipped, **logs})
            left = self.trainer.num_steps - state.step
            per_s = state.step / state.seconds if state.seconds else 0.0
            eta = f", {left / per_s:.0f} s left" if per_s else ""
            log.info("%s step %d of %d, loss %.4f%s", self.stage.name, state.step, state.step + left, logs["loss"], eta)

    def _write(self, entry: dict[str, float]) -> None:
        state = self.trainer.state
        line = {"stage": self.stage.name, "step": state.step, "seconds": round(state.seconds, 1), **entry}
        with (self.run.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.events is not None:
            for name, value in entry.items():
                self.events.add_scalar(f"{self.stage.name}/{name}", value, state.step)


def sheet(pairs: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
    """(H, W, 3) BGR: pictures that were made, above those that were wanted, side by side."""
    columns: list[np.ndarray] = []
    for made, wanted in pairs:
        column = torch.cat([made[0], wanted[0]], 1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        columns.append(cv2.resize(column, (256, 512), interpolation=cv2.INTER_NEAREST)[..., ::-1])
    return np.concatenate(columns, 1)


def _events(folder: Path) -> Any:  # noqa: ANN401
    """What writes for TensorBoard; None where it is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


@contextmanager
def _stop_flag(stop_file: Path) -> Generator[Callable[[], bool]]:
    signalled: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signalled.append(number)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread, where nobody sends signals
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, on_signal)
    try:
        yield lambda: bool(signalled) or stop_file.exists()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _teacher(model: str) -> CraSrgan:
    """Padded as the student is while it is trained."""
    checkpoint = load(model)
    network = CraSrgan(checkpoint.card.sizes, padding="same")
    network.load_state_dict(checkpoint.network.state_dict())
    return network.eval().requires_grad_(requires_grad=False)


def _start_weights(run: Run, stage: Stage) -> dict[str, Tensor]:
    """What the stages before this one trained, each taken from its own file."""
    found = {} if run.start_from is None else read_weights(run.start_from)
    for earlier in run.recipe.stages:
        if earlier.name == stage.name:
            break
        path = run.folder / f"{earlier.name}.safetensors"
        if path.exists():
            found |= {name: value for name, value in load_file(path).items() if name.startswith(earlier.trains)}
    return {name: value.float() for name, value in found.items()}


def finish(run: Run, *, threads: int, workers: int = 1) -> Card:
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
        state = newest_state(run, stage)
        history[stage.name] = {
            "steps": state.step,
            "seconds": round(state.seconds),
            "skipped_steps": state.skipped,
            "pictures": len(run.pictures(stage)),
        }
    if not weights:
        raise TrainingError(f"{run.folder}: 0 of {len(recipe.stages)} stages have weights; train one first")
    hardware = f"{platform.machine()} CPU, {threads} thread(s)" if run.device == "cpu" else run.device
    other: dict[str, Value] = {} if run.teacher is None else {"teacher": load(run.teacher).card.sha256}
    training: dict[str, Value] = {
        **other,
        "data": {"licence": run.data_licence},
        "recipe": recipe.name,
        "seed": recipe.seed,
        "stages": history,
        "hardware": hardware if workers == 1 else f"{workers} workers, each {hardware}",
        "precision": f"{autocast_precision(run.device)} products, fp32 weights",
        "torch": torch.__version__,
    }
    return save(
        run.folder / f"{recipe.name}.safetensors",
        weights,
        config=recipe.model,
        name=recipe.name,
        degradation=recipe.degradation,
        licence="Apache-2.0",
        training=training,
        numbers={},
        trained_from=run.start_from,
    )


def newest_state(run: Run, stage: Stage) -> State:
    """Where a stage is; at its beginning where it has no state."""
    num_steps = stage.num_steps(len(run.pictures(stage)))
    return load_state(run.folder, stage.name, of=fingerprint(run, stage, num_steps)) or State()


def fingerprint(run: Run, stage: Stage, num_steps: int) -> str:
    """Tells runs apart whose states must not be mixed."""
    return hashlib.sha256(repr((run.recipe, stage.name, num_steps)).encode()).hexdigest()[:16]


def autocast_precision(device: str) -> str:
    """`bf16` where the device multiplies it in hardware, else `fp32`: emulated bf16 takes nearly twice as long."""
    if device != "cpu":
        return "bf16"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"
