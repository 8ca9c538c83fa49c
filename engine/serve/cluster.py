# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
"""The service on Ray Serve: one scheduler that owns the queue, and replicas that pull its tasks and compute.

There is no Ray proxy: requests come in by `engine.serve.app`, which holds hostile bodies, and only small messages go
from there to the scheduler. All that must survive is on the disk: a scheduler that is started anew is told again.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from engine.cluster import ray_cluster
from engine.errors import EngineError
from engine.geometry import Box
from engine.memory import return_freed_memory
from engine.serve.archive import read_picture
from engine.serve.queue import Began, Failure, Kind, Progress, Queue, Task, Whose

log = logging.getLogger(__name__)

MEGAPIXELS_PER_REPLICA = 16.0
"""Waiting for each; more, and another is started."""
LONG_POLL_S = 2.0
HEARTBEAT_S = 1.0
STALL_S = 300.0
"""A task that takes longer, beside its patience, hangs: its replica is replaced."""
RETRY_S = 1.0
ENDING_S = 20.0
KEPT_S = 10.0
"""So long a replica keeps what it has freed; then it gives back what is free between two tasks."""
OBJECT_STORE_BYTES = 128 << 20
APP = "engine"

Look = tuple[str, Box, int]
"""A picture, the box that someone sees and its level."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a worker's last task."""

    began: Began | None = None
    task: Task | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The queue at a moment."""

    generation: str
    """Another one, when the scheduler was started anew and knows of nothing."""
    progress: Mapping[str, Progress]
    first: int
    """How many had ended before those of `ended`."""
    ended: tuple[tuple[str, Failure | None], ...]
    """Pictures, told again until they are known."""
    megapixels_left: float
    megapixels_left_of: Mapping[str, float]
    """By owner."""
    megapixels_per_s: float | None
    num_workers: int
    longest_s: float
    """Of the tasks under way, beside what they may take."""
    tasks_done: int
    tasks_failed: int
    task_seconds: float
    """At all of them."""


class Scheduler:
    """The queue, as an actor."""

    def __init__(self) -> None:
        self._queue = Queue()
        self._generation = uuid4().hex
        self._ended: list[tuple[str, Failure | None]] = []
        self._known = 0
        """How many more had ended, and are known."""
        self._owners: dict[str, str] = {}
        self._more = asyncio.Event()
        self._done = self._failed = 0
        self._seconds = 0.0

    async def add(self, pictures: list[tuple[str, str, float]]) -> None:
        """Pictures with their owners and megapixels."""
        for name, owner, megapixels in pictures:
            self._queue.add(name, owner=owner, megapixels=megapixels)
            self._owners[name] = owner
        self._wake()

    async def drop(self, picture: str) -> None:
        self._queue.drop(picture)
        self._owners.pop(picture, None)

    async def snapshot(self, looks: list[Look], generation: str, known: int) -> Snapshot:
        """Where all are; so many of the ended ones of a generation are known."""
        for picture, box, level in looks:
            self._queue.look(picture, box, level=level)
        for worker in self._queue.silent(now=time.monotonic()):
            log.warning("worker %s is silent; its task is given out again", worker)
            self._end(self._queue.lose(worker))
            self._wake()
        if generation == self._generation:
            del self._ended[: known - self._known]
            self._known = known
        return Snapshot(
            self._generation,
            self._queue.progress(),
            self._known,
            tuple(self._ended),
            self._queue.megapixels_left,
            {owner: self._queue.megapixels_left_of(owner) for owner in set(self._owners.values())},
            self._queue.megapixels_per_s,
            self._queue.num_workers,
            self._queue.longest_s(now=time.monotonic()),
            self._done,
            self._failed,
            self._seconds,
        )

    async def take(self, worker: str, report: Report | None) -> tuple[Task | None, float]:
        """The next task of a worker that has ended its last one, or None after a while; megapixels left."""
        await self.leave(worker, report)
        task = self._queue.take(worker, now=time.monotonic())
        if task is None:
            self._more.clear()
            try:
                await asyncio.wait_for(self._more.wait(), LONG_POLL_S)
            except TimeoutError:
                return None, self._queue.megapixels_left
            task = self._queue.take(worker, now=time.monotonic())
        return task, self._queue.megapixels_left

    async def leave(self, worker: str, report: Report | None) -> None:
        """What became of a worker's last task. One that it does not know of goes back: its message was lost."""
        if report is not None and report.task is not None and report.task == self._queue.task_of(worker):
            self._tell(worker, report, report.task, time.monotonic())
        self._end(self._queue.lose(worker))

    async def hear(self, worker: str) -> None:
        self._queue.hear(worker, now=time.monotonic())

    def _tell(self, worker: str, report: Report, task: Task, now: float) -> None:
        self._seconds += self._queue.seconds_of(worker, now=now)
        if report.failure is not None:
            self._failed += 1
            self._end(self._queue.fail(worker, report.failure))
        else:
            self._done += 1
            if report.began is not None:
                self._queue.begun(worker, report.began)
            elif task.kind is Kind.DRAW:
                self._queue.drawn(worker, task.keys, now=now)
            else:
                name = self._queue.finished(worker)
                self._end(None if name is None else (name, None))
        self._wake()

    def _end(self, ended: tuple[str, Failure | None] | None) -> None:
        if ended is not None:
            self._ended.append(ended)
            self._owners.pop(ended[0], None)

    def _wake(self) -> None:
        self._more.set()


class Replica:
    """Pulls tasks and does them, one after another, in a thread of its own."""

    def __init__(self, root: str, scheduler: DeploymentHandle[Any], threads: int, model: str | None) -> None:
        self._root, self._scheduler, self._threads, self._model = Path(root), scheduler, threads, model
        self._name = uuid4().hex
        self._left = 0.0
        self._until: float | None = None
        """Then its task hangs."""
        self._stop = threading.Event()
        self._pulling = threading.Thread(target=self._pull, daemon=True)
        self._pulling.start()
        threading.Thread(target=self._beat, daemon=True).start()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `Pending` looks at."""
        return {"megapixels_left": self._left}

    async def check_health(self) -> None:
        """For Ray Serve, which replaces a replica that raises."""
        until = self._until
        if not self._pulling.is_alive():
            raise RuntimeError("the thread that works has died")
        if until is not None and time.monotonic() > until:
            raise RuntimeError("at one task for longer than such a task takes")

    def export(self, picture: str, fmt: str) -> str:
        """The file of a finished picture in another format. Raises what `engine.restoration.export_finished` does."""
        from engine.serve.studio import Site, export

        return str(export(Site(self._folder(picture), read_picture(self._folder(picture))), fmt))

    def __del__(self) -> None:
        self._stop.set()
        self._pulling.join(ENDING_S)  # so that a replica that is not needed any more ends its task

    def _folder(self, picture: str) -> Path:
        return self._root / "pictures" / picture

    def _pull(self) -> None:
        from engine.serve.studio import Studio  # torch takes seconds

        studio = Studio(model=self._model, threads=self._threads)
        report: Report | None = None
        returned = time.monotonic()
        while not self._stop.is_set():
            try:
                answer = self._scheduler.take.remote(self._name, report).result(timeout_s=60)
            except Exception:  # the scheduler is being started anew
                log.warning("the scheduler does not answer", exc_info=True)
                time.sleep(RETRY_S)
                continue
            task, self._left = cast("tuple[Task | None, float]", answer)
            report = None if task is None else self._do(studio, task)
            if time.monotonic() - returned > KEPT_S:
                return_freed_memory()
                returned = time.monotonic()
        if report is not None:
            self._scheduler.leave.remote(self._name, report)
        studio.close()

    def _do(self, studio: Any, task: Task) -> Report:  # noqa: ANN401
        from engine.serve.studio import Site

        folder = self._folder(task.picture)
        try:
            picture = read_picture(folder)
            self._until = time.monotonic() + STALL_S + task.patience_s(picture.megapixels)
            return Report(studio.do(task, Site(folder, picture)), task)
        except EngineError as error:
            studio.forget(task.picture)
            detail = str(error).replace(f"{folder}/", "")
            return self._failed(task, Failure(error.code, detail))
        except Exception:
            studio.forget(task.picture)
            log.exception("%s of %s", task.kind, task.picture)
            return self._failed(task, Failure("internal", "an error of this program; report it"))
        finally:
            self._until = None

    def _failed(self, task: Task, failure: Failure) -> Report:
        if failure.whose is not Whose.PICTURE:
            time.sleep(RETRY_S)
        return Report(task=task, failure=failure)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._scheduler.hear.remote(self._name).result(timeout_s=10)
            except Exception:
                log.debug("the scheduler does not hear", exc_info=True)


class Pending:
    """The autoscaling policy: so many replicas as the megapixels that wait need."""

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        told = (context.aggregated_metrics or {}).get("megapixels_left", {})
        return math.ceil(max(told.values(), default=0.0) / MEGAPIXELS_PER_REPLICA), {}


@dataclass(frozen=True, slots=True)
class Service:
    """The handles of a running service."""

    scheduler: DeploymentHandle[Any]
    replicas: DeploymentHandle[Any]


@contextmanager
def running(root: Path, *, replicas: tuple[int, int], model: str | None = None) -> Generator[Service]:
    """Starts the service on a Ray of its own, with `replicas` at least and at most; ends both."""
    least, most = replicas
    cpus = os.cpu_count() or 1
    os.environ["MALLOC_ARENA_MAX"] = "1"  # for all that Ray starts: threads that come and go leave no heaps behind
    with ray_cluster(
        None,
        num_cpus=max(cpus, most + 1),
        object_store_memory=OBJECT_STORE_BYTES,
        _system_config={"enable_metrics_collection": False},  # nobody can ask for them, and they grow
    ):
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        deployment = cast("Any", serve.deployment)
        scheduler = deployment(
            Scheduler, num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        ).bind()
        scaling = AutoscalingConfig(
            min_replicas=least,
            initial_replicas=least,
            max_replicas=most,
            metrics_interval_s=0.5,
            look_back_period_s=1.0,
            upscale_delay_s=1.0,
            downscale_delay_s=30.0,
            policy=AutoscalingPolicy(policy_function=Pending),
        )
        replica = deployment(
            Replica,
            autoscaling_config=scaling,
            max_ongoing_requests=8,
            graceful_shutdown_timeout_s=ENDING_S,
            health_check_period_s=2.0,
            ray_actor_options={"num_cpus": 1},
        ).bind(str(root), scheduler, max(1, cpus // most), model)
        handle = serve.run(replica, name=APP, route_prefix=None)
        yield Service(cast("Any", serve).get_deployment_handle("Scheduler", app_name=APP), cast("Any", handle))
        # Ends at once: what is under way has been accepted, and goes on with the next start.
