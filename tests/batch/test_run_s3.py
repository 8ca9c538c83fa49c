"""Pictures of a batch that lie on an object store, and a batch whose outputs do."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.batch.inputs import find_inputs
from engine.batch.run import restore_all
from engine.batch.tiles import Bundle, Here, Preparing
from engine.batch.work import DONE, Order, Workers
from engine.errors import PlanError
from engine.receipt import receipt_of
from engine.remote import read_pointer
from engine.request import Request
from engine.restoration import Restorer
from tests.networks import TINY, random_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture
def order(tmp_path, model) -> Order:
    return Order(tmp_path / "out", Request(), ("png",), model)


@pytest.fixture
def restorer(order) -> Restorer:
    return order.restorer(threads=1)


@pytest.fixture
def source(tmp_path, prefix, monkeypatch) -> str:
    """Two pictures below a prefix; temporary files are looked for in the test's folder."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    rng = np.random.default_rng(0)
    for name in ("a.png", "1890/b.png"):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        (prefix / "in").put(name, cv2.imencode(".png", pixels)[1].tobytes())
    return str(prefix / "in")


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").iterdir())


def test_pictures_on_an_object_store_are_fetched_one_by_one(source, order, restorer, tmp_path):
    items = list(find_inputs([source], out=str(order.out)))
    ends = list(restore_all(items, order, restorer))
    assert [(end.status, end.item.image) for end in ends] == [
        (DONE, f"{source}/a.png"),
        (DONE, f"{source}/1890/b.png"),
    ]
    assert receipt_of(order.out, "a")["input"]["name"] == "a.png"
    assert receipt_of(order.out / "1890", "b") is not None
    assert leftovers(tmp_path) == []


def test_a_picture_that_changed_on_the_store_is_not_taken_for_finished(source, prefix, order, restorer):
    items = list(find_inputs([source], out=str(order.out)))
    list(restore_all(items, order, restorer))
    before = receipt_of(order.out, "a")["input"]["sha256"]
    (prefix / "in").put("a.png", cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes())
    list(restore_all(items, dataclasses.replace(order, replace=True), restorer))
    assert receipt_of(order.out, "a")["input"]["sha256"] != before


def test_workers_plan_pictures_on_an_object_store(source, order, tmp_path):
    items = tuple(find_inputs([source], out=str(order.out)))
    looked_at = Preparing(Here("node", tmp_path), order)(Bundle(items), ())
    assert [found.item for found in looked_at] == list(items)
    assert all(found.num_pixels > 0 for found in looked_at)
    assert leftovers(tmp_path) == []


def test_outputs_of_a_batch_on_an_object_store_have_their_sub_folders(source, prefix, order, restorer, tmp_path):
    order = dataclasses.replace(order, out=tmp_path / "tmp", remote=prefix / "out")
    items = list(find_inputs([source], out=str(order.remote)))
    assert [end.status for end in restore_all(items, order, restorer)] == [DONE, DONE]
    assert read_pointer(prefix / "out", "a").receipt is not None
    assert read_pointer(prefix / "out/1890", "b").receipt is not None
    assert leftovers(tmp_path) == []


def test_workers_and_outputs_on_an_object_store_are_refused(source, prefix, order, restorer):
    items = list(find_inputs([source], out=None))
    with pytest.raises(PlanError, match=r"2 workers share 1 folder of outputs"):
        next(restore_all(items, dataclasses.replace(order, remote=prefix / "out"), restorer, workers=Workers(2)))


def test_a_plan_does_not_download(source, order):
    item = next(find_inputs([source], out=None))
    with pytest.raises(PlanError, match=r"a\.png: 1 picture or its mask is on an object store"):
        order.job(item)
