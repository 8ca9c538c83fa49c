"""Work is done once, stored in order, one shard ahead at most."""

import threading
from pathlib import Path

import numpy as np
import pytest

from engine import failpoints
from engine.errors import StorageFull
from engine.geometry import Size
from engine.tiling.canvas import Canvas
from engine.tiling.execute import run
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan

SIZE = Size(64, 96)
PLAN = Plan("scan", SIZE, 1, "uint8", Grid(SIZE, 16, 32), "a", "none", "lite", "b", {}, 0, 0)


@pytest.fixture
def canvas(tmp_path: Path):
    with Canvas.open(PLAN, tmp_path) as canvas:
        yield canvas


def black(key: ShardKey) -> np.ndarray:
    box = PLAN.grid.box(key)
    return np.zeros((box.size.h, box.size.w, 1), np.uint8)


def test_all_shards_end_in_order(canvas):
    ends = list(run(canvas, PLAN.grid.all_keys(), black))
    assert [end.key for end in ends] == list(PLAN.grid.all_keys())
    assert all(end.seconds > 0 and not end.reused for end in ends)


def test_an_end_is_a_promise(canvas):
    for end in run(canvas, PLAN.grid.all_keys(), black):
        assert canvas.is_done(end.key)


def test_done_shards_are_not_computed_again(canvas):
    keys = list(PLAN.grid.keys(0))
    for key in keys[1:4:2]:
        canvas.write(key, black(key))
    computed = []
    ends = list(run(canvas, keys, lambda key: (computed.append(key), black(key))[1]))
    assert [end.key for end in ends] == keys
    assert [end.key for end in ends if end.reused] == keys[1:4:2]
    assert computed == [key for key in keys if key not in keys[1:4:2]]


def test_one_shard_is_stored_while_the_next_is_computed_and_no_more(canvas, monkeypatch):
    real, log, computed_two = canvas.write, [], threading.Event()

    def write(key, pixels):
        if key == ShardKey(0, 0, 0):
            assert computed_two.wait(10)  # would stop for ever if storing did not overlap
        log.append(("stored", key.ix))
        real(key, pixels)

    def work(key):
        log.append(("computed", key.ix))
        if key == ShardKey(0, 0, 1):
            computed_two.set()
        return black(key)

    monkeypatch.setattr(canvas, "write", write)
    list(run(canvas, [ShardKey(0, 0, ix) for ix in range(3)], work))
    assert log.index(("stored", 0)) < log.index(("computed", 2))


def test_a_level_starts_when_the_one_before_is_stored(canvas, monkeypatch):
    real = canvas.write

    def slow(key, pixels):
        threading.Event().wait(0.02)
        real(key, pixels)

    def work(key):
        if key.level:
            assert all(canvas.is_done(before) for before in PLAN.grid.keys(key.level - 1))
        return black(key)

    monkeypatch.setattr(canvas, "write", slow)
    assert len(list(run(canvas, PLAN.grid.all_keys(), work))) == PLAN.grid.num_shards


def test_an_error_of_the_work_comes_out_and_what_was_stored_stays(canvas):
    def work(key):
        if key == ShardKey(0, 1, 0):
            raise RuntimeError("out of luck")
        return black(key)

    with pytest.raises(RuntimeError, match="out of luck"):
        list(run(canvas, PLAN.grid.keys(0), work))
    assert [canvas.is_done(key) for key in PLAN.grid.keys(0)] == [True, True, True, False, False, False]


@pytest.mark.parametrize("occurrence", [1, 5, 6])
def test_an_error_of_the_disk_comes_out(canvas, monkeypatch, occurrence):
    failpoints._counts.clear()
    monkeypatch.setenv("ENGINE_FAILPOINT", f"record:{2 * occurrence - 1}:enospc")  # passed twice per record
    with pytest.raises(StorageFull):
        list(run(canvas, PLAN.grid.keys(0), black))
    assert sum(canvas.is_done(key) for key in PLAN.grid.keys(0)) == occurrence - 1


def test_keys_are_taken_one_by_one(canvas):
    taken = []

    def keys():
        for key in PLAN.grid.keys(0):
            taken.append(key)
            yield key

    ends = run(canvas, keys(), black)
    next(ends)
    assert len(taken) == 2
    ends.close()
    assert canvas.is_done(taken[0])
