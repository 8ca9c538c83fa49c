# pyright: reportUnknownMemberType=false
"""The Ray cluster that a batch runs on: a local one of its own, or one that is there."""

import os
import shlex
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from ray.job_submission import JobStatus, JobSubmissionClient

from engine.batch.work import Workers
from engine.cluster import ray_cluster

OBJECT_STORE_BYTES = 128 << 20
"""Descriptors and receipts only."""


@contextmanager
def connected(workers: Workers, *, booked_bytes: int) -> Generator[None]:
    """A connection to their address, or a cluster of this process alone with as many logical CPUs as they book.

    There what they book is there, whatever is free: the machine's memory is the user's business. Raises NoCluster.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with ray_cluster(
        workers.address,
        num_cpus=max(os.cpu_count() or 1, workers.count + 1),
        object_store_memory=OBJECT_STORE_BYTES,
        _memory=booked_bytes,
        # One that waits for work spares the next task, or the actor that follows a dead one, seconds of a core.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000},
    ):
        yield


def submit(address: str, arguments: Sequence[str]) -> int:
    """Runs this very command inside the cluster behind an `http://` address, shows what it says; its exit code.

    Ray Data needs its driver in the cluster. Paths are those of the cluster; the engine must be installed there.
    """
    client = JobSubmissionClient(address)
    words = ["engine", *arguments, "--address", "auto"]
    job = client.submit_job(entrypoint=shlex.join(words))
    sys.stderr.write(f"submitted as {job} to {address}\n")
    shown = 0
    while True:
        text = client.get_job_logs(job)
        sys.stderr.write(text[shown:])
        shown = len(text)
        status = client.get_job_status(job)
        if status.is_terminal():
            info = client.get_job_info(job)
            if status is JobStatus.SUCCEEDED:
                return 0
            return info.driver_exit_code or 3
        time.sleep(1)
