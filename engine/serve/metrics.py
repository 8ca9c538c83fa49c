"""What Prometheus scrapes: of requests as they end, of the queue as it is told. Labels have few values."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from engine.serve.desk import Desk

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "engine_requests", "Requests that were answered.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "engine_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 10.0),
            registry=self._registry,
        )
        self._megapixels = Gauge("engine_queue_megapixels", "Accepted and not done.", registry=self._registry)
        self._pictures = Gauge("engine_pictures", "Accepted pictures.", ("state",), registry=self._registry)
        self._workers = Gauge("engine_workers", "Replicas that take tasks.", registry=self._registry)
        self._rate = Gauge("engine_megapixels_per_second", "Of one replica while it draws.", registry=self._registry)
        self._tasks = Gauge("engine_tasks_done", "Since the scheduler started.", registry=self._registry)
        self._busy = Gauge("engine_task_seconds", "At all tasks since the scheduler started.", registry=self._registry)
        self._failed = Gauge("engine_tasks_failed", "Since the scheduler started.", registry=self._registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request to a route, as it is declared."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self, desk: "Desk") -> bytes:
        """All of it, now."""
        ends = list(desk.archive.ends.values())
        failed = sum(end.failure is not None for end in ends)
        for state, count in (
            ("unfinished", len(desk.archive.pictures) - len(ends)),
            ("done", len(ends) - failed),
            ("failed", failed),
        ):
            self._pictures.labels(state).set(count)
        if desk.told is not None:
            self._megapixels.set(desk.told.megapixels_left)
            self._workers.set(desk.told.num_workers)
            self._rate.set(desk.told.megapixels_per_s or 0.0)
            self._tasks.set(desk.told.tasks_done)
            self._busy.set(desk.told.task_seconds)
            self._failed.set(desk.told.tasks_failed)
        return generate_latest(self._registry)
