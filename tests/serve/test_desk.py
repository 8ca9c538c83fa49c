"""What the front desk accepts: so much as fits into the queue and the store, for each key and for all."""

import asyncio
import time

import pytest

from engine.errors import BadRequest, QueueFull, StoreFull, TooManyRequests
from engine.serve.archive import Archive, Options
from engine.serve.cluster import Snapshot
from engine.serve.desk import Desk, Limits
from engine.serve.keys import ANYBODY, Owner

ONE, TWO = Owner("one", 10_000), Owner("two", 10_000)


def told(of: dict[str, float], *, rate: float | None = 2.0, workers: int = 1) -> Snapshot:
    return Snapshot("g", {}, 0, (), sum(of.values()), of, rate, workers, 0.0, 0, 0)


@pytest.fixture
def desk(tmp_path):
    archive = Archive.open(tmp_path)
    yield Desk(archive, None, Limits(max_queue_megapixels=100.0, keep_free_bytes=0))
    archive.close()


def test_a_key_may_fill_half_of_the_queue(desk):
    desk.told = told({"one": 40.0})
    desk.check_room(ONE, num_bytes=1, megapixels=10)
    with pytest.raises(TooManyRequests, match="40 megapixels of this key wait, 50 are its share") as refused:
        desk.check_room(ONE, num_bytes=1, megapixels=11)
    assert refused.value.retry_after_s == pytest.approx(2.0)  # a tenth of it at 2 megapixels a second
    desk.check_room(TWO, num_bytes=1, megapixels=50)


def test_all_keys_together_may_fill_it(desk):
    desk.told = told({"one": 45.0, "two": 45.0})
    with pytest.raises(QueueFull, match="90 megapixels wait, 100 are the most"):
        desk.check_room(Owner("three", 10_000), num_bytes=1, megapixels=11)
    desk.check_room(Owner("three", 10_000), num_bytes=1, megapixels=10)


def test_without_keys_one_may_fill_all_of_it(desk):
    desk.told = told({"anybody": 80.0})
    desk.check_room(ANYBODY, num_bytes=1, megapixels=20)
    with pytest.raises(QueueFull):
        desk.check_room(ANYBODY, num_bytes=1, megapixels=21)


def test_a_picture_larger_than_the_queue_is_taken_when_nothing_waits(desk):
    desk.told = told({})
    desk.check_room(ONE, num_bytes=1, megapixels=1000)


def test_what_was_just_accepted_counts_before_the_scheduler_tells_of_it(desk):
    desk.told = told({})
    desk._fresh["p"] = "one", 45.0
    with pytest.raises(TooManyRequests):
        desk.check_room(ONE, num_bytes=1, megapixels=10)


def test_bytes_of_a_key_and_of_the_disk(desk, monkeypatch):
    with pytest.raises(StoreFull, match="10,001 bytes are needed for this key's pictures, it may have 10,000"):
        desk.check_room(ONE, num_bytes=10_001)
    monkeypatch.setattr("engine.serve.desk.free_bytes", lambda path: 500)
    with pytest.raises(StoreFull, match="600 bytes are needed, 500 are free"):
        desk.check_room(ONE, num_bytes=600)


def test_ready_means_that_work_would_be_done(desk, monkeypatch):
    assert not desk.is_ready  # nobody has told anything yet
    desk.told, desk.told_at = told({}), time.monotonic()
    assert desk.is_ready
    desk.told = told({}, workers=0)
    assert not desk.is_ready
    desk.told, desk.told_at = told({}), time.monotonic() - 60
    assert not desk.is_ready
    desk.told_at = time.monotonic()
    monkeypatch.setattr("engine.serve.desk.free_bytes", lambda path: -1)
    assert not desk.is_ready


def test_tokens_open_one_job(desk):
    assert desk.is_token("a", desk.token("a"))
    assert not desk.is_token("b", desk.token("a"))
    assert not desk.is_token("a", "")
    assert desk.token("a") == Desk(desk.archive, None, desk.limits).token("a")  # after the next start, too


def test_after_one_found_no_room_others_are_refused_before_their_bodies(desk):
    read: list[bytes] = []

    async def body():
        read.append(b"--b--\r\n")
        yield b"--b--\r\n"

    def submit(owner: Owner) -> None:
        asyncio.run(
            desk.submit(
                owner,
                body(),
                content_type="multipart/form-data; boundary=b",
                content_length=7,
                idempotency_key=None,
                parse_options=lambda _: Options(),
            )
        )

    desk.told = told({"one": 45.0})
    desk._shed["one"] = 8.0  # the smallest that was refused after its body was read
    with pytest.raises(TooManyRequests):
        submit(ONE)
    assert not read
    with pytest.raises(BadRequest):  # another key's body is read
        submit(TWO)
    assert len(read) == 1
    desk.told = told({"one": 41.0})  # room for one as small
    with pytest.raises(BadRequest):
        submit(ONE)
    assert len(read) == 2
    assert "one" not in desk._shed
