"""One small Ray cluster for all tests of batches, which is gone before others start their own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.batch.cluster import connected
from engine.batch.pipeline import booked_bytes
from engine.batch.work import Workers

POISON = "restore segv:1:segv;restore hang:1:hang;draw large segv:1:segv"
"""Pictures of these names end, or hold up, every process that tries them, or that draws a part of them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["ENGINE_FAILPOINT"] = POISON  # before Ray starts: its workers inherit it
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
    try:
        with connected(Workers(3), booked_bytes=booked_bytes(Workers(3))):
            yield
    finally:
        del os.environ["ENGINE_FAILPOINT"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a memory disk where there is one: fsync costs nothing there."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() else None))
    yield path
    shutil.rmtree(path)
