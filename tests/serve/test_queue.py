"""The queue of a service: everything is given out once, in a fair order, and lost work again."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.geometry import Box, Size
from engine.serve.queue import MOST_LOSSES, MOST_SHARDS, Began, Failure, Kind, Queue, State, Task
from engine.tiling.grid import Grid, ShardKey

GRID = Grid(Size(4000, 3000), shard_px=1024)


def work_off(queue: Queue, workers: list[str], *, now: float = 0.0, grid: Grid = GRID) -> list[Task]:
    """Does all there is, each worker one task after another; what was given out."""
    given: list[Task] = []
    idle = 0
    while idle < len(workers):
        for worker in workers:
            now += 1.0
            task = queue.take(worker, now=now)
            if task is None:
                idle += 1
                continue
            idle = 0
            given.append(task)
            do(queue, worker, task, now=now + 0.5, grid=grid)
    return given


def do(queue: Queue, worker: str, task: Task, *, now: float = 0.0, grid: Grid = GRID) -> None:
    if task.kind is Kind.BEGIN:
        queue.begun(worker, Began(grid))
    elif task.kind is Kind.DRAW:
        queue.drawn(worker, task.keys, now=now)
    else:
        assert queue.finished(worker) == task.picture


def draws(given: list[Task]) -> list[ShardKey]:
    return [key for task in given for key in task.keys]


def test_every_shard_is_given_out_once_and_after_what_it_is_made_from():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    given = work_off(queue, ["w1", "w2"])
    assert [task.kind for task in given if task.kind is not Kind.DRAW] == [Kind.BEGIN, Kind.FINISH]
    keys = draws(given)
    assert Counter(keys) == Counter(GRID.all_keys())
    place = {key: n for n, key in enumerate(keys)}
    for key in keys:
        if key.level:
            region = GRID.box(key).scaled(2).intersection(Box.of(GRID.level_size(key.level - 1)))
            assert all(place[source] < place[key] for source in GRID.keys_in(region, level=key.level - 1))
    assert queue.progress() == {}


def test_smaller_levels_come_as_soon_as_they_can():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    keys = draws(work_off(queue, ["w"]))
    first_small = next(n for n, key in enumerate(keys) if key.level)
    assert first_small < GRID.num_shards_of(0)  # not when the full size is complete


def test_what_is_stored_already_is_not_given_out():
    done = frozenset([*GRID.keys(0)][:5])
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    assert queue.take("w", now=0) == Task(1, "one", Kind.BEGIN)
    queue.begun("w", Began(GRID, done))
    assert queue.progress()["one"].share == pytest.approx(5 / GRID.num_shards)
    keys = draws(work_off(queue, ["w"]))
    assert Counter(keys) == Counter(set(GRID.all_keys()) - done)


def test_nothing_left_to_draw_is_finished_at_once():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.take("w", now=0)
    queue.begun("w", Began(GRID, frozenset(GRID.all_keys())))
    task = queue.take("w", now=1)
    assert task is not None
    assert task.kind is Kind.FINISH


def test_keys_share_by_megapixels_not_by_pictures():
    queue = Queue()
    for n in range(10):
        queue.add(f"abuser {n}", owner="abuser", megapixels=12)
    queue.add("normal", owner="normal", megapixels=12)
    given = work_off(queue, ["w"])
    finished = [task.picture for task in given if task.kind is Kind.FINISH]
    assert finished.index("normal") <= 1


def test_a_reduction_costs_what_is_read_for_it():
    queue = Queue()
    for n in range(3):
        queue.add(f"large {n}", owner="abuser", megapixels=240)
    queue.add("normal", owner="normal", megapixels=12)
    given = work_off(queue, ["w"])
    finished = [task.picture for task in given if task.kind is Kind.FINISH]
    assert finished[0] == "normal"


def test_an_owner_who_was_idle_has_saved_nothing_up():
    queue = Queue()
    queue.add("first", owner="busy", megapixels=12)
    work_off(queue, ["w"])
    queue.add("b1", owner="busy", megapixels=12)
    queue.add("b2", owner="busy", megapixels=12)
    for _ in range(8):
        task = queue.take("w", now=0)
        assert task is not None
        do(queue, "w", task)
    queue.add("new 1", owner="new", megapixels=12)
    queue.add("new 2", owner="new", megapixels=12)
    owners = [task.picture[0] for task in work_off(queue, ["w"]) if task.kind is Kind.DRAW]
    assert set(owners[:8]) == {"b", "n"}  # side by side, not the new one alone until it has had as much


def test_what_is_looked_at_is_drawn_next():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.take("w", now=0)
    queue.begun("w", Began(GRID))
    queue.look("one", Box(3200, 2200, 3300, 2300), level=0)
    task = queue.take("w", now=1)
    assert task is not None
    assert task.keys == (ShardKey(0, 3, 2),)
    queue.drawn("w", task.keys, now=2)
    queue.look("one", Box(0, 0, 40, 40), level=5)  # all of it, from afar
    assert len(draws(work_off(queue, ["w"]))) == GRID.num_shards - 1


def test_a_picture_that_is_looked_at_before_it_is_begun_comes_before_others_of_its_key():
    queue = Queue()
    for name in ("first", "second"):
        queue.add(name, owner="a", megapixels=12)
    queue.look("second", Box(0, 0, 10, 10), level=0)
    task = queue.take("w", now=0)
    assert task is not None
    assert task.picture == "second"


def test_what_is_looked_at_before_it_is_begun_is_drawn_first():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    for y in range(100, 3100, 10):  # somebody moves about
        queue.look("one", Box(y, 0, y + 10, 10), level=0)
    queue.look("one", Box(3200, 2200, 3300, 2300), level=0)
    queue.take("w", now=0)
    queue.begun("w", Began(GRID))
    task = queue.take("w", now=1)
    assert task is not None
    assert task.keys == (ShardKey(0, 3, 2),)
    assert len(queue._pictures["one"].looked_at) < 4  # the last screen of them


def test_looking_moves_a_picture_before_others_of_its_key_alone():
    queue = Queue()
    for name, owner in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        queue.add(name, owner=owner, megapixels=12)
    workers = ("w1", "w2", "w3")
    for worker in workers:
        queue.take(worker, now=0)
    for worker in workers:
        queue.begun(worker, Began(GRID))
    queue.look("a2", Box(0, 0, 10, 10), level=0)
    first, second = queue.take("w1", now=1), queue.take("w2", now=1)
    assert first is not None
    assert second is not None
    assert {first.picture, second.picture} == {"a2", "b1"}


def test_a_lost_worker_costs_its_task_alone():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.take("w", now=0)
    queue.begun("w", Began(GRID))
    lost = queue.take("w", now=1)
    assert lost is not None
    assert queue.silent(now=5) == []
    assert queue.silent(now=100) == ["w"]
    assert queue.lose("w") is None
    queue.drawn("w", lost.keys, now=101)  # too late: it is given out again
    keys = draws(work_off(queue, ["w2"]))
    assert keys[0] == lost.keys[0]
    assert Counter(keys) == Counter(GRID.all_keys())


def test_a_picture_that_costs_worker_after_worker_is_blamed_and_others_are_not():
    queue = Queue()
    queue.add("poison", owner="a", megapixels=12)
    queue.add("good", owner="a", megapixels=12)
    for n in range(MOST_LOSSES):
        task = queue.take(f"w{n}", now=n)
        assert task is not None
        assert task.picture == "poison"
        blamed = queue.lose(f"w{n}")
    assert blamed is not None
    assert blamed[0] == "poison"
    assert blamed[1].code == "process-died"
    assert {task.picture for task in work_off(queue, ["w"])} == {"good"}


def test_what_moves_on_is_not_blamed():
    queue = Queue()
    queue.add("large", owner="a", megapixels=12)
    task = queue.take("w", now=0)
    assert task is not None
    do(queue, "w", task)
    for n in range(5 * MOST_LOSSES):
        if queue.take("w", now=n) is None:
            break
        assert queue.lose("w") is None
        if n % 2:
            task = queue.take("w", now=n)
            if task is None:
                break
            do(queue, "w", task)
    assert "large" in queue.progress()


def test_a_full_disk_costs_a_picture_nothing_but_its_turn():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.add("two", owner="a", megapixels=12)
    for _ in range(5 * MOST_LOSSES):
        task = queue.take("w", now=0)
        assert queue.fail("w", Failure("storage-full", "0 bytes")) is None
        other = queue.take("w", now=0)
        assert {task.picture, other.picture} == {"one", "two"}
        assert queue.fail("w", Failure("storage-full", "0 bytes")) is None
    assert len([task for task in work_off(queue, ["w"]) if task.kind is Kind.FINISH]) == 2


def test_small_pictures_are_not_for_nothing():
    """Beginning and finishing take time: thousands of pictures of a few pixels do not starve another key."""
    queue, tiny = Queue(), Grid(Size(16, 16), shard_px=1024)
    for n in range(300):
        queue.add(f"tiny {n}", owner="flood", megapixels=0.5)
    queue.add("large", owner="other", megapixels=12)
    turns = Counter[bool]()
    for n in range(60):
        task = queue.take("w", now=float(n))
        turns[task.picture == "large"] += 1
        do(queue, "w", task, now=n + 0.5, grid=GRID if task.picture == "large" else tiny)
    assert turns[True] >= 15


def test_a_dropped_picture_takes_no_more_work():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    task = queue.take("w", now=0)
    assert task is not None
    queue.drop("one")
    do_not_fail = Began(GRID)
    queue.begun("w", do_not_fail)
    assert queue.take("w", now=1) is None
    assert queue.megapixels_left == 0


def test_a_task_on_a_whole_picture_hangs_later_the_larger_it_is():
    queue = Queue()
    queue.add("one", owner="a", megapixels=1000)
    begin = queue.take("w", now=0)
    assert begin is not None
    assert begin.patience_s(1000) == 500
    assert queue.longest_s(now=560) == pytest.approx(60)
    queue.begun("w", Began(GRID))
    queue.take("w", now=600)
    assert queue.longest_s(now=620) == pytest.approx(20)


def test_progress_and_rate():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.add("two", owner="b", megapixels=12)
    assert {name: found.position for name, found in queue.progress().items()} == {"one": 1, "two": 2}
    assert queue.progress()["one"].seconds_left is None
    for worker in ("v", "w"):
        queue.take(worker, now=0)
    for worker in ("v", "w"):
        queue.begun(worker, Began(GRID))
    task = queue.take("w", now=10)
    assert task is not None
    queue.drawn("w", task.keys, now=12)
    assert queue.megapixels_per_s == pytest.approx(1024**2 / 1e6 / 2)
    found = queue.progress()[task.picture]
    assert found.state is State.RUNNING
    assert found.share == pytest.approx(1 / GRID.num_shards)
    assert found.seconds_left is not None


def test_fast_shards_are_given_out_in_handfuls():
    queue = Queue()
    queue.add("one", owner="a", megapixels=12)
    queue.take("w", now=0)
    queue.begun("w", Began(GRID))
    task = queue.take("w", now=0)
    assert task is not None
    queue.drawn("w", task.keys, now=0.01)
    task = queue.take("w", now=1)
    assert task is not None
    assert len(task.keys) == MOST_SHARDS


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_happens_every_picture_ends_whole(data):
    grid = Grid(Size(600, 900), chunk_px=64, shard_px=256)
    queue = Queue()
    stored: dict[str, list[ShardKey]] = {}
    names = [f"p{n}" for n in range(data.draw(st.integers(1, 4)))]
    for name in names:
        queue.add(name, owner=data.draw(st.sampled_from("ab")), megapixels=0.54)
        stored[name] = []
    having: dict[str, Task | None] = {}
    ended: list[str] = []
    losses = 0
    for now in range(4000):
        if len(ended) == len(names):
            break
        worker = data.draw(st.sampled_from(["w1", "w2", "w3"])) if now < 60 else f"w{now % 3 + 1}"
        task = having.pop(worker, None)
        if task is None:
            having[worker] = queue.take(worker, now=now)
        elif losses < 2 and now < 60 and data.draw(st.integers(0, 9)) == 0:
            losses += 1
            assert queue.lose(worker) is None
        elif task.kind is Kind.BEGIN:
            queue.begun(worker, Began(grid))
        elif task.kind is Kind.DRAW:
            part = task.keys if now >= 60 else task.keys[: data.draw(st.integers(0, len(task.keys)))]
            stored[task.picture] += part
            queue.drawn(worker, part, now=now)
        else:
            ended.append(task.picture)
            queue.finished(worker)
    assert sorted(ended) == names
    for name in names:
        assert Counter(stored[name]) == Counter(grid.all_keys())
