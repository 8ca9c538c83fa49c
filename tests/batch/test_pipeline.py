"""Batches on Ray: the bytes of an undisturbed run, whatever dies on the way, and every picture's end is told."""

import os
import random
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import ray

from engine.batch import pipeline
from engine.batch.cluster import connected
from engine.batch.inputs import Item
from engine.batch.pipeline import Pipeline
from engine.batch.work import DONE, FAILED, REFUSED, Order, Outcome, Workers, restore_item
from engine.errors import NoCluster, NotEnoughMemory, TooFewCpus, TooFewGpus
from engine.request import Request
from tests.networks import TINY, random_checkpoint
from tests.outputs import timeless

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


def pictures(folder: Path, names: list[str], *, h: int = 40, w: int = 60, masked: bool = True) -> list[Item]:
    rng = np.random.default_rng(len(names))
    items: list[Item] = []
    for number, name in enumerate(names):
        image, mask = folder / f"{name}.png", folder / f"{name}.mask.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        if not masked:
            items.append(Item(str(image), name, None, None))
            continue
        missing = np.zeros((h, w), np.uint8)
        missing[5:20, 10:30] = 255
        cv2.imwrite(str(mask), missing)
        items.append(Item(str(image), name, str(mask) if number % 2 else None, None))
    return items


def ends(pipeline: Pipeline, items: list[Item]) -> dict[str, Outcome]:
    told = list(pipeline.run(items))
    assert len(told) == len({outcome.item.name for outcome in told})  # each once
    return {outcome.item.name: outcome for outcome in told}


def undisturbed(items: list[Item], order: Order, out: Path) -> dict[str, bytes]:
    alone = Order(**{**{name: getattr(order, name) for name in order.__slots__}, "out": out})
    restorer = alone.restorer(threads=1)
    for item in items:
        assert restore_item(restorer, item, alone).status == DONE
    return timeless(out)


def outputs(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in timeless(out).items() if not name.startswith("_batch/")}


def kill_one(chance: random.Random) -> bool:
    """Kills a random tile actor; False where none is at work."""
    found = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("MapWorker(MapBatches(TileActor))" in part for part in command_line(process))
    ]
    if found:
        os.kill(chance.choice(found), signal.SIGKILL)
    return bool(found)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_cluster_that_does_not_answer_is_told_of():
    assert not ray.is_initialized()  # so before all that need the cluster
    refused, started = r"127\.0\.0\.1:1: 0 clusters answer \(\[Errno 111\]", time.monotonic()
    with pytest.raises(NoCluster, match=refused), connected(Workers(1, "127.0.0.1:1"), booked_bytes=1):
        pass
    assert time.monotonic() - started < 30  # Ray alone would ask for minutes


def test_many_pictures_of_every_fate(cluster, folder, model):
    items = pictures(folder / "in", [f"sub {n % 3}/scan {n}" for n in range(20)])
    items += pictures(folder / "in", ["large"], h=700, w=1100)
    order = Order(folder / "out", Request(scale=4), ("ome-zarr", "png"), model)
    expected = undisturbed(items, order, folder / "expected")
    broken = folder / "in" / "broken.png"
    broken.write_bytes(b"not a picture")
    bad = [Item(str(broken), "broken", None, None), Item(items[0].image, "maskless", None, "no mask fits")]
    found = ends(Pipeline(order, Workers(2)), [*items, *bad])
    assert found.keys() == {item.name for item in [*items, *bad]}
    assert {outcome.reason for outcome in found.values()} == {None, "unreadable-input", "mask-unavailable"}
    assert [found[item.name].status for item in bad] == [REFUSED, REFUSED]
    assert outputs(folder / "out") == expected
    assert list((folder / "out" / "_batch" / "attempts").iterdir()) == []

    again = ends(Pipeline(order, Workers(1)), items)
    assert again.keys() == {item.name for item in items}
    assert all(outcome.shards_reused == outcome.shards_total for outcome in again.values())
    assert outputs(folder / "out") == expected


def test_killed_workers_are_invisible_in_the_output(cluster, folder, model):
    items = pictures(folder / "in", [f"scan {n}" for n in range(40)], h=90, w=120)
    items += pictures(folder / "in", ["large"], h=700, w=1600)
    order = Order(folder / "out", Request(scale=4), ("ome-zarr",), model)
    expected = undisturbed(items, order, folder / "expected")
    chance, killed, found = random.Random(0), 0, list[Outcome]()
    for outcome in Pipeline(order, Workers(2)).run(items):
        found.append(outcome)
        if len(found) % 8 == 0:  # not by the clock: a busy machine takes its time to start a process anew
            killed += kill_one(chance)
    assert killed >= 4
    assert {outcome.status for outcome in found} == {DONE}
    assert sorted(outcome.item.name for outcome in found) == sorted(item.name for item in items)
    assert outputs(folder / "out") == expected


def test_poison_is_put_aside_and_the_innocent_are_not(cluster, folder, model):
    items = pictures(folder / "in", [*(f"scan {n}" for n in range(12)), "segv", "hang"])
    order = Order(folder / "out", Request(scale=1), ("png",), model)
    items += pictures(folder / "in", ["large segv", "large"], h=2100, w=60)
    found = ends(Pipeline(order, Workers(2, stall_s=10)), items)
    bad = ("segv", "hang", "large segv")
    for name in bad:
        assert (found[name].status, found[name].reason, found[name].attempts) == (FAILED, "process-died", 3)
    assert found.keys() == {item.name for item in items}
    assert all(outcome.status == DONE for name, outcome in found.items() if name not in bad)


def test_a_pool_that_would_starve_is_refused(cluster, folder, monkeypatch):
    with pytest.raises(TooFewCpus, match=r"9 workers need 9\.75 of the cluster's CPU, it has 4"):
        Pipeline(Order(folder), Workers(9))
    with pytest.raises(TooFewGpus, match=r"2 workers with --gpu-share 0\.25 need 1\.25 of the cluster's GPU, it has 0"):
        Pipeline(Order(folder), Workers(2, gpu_share=0.25))
    Pipeline(Order(folder), Workers(3))
    monkeypatch.setattr(pipeline, "WORKER_BYTES", 2 << 30)
    with pytest.raises(NotEnoughMemory, match=r"3 workers need 15,569,256,448 of the cluster's memory, it has 8,0"):
        Pipeline(Order(folder), Workers(3))
