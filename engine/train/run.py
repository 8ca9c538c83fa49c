"""A training run in one process: stage after stage, resumable at any moment.

A run is a folder: the states of `engine.train.checkpoints`, `log.jsonl`, `sheets/` of fixed crops, events for
TensorBoard where it is installed. A file named `stop` in it, SIGTERM or SIGINT end the run after the current step.
"""

import hashlib
import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.geometry import ceil_div
from engine.memory import available_memory, return_freed_memory
from engine.models.card import Card, Value, read_card
from engine.models.card import find as find_model
from engine.models.checkpoint import load, read_weights, save
from engine.models.cra_srgan.generator import CraSrgan
from engine.objects import Place
from engine.store import storage_errors, write_atomic
from engine.train.checkpoints import STOP, State, load_state, save_state
from engine.train.dataset import MOST_DECODED_BYTES, Batch, Pictures, batch_from, batch_of
from engine.train.discriminator import Vgg19
from engine.train.overlays import Overlays
from engine.train.recipes import Recipe
from engine.train.sources import Encoded, find
from engine.train.stages import Stage
from engine.train.step import Logs
from engine.train.trainer import Trainer, Wrap, averages_of

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
    licence: str | None = None
    """Of the weights; that of the pictures where none is given."""
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
        counts = [self.num_steps(stage) for stage in stages]
        shares = [max(1, round(steps * count / sum(counts))) for count in counts]
        shorter = tuple(replace(stage, steps=share, epochs=0) for stage, share in zip(stages, shares, strict=True))
        return replace(self, recipe=replace(self.recipe, stages=shorter))

    def num_steps(self, stage: Stage) -> int:
        return stage.steps or stage.num_steps(len(self.pictures(stage)))

    def pictures(self, stage: Stage, *, most_bytes: int = MOST_DECODED_BYTES) -> Pictures:
        """Whole compositions and detail for holes alone, detail wherever it is enlarged."""
        found = find(self.data)
        films = [one for one in found if one.name.startswith("film_damage/")]
        return Pictures(self._chosen(found, stage), overlays=Overlays(films), most_bytes=most_bytes)

    @staticmethod
    def _chosen(found: list[Encoded], stage: Stage) -> list[Encoded]:
        photos, scenes = ([one for one in found if one.name.startswith(f"{name}/")] for name in ("photos", "scenes"))
        if not photos:
            return [one for one in found if not one.name.startswith("film_damage/")]
        return photos if any(draw.levels for draw in stage.draws) else photos + scenes

    def check(self, stages: tuple[str, ...] = ()) -> None:
        """Raises TrainingError or ModelError where the stages (all, if none are named) could not come to their end."""
        names = [stage.name for stage in self.recipe.stages]
        unknown = sorted(set(stages) - set(names))
        if unknown:
            raise TrainingError(
                f"stage {unknown[0]!r} is not among the {len(names)} of {self.recipe.name}: {', '.join(names)}"
            )
        if self.recipe.continues and self.start_from is None:
            raise TrainingError(f"{self.recipe.name} goes on from 1 other model, 0 are given; give --start-from")
        chosen = [stage for stage in self.recipe.stages if not stages or stage.name in stages]
        for stage in chosen:
            stage.check(vgg19=self.vgg19 is not None, teacher=self.teacher is not None)
        if all(newest_state(self, stage).step == 0 for stage in self.recipe.stages):  # or they have been looked at
            found = find(self.data)
            sides_px = _short_sides_px(found)
            for stage in chosen:
                Pictures(self._chosen(found, stage))
                most_px = max(sides_px[one.name] for one in self._chosen(found, stage))
                if most_px < stage.widest_px:
                    raise TrainingError(
                        f"stage {stage.name} takes crops of {stage.widest_px} px, the largest of its training pictures "
                        f"has {most_px} px on its shorter side; give larger ones, or a recipe with smaller crops"
                    )


@dataclass(frozen=True, slots=True)
class Part:
    """Of several processes that train together, one; alone by default."""

    rank: int = 0
    world: int = 1
    wrap: Wrap | None = None
    told: Callable[[Logs], None] = lambda _: None
    """Hears of every step."""
    any_of_all: Callable[[bool], bool] = lambda mine: mine
    """Whether one of the processes says so; all of them ask at the same moment."""


def train(run: Run, stages: tuple[str, ...] = (), *, part: Part | None = None, batches: Batches | None = None) -> None:
    """Runs or resumes the stages (or only those named).

    `batches`: where they come from, if not from pictures in memory. Raises TrainingError, ModelError, StorageError.
    """
    part = part or Part()
    if run.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "1 CUDA device is needed and torch sees 0; install a driver and its torch, or leave out --device"
        )
    if batches is None:  # or whoever makes them has done so
        run.check(stages)
    with stop_flag(run.folder) as asked:

        def stopped() -> bool:
            return part.any_of_all(asked())

        for stage in run.recipe.stages:
            if not stages or stage.name in stages:
                _Stage(run, stage, part, batches).train(stopped)
                if stopped():
                    break


def unfinished(run: Run, stages: tuple[str, ...] = ()) -> str | None:
    """Where the first of the stages (all, if none are named) is that has not come to its end."""
    for stage in run.recipe.stages:
        step, last = newest_state(run, stage).step, run.num_steps(stage)
        if step < last and (not stages or stage.name in stages):
            return f"{stage.name} is at step {step} of {last}"
    return None


def _short_sides_px(found: list[Encoded]) -> dict[str, int]:
    """Of each picture. Raises TrainingError where one cannot be decoded."""
    log.info("looking at %d pictures", len(found))
    with ThreadPoolExecutor() as pool:  # OpenCV decodes without the interpreter's lock
        return dict(zip((one.name for one in found), pool.map(_short_side_px, found), strict=True))


def _short_side_px(one: Encoded) -> int:
    return min(one.decode(cv2.IMREAD_UNCHANGED).shape[:2])


class _Stage:
    """One stage of a run, from wherever it is to its end."""

    def __init__(self, run: Run, stage: Stage, part: Part, batches: Batches | None) -> None:
        self.run, self.stage, self.part = run, stage, part
        self.pictures = run.pictures(stage)
        num_steps = stage.num_steps(len(self.pictures))
        compares = stage.losses.needs_features and stage.features == "vgg19"
        vgg19 = Vgg19(run.vgg19).to(run.device) if compares and run.vgg19 is not None else None
        self.trainer = Trainer(
            run.recipe,
            stage,
            num_steps,
            device=run.device,
            precision=autocast_precision(run.device),
            start=_trained(run, before=stage),
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
        self._check_memory()
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

    def _check_memory(self) -> None:
        """Raises TrainingError where a step would not fit: what one crop holds tells of a batch."""
        held: dict[int, int] = {}
        for draw in self.stage.draws:
            size = ceil_div(draw.batch, self.part.world)
            one = batch_from(self.pictures, self.stage, draw, seed=(VALIDATION_SEED,), size=1)
            held[size * self.trainer.held_bytes(one)] = size
        needed, size = max(held.items())
        if self.run.device == "cpu":
            return_freed_memory()
            free = available_memory()
        else:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
        if free is not None and needed > free:
            raise TrainingError(
                f"a step of stage {self.stage.name} on {size} crops holds {needed:,} bytes, {free:,} are free; "
                "give --recompute or more --workers on other machines, or a recipe with smaller draws"
            )

    def _save(self, *, validate: bool) -> None:
        """A sheet and a state; at the beginning and the end of a stage its loss on a fixed set, too.

        The state comes last: what it follows is there.
        """
        if self.part.rank != 0:
            return
        trainer, folder = self.trainer, self.run.folder
        batches = [
            batch_of(self.pictures, self.stage, seed=VALIDATION_SEED, step=number)
            for number in range(VALIDATION_BATCHES if validate else 1)
        ]
        found = [trainer.look(batch) for batch in batches]
        pairs = [(made[i], wanted[i]) for one in found for made, wanted in one.pairs[-1:] for i in range(len(made))]
        _, png = cv2.imencode(".png", sheet(pairs[:SHEET_PICTURES]))
        write_atomic(folder / "sheets" / f"{self.stage.name}-{trainer.state.step:08d}.png", png.tobytes())
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
            last = self.trainer.num_steps
            left_s = (last - state.step) * state.seconds / state.step
            told = self.stage.name, state.step, last, logs["loss"], left_s
            log.info("%s step %d of %d, loss %.4f, %.0f s left", *told)

    def _write(self, entry: dict[str, float]) -> None:
        state = self.trainer.state
        line = {"stage": self.stage.name, "step": state.step, "seconds": round(state.seconds, 1), **entry}
        path = self.run.folder / "log.jsonl"
        with storage_errors(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.events is not None:
            for name, value in entry.items():
                self.events.add_scalar(f"{self.stage.name}/{name}", value, state.step)


def sheet(pairs: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
    """(H, W, 3) BGR: pictures (3, h, w) that were made, above those that were wanted, side by side."""
    columns: list[np.ndarray] = []
    for made, wanted in pairs:
        column = torch.cat([made, wanted], 1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
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
def stop_flag(folder: Path) -> Generator[Callable[[], bool]]:
    """Whether a run has been asked to end, by a signal to this process or by its file."""
    signalled: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signalled.append(number)
        signal.signal(number, before[number])  # a second one ends the process

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread, where nobody sends signals
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, on_signal)
    try:
        yield lambda: bool(signalled) or (folder / STOP).exists()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _teacher(model: str) -> CraSrgan:
    """Padded as the student is while it is trained."""
    checkpoint = load(model)
    network = CraSrgan(checkpoint.card.sizes, padding="same")
    network.load_state_dict(checkpoint.network.state_dict())
    return network.eval().requires_grad_(requires_grad=False)


def _trained(run: Run, *, before: Stage | None = None) -> dict[str, Tensor]:
    """The averaged weights of the stages so far, or of those before one: what each trained, and the rest as the first
    of them has it; or else those to start from."""
    found: dict[str, Tensor] = {}
    for stage in run.recipe.stages:
        if before is not None and stage.name == before.name:
            break
        own = averages_of(newest_state(run, stage))
        found |= own if not found else {name: value for name, value in own.items() if name.startswith(stage.trains)}
    if not found and before is not None and run.start_from is not None:
        found = read_weights(run.start_from)
    return {name: value.float() for name, value in found.items()}


def finish(run: Run, *, threads: int, workers: str = "1") -> Card:
    """Join what the stages have trained so far into one checkpoint, `<recipe>.safetensors`, with its card."""
    recipe = run.recipe
    weights = _trained(run)
    history: dict[str, Value] = {
        stage.name: {
            "steps": state.step,
            "seconds": round(state.seconds),
            "skipped_steps": state.skipped,
            "pictures": len(run.pictures(stage)),
        }
        for stage in recipe.stages
        if (state := newest_state(run, stage)).tensors
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
        "hardware": hardware if workers == "1" else f"{workers} workers, each {hardware}",
        "precision": f"{autocast_precision(run.device)} products, fp32 weights",
        "torch": torch.__version__,
    }
    return save(
        run.folder / f"{recipe.name}.safetensors",
        weights,
        config=recipe.model,
        name=recipe.name,
        degradation=recipe.degradation,
        licence=run.licence or run.data_licence,
        training=training,
        numbers={},
        trained_from=run.start_from,
    )


def newest_state(run: Run, stage: Stage) -> State:
    """Where a stage is; at its beginning where it has no state."""
    return load_state(run.folder, stage.name, of=fingerprint(run, stage, run.num_steps(stage))) or State()


def fingerprint(run: Run, stage: Stage, num_steps: int) -> str:
    """Tells runs apart whose states must not be mixed."""
    given = [None if model is None else read_card(find_model(model)).sha256 for model in (run.start_from, run.teacher)]
    return hashlib.sha256(repr((run.recipe, stage.name, num_steps, given)).encode()).hexdigest()[:16]


def autocast_precision(device: str) -> str:
    """`bf16` where the device multiplies it in hardware, else `fp32`: emulated bf16 takes nearly twice as long."""
    if device != "cpu":
        return "bf16"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"
