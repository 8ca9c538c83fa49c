"""One thread and fixed seeds, so that a test means the same on every machine."""

import hashlib
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from engine.objects import Prefix
    from tests.faults.s3_proxy import Proxy

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def _seeds():
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a restoration takes all, and training flushes denormal numbers
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def s3_server() -> Iterator["Proxy"]:
    """An object store on loopback."""
    from tests.faults.s3_proxy import s3_proxy

    with s3_proxy() as proxy:
        yield proxy


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator["Proxy"]:
    """The object store, with all that went wrong and was asked before forgotten."""
    from engine import objects

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects._client.cache_clear()
    s3_server.requests.clear()
    yield s3_server
    s3_server.faults.clear()
    objects._client.cache_clear()


@pytest.fixture
def prefix(s3, request) -> "Prefix":
    """Empty, and of this test alone."""
    from engine.objects import Prefix
    from tests.faults.s3_proxy import BUCKET

    return Prefix(BUCKET, hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8])


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator for pictures that a test makes."""
    return np.random.default_rng(0)
