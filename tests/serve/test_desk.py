"""What the front desk accepts: so much as fits into the queue and the store, for each key and for all."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace

import cv2
import numpy as np
import pytest

from engine.errors import BadRequest, OutputTooLarge, QueueFull, StoreFull, TooManyPixels, TooManyRequests
from engine.geometry import Size
from engine.serve.archive import Archive, Job, Options
from engine.serve.cluster import Snapshot
from engine.serve.desk import MOST_STREAMS, Desk, Limits
from engine.serve.keys import ANYBODY, Owner
from engine.serve.queue import Progress, State
from tests.serve.test_archive import job, picture, upload

ONE, TWO = Owner("one", 10_000), Owner("two", 10_000)


def told(of: dict[str, float], *, rate: float | None = 2.0, workers: int = 1) -> Snapshot:
    return Snapshot("g", {}, 0, (), sum(of.values()), of, rate, workers, 0.0, 0, 0, 0.0)


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
        desk.check_room(ONE, num_bytes=10_001, megapixels=1)
    monkeypatch.setattr("engine.serve.desk.free_bytes", lambda path: 500)
    with pytest.raises(StoreFull, match="600 bytes are needed, 500 are free"):
        desk.check_room(ONE, num_bytes=600, megapixels=1)


def test_what_is_drawn_already_is_not_promised_again(desk, monkeypatch):
    archive = desk.archive
    archive.accept(upload(archive), replace(picture("p"), projected_bytes=1000), job("one"))
    monkeypatch.setattr("engine.serve.desk.free_bytes", lambda path: 1200)
    with pytest.raises(StoreFull, match="600 bytes are needed, 200 are free"):
        desk.check_room(ONE, num_bytes=600, megapixels=1)
    desk.told = replace(told({}), progress={"p": Progress(State.RUNNING, 0.8, None, None)})
    desk.check_room(ONE, num_bytes=600, megapixels=1)
    with pytest.raises(StoreFull, match="601 bytes are needed, 600 are free"):
        desk.check_room(ONE, num_bytes=601, megapixels=1)


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (Size(4000, 4000), Options(long_side_px=1000), None, ""),
        (Size(16000, 16000), Options(long_side_px=8000), None, ""),
        (Size(16000, 16000), Options(long_side_px=64), TooManyPixels, "256,000,000 are drawn at once, 33,554,432 are"),
        (Size(9000, 9000), Options(scale=16), OutputTooLarge, "20,736,000,000 pixels, 17,179,869,184 are the most"),
    ],
)
def test_what_would_take_too_long_or_too_much_is_refused_by_its_size(desk, size, options, error, message):
    if error is None:
        assert desk._output(size, options).long_side == options.long_side_px
    else:
        with pytest.raises(error, match=message):
            desk._output(size, options)


def test_options_that_came_first_are_looked_at_with_the_beginning(desk, tmp_path):
    picture = tmp_path / "image"
    picture.write_bytes(cv2.imencode(".png", np.zeros((3000, 3000), np.uint8))[1].tobytes())
    desk.limits = Limits(max_output_pixels=10**8)
    desk._check_beginning(picture, None)
    desk._check_beginning(picture, Options(scale=2))
    with pytest.raises(OutputTooLarge, match="144,000,000 pixels, 100,000,000 are the most"):
        desk._check_beginning(picture, Options(scale=4))


def test_streams_of_events_are_counted_for_each_key(desk):
    mine, others = (Job(str(n), owner.name, "p", "a.png", 1.0) for n, owner in enumerate((ONE, TWO)))
    with ExitStack() as streams:
        for _ in range(MOST_STREAMS):
            streams.enter_context(desk.watching(mine))
        with pytest.raises(TooManyRequests, match=f"{MOST_STREAMS} streams"), desk.watching(mine):
            pass
        with desk.watching(others):
            pass
    with desk.watching(mine):
        pass


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


def sent(desk: Desk, owner: Owner, body: AsyncIterator[bytes]):
    return desk.submit(
        owner,
        body,
        content_type="multipart/form-data; boundary=b",
        content_length=7,
        idempotency_key=None,
        parse_options=lambda _: Options(),
    )


def test_where_one_like_the_last_finds_no_room_no_body_is_read(desk):
    read: list[bytes] = []

    async def body():
        read.append(b"--b--\r\n")
        yield b"--b--\r\n"

    def submit(owner: Owner) -> None:
        asyncio.run(sent(desk, owner, body()))

    desk.told = told({"one": 45.0})
    desk._last["one"] = 8.0
    with pytest.raises(TooManyRequests):
        submit(ONE)
    assert not read
    with pytest.raises(BadRequest):  # another key's body is read
        submit(TWO)
    assert len(read) == 1
    desk.told = told({"one": 41.0})
    with pytest.raises(BadRequest):
        submit(ONE)
    assert len(read) == 2
    desk.told, desk._last["one"] = told({"one": 40.0}), 99.0  # one that is large does not keep all others out
    with pytest.raises(BadRequest):
        submit(ONE)
    assert len(read) == 3
    desk.told, desk._last = told({"one": 49.8}), {}  # nothing is smaller than what all are counted as
    with pytest.raises(TooManyRequests):
        submit(ONE)
    assert len(read) == 3


def test_room_is_kept_for_uploads_on_their_way(desk):
    async def run() -> None:
        read, more = asyncio.Event(), asyncio.Event()

        async def body():
            read.set()
            await more.wait()
            yield b"--b--\r\n"

        desk.told, desk._last = told({"one": 30.0}), {"one": 8.0}
        uploads = []
        for _ in range(2):
            uploads.append(asyncio.create_task(sent(desk, ONE, body())))
            await read.wait()
            read.clear()
        with pytest.raises(TooManyRequests):  # 30 wait, 16 come
            await sent(desk, ONE, body())
        desk.check_room(TWO, num_bytes=1, megapixels=50)
        more.set()
        for sending in uploads:
            with pytest.raises(BadRequest):
                await sending
        with pytest.raises(BadRequest):
            await sent(desk, ONE, body())

    asyncio.run(run())


def test_a_key_may_hold_half_of_the_uploads(desk):
    async def run() -> None:
        more = asyncio.Event()

        async def body():
            await more.wait()
            yield b"--b--\r\n"

        desk.told = told({})
        uploads = [asyncio.create_task(sent(desk, ONE, body())) for _ in range(desk.limits.max_waiting_uploads // 2)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests):
            await sent(desk, ONE, body())
        others = [asyncio.create_task(sent(desk, TWO, body())) for _ in uploads]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await sent(desk, Owner("three", 10_000), body())
        more.set()
        for sending in (*uploads, *others):
            with pytest.raises(BadRequest):
                await sending

    asyncio.run(run())
