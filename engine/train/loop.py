# pyright: reportUnknownMemberType=false
"""Training on a Ray cluster: `engine.train.run` in several processes that share their gradients.

Ray Train starts the processes, and starts them again when one dies; each begins where the newest state on the disk that
all of them share is. The first of them writes.
"""

import logging
import os
from functools import partial
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import TrainingError
from engine.train.ingest import streamed
from engine.train.run import LOG_EVERY_STEPS, Part, Run, train
from engine.train.step import Logs

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

    The folder of the run is one that all nodes share. Raises TrainingError where it ended before its end.
    """
    options: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    if address is None:
        most = workers if isinstance(workers, int) else workers[1]
        options |= {"num_cpus": max(os.cpu_count() or 1, most + 1), "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        gpu = run.device != "cpu"
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
                storage_path=str(run.folder.resolve()),
                failure_config=FailureConfig(max_failures=MOST_FAILURES),
            ),
        )
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"{run.folder}: the training ended before its end ({error}); run the command again"
        ) from error
    finally:
        ray.shutdown()


def _work(config: dict[str, Any]) -> None:
    """What each process does."""
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    run = cast("Run", config["run"])
    told = _Told()
    part = Part(rank, world, _parallel if world > 1 else None, told)
    train(run, config["stages"], part=part, batches=partial(streamed, run, part))
    told.report()


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
