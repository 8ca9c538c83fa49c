"""What the children of a nursery do, in this process."""

import pickle
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine import restoration
from engine.batch import tiles
from engine.batch.attempts import Attempts
from engine.batch.inputs import Item
from engine.batch.tiles import Bundle, Here, Preparing, Restoring
from engine.batch.work import DONE, FAILED, REFUSED, Order, Outcome, Workers
from engine.errors import OutputBusy, ProcessDied, StorageFull
from engine.receipt import Job, Receipt
from engine.request import Request
from engine.restoration import Restorer
from engine.store import FileLock
from engine.tiling.grid import Grid
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
    timer, started = threading.Timer(0.7, held.release), time.monotonic()
    timer.start()
    if how == "restored":
        (outcome,) = Restoring(Here("node", tmp_path), order, Workers(1))(Bundle((item,)), {})
    else:
        outcome = pickle.loads(tiles.finish(pickle.dumps((order, item))))
    assert time.monotonic() - started > 0.6
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


def test_one_that_kills_is_not_tried_thrice_again_where_its_bundle_is_given_out_again(
    order, item, tmp_path, monkeypatch
):
    """As it is when a neighbour in the bundle kills, too."""
    tried: list[str] = []

    def dies(self: Restoring, item: Item, *_: object) -> Outcome:
        tried.append("alone")
        raise ProcessDied(f"{item.image}: dies")

    def kills(self: Restoring, *_: object) -> Outcome:
        tried.append("shared")
        raise KeyboardInterrupt

    monkeypatch.setattr(Restoring, "_alone", dies)
    monkeypatch.setattr(Restoring, "once", kills)
    restoring = Restoring(Here("node", tmp_path), order, Workers(1))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            restoring(Bundle((item,)), {})
    for _ in range(3):
        (outcome,) = restoring(Bundle((item,)), {})
        assert (outcome.reason, outcome.attempts) == ("process-died", 3)
    assert tried == ["shared", "shared", "alone", "alone", "alone"]


def test_an_error_of_ours_ends_its_own_picture(order, item, tmp_path, monkeypatch):
    restore, other = Restorer.restore, Item(item.image, "other", None, None)

    def wrong(self: Restorer, job: Job, *arguments: Any) -> Receipt:
        if job.name == "scan":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return restore(self, job, *arguments)

    monkeypatch.setattr(Restorer, "restore", wrong)
    found = Restoring(Here("node", tmp_path), order, Workers(1))(Bundle((item, other)), {})
    assert [(outcome.status, outcome.reason) for outcome in found] == [(FAILED, "internal"), (DONE, None)]
    assert "can't allocate memory" in found[0].message


def test_a_full_disk_is_told_of_where_the_attempt_was_to_be_noted(order, item, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise StorageFull("0 bytes")

    monkeypatch.setattr(Attempts, "begin", full)
    (outcome,) = Restoring(Here("node", tmp_path), order, Workers(1))(Bundle((item,)), {})
    assert (outcome.status, outcome.reason) == (FAILED, "storage-full")


def test_a_large_picture_that_is_finished_or_held_has_nothing_to_draw(order, item, tmp_path, monkeypatch):
    """It is finished, with patience, by the task that finishes: not in a bundle of small ones."""
    small = partial(Grid, chunk_px=16, shard_px=16)
    monkeypatch.setattr(tiles, "Grid", small)
    monkeypatch.setattr("engine.planning.Grid", small)
    preparing, bundle = Preparing(Here("node", tmp_path), order), Bundle((item,))
    assert [found.num_shards for found in preparing(bundle, {})] == [6]
    (canvas,) = order.out.glob("*.inprogress.zarr")
    held = FileLock.try_take(canvas / "_engine" / "lock")
    assert held is not None
    assert [found.num_shards for found in preparing(bundle, {})] == [0]
    held.release()
    order.restorer(threads=1).restore(order.job(item), order.request)
    assert [found.num_shards for found in preparing(bundle, {})] == [0]
    Path(item.image).write_bytes(b"not a picture")
    assert [found.num_shards for found in preparing(bundle, {})] == [1]  # who restores it, tells what is wrong
