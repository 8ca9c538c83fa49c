# pyright: reportUnknownMemberType=false
"""Training on a Ray cluster: `engine.train.run` in several processes that share their gradients.

Ray Train starts the processes, and starts them again when one dies; each begins where the newest state on the disk that
all of them share is. The first of them writes.
"""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from engine.cluster import ray_cluster
from engine.errors import EngineError, TooFewCpus, TooFewGpus, TrainingError
from engine.models.card import embedded, find
from engine.train.checkpoints import STOP
from engine.train.ingest import TASK_CPUS, streamed
from engine.train.run import LOG_EVERY_STEPS, Part, Run, stop_flag, train
from engine.train.step import Logs

log = logging.getLogger(__name__)

FAILED = "failed"
"""In the folder of a run: what ended it, that would end it again."""
MOST_FAILURES = 10
"""Deaths of processes that a run survives."""
WORKER_CPUS = 0.5
"""Booked by each: what makes its batches needs a share, or all wait for ever."""
OBJECT_STORE_BYTES = 1 << 30


def train_on_ray(
    run: Run,
    stages: tuple[str, ...] = (),
    *,
    workers: int | tuple[int, int],
    address: str | None = None,
    threads: int = 1,
) -> None:
    """As `engine.train.run.train`, by so many processes, or between so many as the cluster has room for.

    The folder of the run is one that all nodes share. Raises TrainingError where it ended before its end, NoCluster,
    TooFewCpus and TooFewGpus.
    """
    run = _everywhere(run)
    run.check(stages)
    least, most = (workers, workers) if isinstance(workers, int) else workers
    gpu = run.device != "cpu"
    failed = run.folder / FAILED
    cpus = max(os.cpu_count() or 1, most + 1)
    with ray_cluster(address, num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES):
        failed.unlink(missing_ok=True)
        if address is None:  # others may grow
            _check_there("CPU", WORKER_CPUS * least + TASK_CPUS, TooFewCpus)
            _check_there("GPU", least if gpu else 0, TooFewGpus)
        trainer = TorchTrainer(
            _work,
            train_loop_config={"run": run, "stages": stages, "threads": threads},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if gpu else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            run_config=RunConfig(
                name="ray",
                storage_path=str(run.folder),
                failure_config=FailureConfig(max_failures=MOST_FAILURES),
            ),
        )
        try:
            _fit(trainer, run.folder)
        except ray.train.TrainingFailedError as error:
            if not failed.exists():
                raise TrainingError(
                    f"{run.folder}: the training ended before its end ({error}); run the command again"
                ) from error
        if failed.exists():
            raise TrainingError(failed.read_text())


def _everywhere(run: Run) -> Run:
    """The same with paths that mean the same in every process: Ray Train's work in folders of their own."""

    def at(model: str | None) -> str | None:
        return model if model is None or model in embedded() else str(find(model).resolve())

    return replace(
        run,
        folder=run.folder.resolve(),
        data=run.data.resolve() if isinstance(run.data, Path) else run.data,
        start_from=at(run.start_from),
        teacher=at(run.teacher),
        vgg19=None if run.vgg19 is None else run.vgg19.resolve(),
    )


def _check_there(kind: str, needed: float, error: type[TooFewCpus] | type[TooFewGpus]) -> None:
    """Ray would wait for ever, in silence."""
    there = float(cast("dict[str, float]", ray.cluster_resources()).get(kind, 0))
    if there < needed:
        raise error(f"the workers need {needed:g} of this machine's {kind}, it has {there:g}; give fewer --workers")


def _fit(trainer: TorchTrainer, folder: Path) -> None:
    """Waits for the end in the main thread, which gets the signals, and tells how far it is."""
    told = ""
    with stop_flag(folder) as stopped, ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(trainer.fit)
        while not fitting.done():
            wait([fitting], timeout=1.0)
            if stopped():
                (folder / STOP).touch()
            now = _newest_line(folder / "log.jsonl")
            if now != told:
                log.info("%s", now)
                told = now
        fitting.result()


def _newest_line(path: Path) -> str:
    """What a run's log says last of a loss."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = (json.loads(line) for line in reversed(lines) if line.endswith("\n") and '"loss"' in line)
    return next((f"{one['stage']} step {one['step']}, loss {one['loss']:.4f}" for one in entries), "")


def _work(config: dict[str, Any]) -> None:
    """What each process does."""
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    run = cast("Run", config["run"])
    if (run.folder / FAILED).exists():  # it would fail again
        return
    told = _Told()
    part = Part(rank, world, _parallel, told, _any_of_all) if world > 1 else Part(told=told)
    try:
        train(run, config["stages"], part=part, batches=partial(streamed, run, part))
    except EngineError as error:
        (run.folder / FAILED).write_text(str(error))
        raise  # so that the others do not wait for this one
    told.report()


def _any_of_all(mine: bool) -> bool:
    said = torch.tensor(float(mine), device=get_device())
    distributed.all_reduce(said, distributed.ReduceOp.MAX)
    return bool(said)


def _parallel(module: nn.Module) -> nn.Module:
    device = get_device()
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        broadcast_buffers=False,
    )


class _Told:
    """Reports to Ray Train, now and then: every process must, at the same steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._last: Logs = {}

    def __call__(self, logs: Logs) -> None:
        self._steps += 1
        self._last = logs
        if self._steps % LOG_EVERY_STEPS == 0:
            self.report()

    def report(self) -> None:
        ray.train.report({"steps": self._steps, **self._last})
