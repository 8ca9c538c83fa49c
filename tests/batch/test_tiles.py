"""What the children of a nursery do, in this process."""

import pickle
import threading
from typing import Any

import cv2
import numpy as np
import pytest

from engine import restoration
from engine.batch import tiles
from engine.batch.inputs import Item
from engine.batch.tiles import Bundle, Here, Restoring
from engine.batch.work import DONE, REFUSED, Order, Workers
from engine.errors import OutputBusy
from engine.request import Request
from engine.store import FileLock
from tests.networks import TINY, random_checkpoint


@pytest.fixture
def order(tmp_path) -> Order:
    return Order(tmp_path / "out", Request(scale=1), ("ome-zarr",), str(random_checkpoint(tmp_path, TINY)))


@pytest.fixture
def item(tmp_path) -> Item:
    path = tmp_path / "scan.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return Item(str(path), "scan", None, None)


@pytest.fixture
def held(order, item) -> FileLock:
    """The picture's canvas, as a process has it that was killed a moment ago and has not ended yet."""
    order.restorer(threads=1).lay_out(order.job(item), order.request)
    (canvas,) = order.out.glob("*.inprogress.zarr")
    lock = FileLock.try_take(canvas / "_engine" / "lock")
    assert lock is not None
    return lock


@pytest.mark.parametrize("how", ["restored", "finished"])
def test_a_picture_is_waited_for_that_a_dying_process_still_holds(order, item, held, tmp_path, how):
    timer = threading.Timer(0.7, held.release)
    timer.start()
    if how == "restored":
        (outcome,) = Restoring(Here("node", tmp_path), order, Workers(1))(Bundle((item,)), {})
    else:
        outcome = pickle.loads(tiles.finish(pickle.dumps((order, item))))
    timer.join()
    assert (outcome.status, outcome.reason) == (DONE, None)


def test_but_not_for_ever(order, item, held, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "PATIENCE_S", 0.3)
    (outcome,) = Restoring(Here("node", tmp_path), order, Workers(1))(Bundle((item,)), {})
    held.release()
    assert (outcome.status, outcome.reason) == (REFUSED, "output-busy")


@pytest.mark.parametrize("begin", ["lay_out", "restore"])
def test_a_picture_that_another_process_finishes_meanwhile_is_not_begun_again(order, item, monkeypatch, begin):
    """That one is between our look and our lock."""
    job, validate = order.job(item), restoration.validate

    def slow(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(restoration, "validate", validate)
        order.restorer(threads=1).restore(job, order.request)
        validate(*arguments, **named)

    monkeypatch.setattr(restoration, "validate", slow)
    restorer = order.restorer(threads=1)
    with pytest.raises(OutputBusy, match="has just finished it"):
        getattr(restorer, begin)(job, order.request)
    assert not list(order.out.glob("*.inprogress.zarr"))
    made = restorer.restore(job, order.request)
    assert made.shards_reused == made.shards_total
