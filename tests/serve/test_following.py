"""The desk and the scheduler, without Ray: what one tells the other arrives, whatever fails between."""

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import BodyTooLarge, NotFound, NotReady, StorageError, StoreFull, TooManyRequests
from engine.geometry import Size
from engine.serve.app import result
from engine.serve.archive import Archive, End, Job, Options, Picture, new_id
from engine.serve.cluster import Report, Scheduler
from engine.serve.desk import Desk, Limits, _Upload
from engine.serve.gallery import exported
from engine.serve.keys import ANYBODY, Keys, Owner
from engine.serve.queue import Began, Kind, Task
from engine.serve.told import described
from engine.tiling.grid import Grid
from tests.serve.test_archive import job, picture, upload

GRID = Grid(Size(40, 80))
EQUAL = replace(picture("q"), work=picture("p").work)


class Handle:
    """Calls the methods of a scheduler as those of a deployment are called."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.scheduler, name))

    async def work_off(self) -> None:
        report: Report | None = None
        while self.scheduler._queue.megapixels_left:
            task, _ = await self.scheduler.take("w", report)
            report = Report(Began(GRID, frozenset(GRID.all_keys())) if task.kind is Kind.BEGIN else None, task)
            if task.kind is Kind.FINISH:
                await self.scheduler.leave("w", report)


@pytest.fixture
def desk(tmp_path):
    archive = Archive.open(tmp_path)
    yield Desk(archive, Handle(), Limits(keep_free_bytes=0, max_bytes=1000))
    archive.close()


def accept(desk: Desk, *names: str) -> None:
    for name in names:
        desk.archive.accept(upload(desk.archive), picture(name), job(f"job of {name}", name))


def test_an_end_that_the_disk_refuses_is_stored_later(desk, monkeypatch):
    accept(desk, "p", "q")

    async def run() -> None:
        await desk._follow_once()
        await desk.scheduler.work_off()
        with monkeypatch.context() as patch:
            patch.setattr("engine.serve.archive.write_atomic", full)
            for _ in range(3):
                desk.told = None
                await desk._follow_once()
                assert desk.told is not None  # of the others, all is known
        assert desk.archive.ends == {}
        await desk._follow_once()

    def full(*_: object) -> None:
        raise OSError("full")

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"p", "q"}


def test_a_picture_whose_folder_someone_removed_holds_no_other_up(desk):
    accept(desk, "p", "q")

    async def run() -> None:
        await desk._follow_once()
        await desk.scheduler.work_off()
        shutil.rmtree(desk.archive.folder("p"))
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"p", "q"}


def test_a_lost_answer_loses_no_end(desk):
    accept(desk, "p")

    async def run() -> None:
        await desk._follow_once()
        await desk.scheduler.work_off()
        await desk.scheduler.scheduler.snapshot([], *desk._known)  # its answer does not arrive
        await desk._follow_once()
        assert desk.archive.ends.keys() == {"p"}
        accept(desk, "q")
        await desk._add([picture("q")])
        await desk.scheduler.work_off()
        await desk.scheduler.scheduler.snapshot([], *desk._known)
        await desk.scheduler.scheduler.snapshot([], *desk._known)
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"p", "q"}


def test_a_new_scheduler_is_told_and_heard(desk):
    accept(desk, "p", "q")

    async def run() -> None:
        await desk._follow_once()
        await desk.scheduler.work_off()
        await desk._follow_once()
        accept(desk, "r")
        desk.scheduler = Handle()
        await desk._follow_once()  # it is told of r
        await desk.scheduler.work_off()
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"p", "q", "r"}


def test_what_a_sweep_stumbles_over_does_not_end_the_sweeping(desk, monkeypatch):
    monkeypatch.setattr("engine.serve.desk.SWEEP_S", 0.01)
    swept: list[float] = []

    async def sweep(now: float) -> int:
        swept.append(now)
        raise OSError("full")

    async def run() -> None:
        monkeypatch.setattr(Desk, "sweep", lambda _, now: sweep(now))
        sweeping = asyncio.create_task(desk.keep_clean())
        while len(swept) < 3:
            await asyncio.sleep(0.01)
        assert not sweeping.done()
        sweeping.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_job_is_deleted_once_however_often_and_whether_the_scheduler_answers_or_not(desk):
    accept(desk, "p")

    async def silent(_: str) -> None:
        raise ConnectionError

    async def run() -> None:
        desk.scheduler.scheduler.drop = silent
        found = desk.job("job of p", None)
        await asyncio.gather(desk.delete(found), desk.delete(found))

    asyncio.run(run())
    assert desk.archive.pictures == {}
    with pytest.raises(NotFound):
        desk.job("job of p", None)


def test_a_report_counts_for_its_own_task_alone():
    """The answer with task B was lost: the worker tells of task A once more, and B is not done by that."""

    async def run() -> None:
        scheduler = Scheduler()
        await scheduler.add([("a", "x", 1.0), ("b", "x", 1.0)])
        first, _ = await scheduler.take("w", None)
        report = Report(Began(GRID, frozenset(GRID.all_keys())), first)
        lost, _ = await scheduler.take("w", report)
        again, _ = await scheduler.take("w", report)
        assert isinstance(lost, Task)
        assert replace(again, number=lost.number) == lost
        await scheduler.leave("w", Report(task=again))
        assert scheduler._queue.num_workers == 0

    asyncio.run(run())


def test_clients_are_told_of_the_output_and_not_of_what_it_counts(desk):
    accept(desk, "p")
    assert picture("p").megapixels == 0.5
    assert described(desk, desk.job("job of p", None)).megapixels == 0.003  # 40 x 80 px


def test_one_request_sent_twice_at_once_is_one_job(desk, monkeypatch):
    monkeypatch.setattr(Desk, "_probed", lambda *_: picture("p"))
    owner = Owner("a")
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx\r\n--b--\r\n'

    async def sent():
        yield body

    async def submit() -> Any:
        return await desk.submit(
            owner,
            sent(),
            content_type="multipart/form-data; boundary=b",
            content_length=len(body),
            idempotency_key="k",
            parse_options=lambda _: Options(),
        )

    async def run() -> list[Any]:
        return await asyncio.gather(*(submit() for _ in range(5)))

    told = asyncio.run(run())
    assert len({found.id for found, _ in told}) == 1
    assert sum(is_new for _, is_new in told) == 1


def test_too_long_a_body_is_refused_by_what_it_says(desk):
    async def never():
        raise AssertionError("read")
        yield b""

    with pytest.raises(BodyTooLarge, match="1,001 bytes are to come, 1,000 are the most"):
        asyncio.run(
            desk.submit(
                Owner("a"),
                never(),
                content_type="multipart/form-data; boundary=b",
                content_length=1001,
                idempotency_key=None,
                parse_options=lambda _: Options(),
            )
        )


def test_a_picture_that_is_sent_again_while_it_is_deleted_is_done(desk, monkeypatch):
    """Removing its files may take long; by then the same picture may have been accepted anew."""
    accept(desk, "p")
    remove = Archive.drop

    async def run() -> None:
        await desk._follow_once()
        loop = asyncio.get_running_loop()

        def slow(archive: Archive, name: str) -> str | None:
            dropped = remove(archive, name)
            archive.accept(upload(archive), EQUAL, job("another", "q"))
            asyncio.run_coroutine_threadsafe(desk._add([EQUAL]), loop).result()
            return dropped

        with monkeypatch.context() as patch:
            patch.setattr(Archive, "drop", slow)
            await desk.delete(desk.job("job of p", None))
        await desk.scheduler.work_off()
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.jobs.keys() == {"another"}
    assert desk.archive.ends.keys() == {"q"}


def test_the_end_of_a_deleted_picture_is_not_that_of_the_same_one_sent_again(desk):
    accept(desk, "p")

    async def run() -> None:
        await desk._follow_once()
        await desk.scheduler.work_off()  # it is done, and that is not known yet
        await desk.delete(desk.job("job of p", None))
        desk.archive.accept(upload(desk.archive), EQUAL, job("another", "q"))
        await desk._follow_once()
        assert desk.archive.ends == {}
        await desk._add([EQUAL])
        await desk.scheduler.work_off()
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"q"}


def test_a_job_that_was_told_as_accepted_is_not_cancelled_by_who_has_left_before(desk, monkeypatch):
    """The request is sent again while its job is on its way out: the answer is that job, kept, or another one."""
    keyed = replace(job("one"), idempotency_key="k")
    remove = Archive.drop

    def slow(archive: Archive, name: str) -> str | None:
        time.sleep(0.05)
        return remove(archive, name)

    async def submitted() -> Job:
        owner, sent = Owner("a"), _Upload("a", 0.5)
        desk._uploads.add(sent)
        made = replace(picture(new_id()), work="the same")
        found, _ = await desk._accept(owner, sent, upload(desk.archive), made, replace(keyed, id=new_id()))
        return found

    async def run() -> Job:
        first = await submitted()
        monkeypatch.setattr(Archive, "drop", slow)
        leaving = asyncio.create_task(desk.leave(first))
        await asyncio.sleep(0.01)
        again = await submitted()
        await leaving
        return again

    again = asyncio.run(run())
    assert again.id in desk.archive.jobs
    assert again.picture in desk.archive.pictures


def test_what_is_accepted_while_the_scheduler_dies_is_accepted_and_done(desk):
    async def dead(_: object) -> None:
        raise RuntimeError("the actor has died")

    async def run() -> None:
        await desk._follow_once()
        desk.scheduler.scheduler.add, add = dead, desk.scheduler.scheduler.add
        sent = _Upload("a", 0.5)
        found, is_new = await desk._accept(Owner("a"), sent, upload(desk.archive), picture("p"), job("one"))
        assert is_new
        assert found.id in desk.archive.jobs
        with pytest.raises(RuntimeError):
            await desk._follow_once()
        desk.scheduler.scheduler.add = add
        await desk._follow_once()
        await desk.scheduler.work_off()
        await desk._follow_once()

    asyncio.run(run())
    assert desk.archive.ends.keys() == {"p"}


def test_a_picture_that_is_there_already_needs_no_room_but_has_so_many_jobs_at_most(desk, monkeypatch):
    accept(desk, "p")
    desk.archive.end("p", End(1.0))
    desk.limits = replace(desk.limits, keep_free_bytes=1 << 60)

    async def sent(picture: Picture) -> Job:
        found, _ = await desk._accept(Owner("a"), _Upload("a", 0.5), upload(desk.archive), picture, job(new_id()))
        return found

    assert asyncio.run(sent(EQUAL)).picture == "p"
    with pytest.raises(StoreFull):
        asyncio.run(sent(picture("another")))
    monkeypatch.setattr("engine.serve.desk.MOST_JOBS_OF_A_PICTURE", 3)
    asyncio.run(sent(EQUAL))
    with pytest.raises(TooManyRequests, match="3 jobs are of this very picture, 3 are the most"):
        asyncio.run(sent(EQUAL))


@pytest.mark.parametrize("repeated", [False, True])
def test_who_leaves_cancels_only_what_nobody_has_sent_again(desk, repeated):
    async def run() -> None:
        first, is_new = await submitted()
        assert is_new
        if repeated:
            assert await submitted() == (first, False)
        await desk.leave(first)

    async def submitted() -> tuple[Job, bool]:
        owner, sent = Owner("a"), _Upload("a", 0.5)
        desk._uploads.add(sent)
        return await desk._accept(owner, sent, upload(desk.archive), picture("p"), replace(keyed, id=new_id()))

    keyed = replace(job("one"), idempotency_key="k")
    asyncio.run(run())
    assert len(desk.archive.jobs) == int(repeated)
    assert desk._repeated == set(desk.archive.jobs)


def test_a_file_that_is_there_is_sent_whatever_is_being_made(desk):
    """Neither who makes another file, nor a full disk, is in its way."""
    accept(desk, "p", "q")
    for name in "pq":
        desk.archive.end(name, End(1.0))
        (desk.archive.folder(name) / "out").mkdir()
    here = desk.archive.folder("p") / "out" / "restored.png"
    made: list[str] = []

    async def export(folder: Path, _: str, fmt: str) -> Path:
        made.append(fmt)
        path = exported(folder, fmt)
        path.write_bytes(b"file")
        return path

    state = SimpleNamespace(export=export, keys=Keys())
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))

    async def run() -> None:
        first, other = (desk.job(f"job of {name}", None) for name in "pq")
        assert Path((await result(request, desk, first, "png")).path) == here
        desk.limits = replace(desk.limits, keep_free_bytes=1 << 60)
        with pytest.raises(StoreFull):
            await result(request, desk, other, "png")
        async with desk._exporting[ANYBODY.name]:
            assert Path((await result(request, desk, first, "png")).path) == here

    asyncio.run(run())
    assert made == ["png"]


def test_a_file_can_be_made_however_much_waits(desk):
    accept(desk, "p")
    desk._fresh["another"] = "a", 2 * desk.limits.max_queue_megapixels

    async def run() -> None:
        async with desk.exporting(desk.job("job of p", None), Owner("a")):
            pass

    asyncio.run(run())


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_of_a_picture_that_is_deleted_there_is_no_file(desk, when):
    accept(desk, "p")
    desk.archive.end("p", End(1.0))
    (desk.archive.folder("p") / "out").mkdir()
    found = desk.job("job of p", None)

    async def export(folder: Path, _: str, fmt: str) -> Path:
        if when == "while":
            await desk.delete(found)
            raise StorageError("shards are missing")
        path = exported(folder, fmt)
        path.write_bytes(b"file")
        return path

    def measure(_: str) -> None:
        desk.archive.drop(found.id)

    async def run() -> None:
        if when == "before":
            await desk.delete(found)
        if when == "after":
            desk.archive.measure = measure
        with pytest.raises((NotFound, NotReady)):
            await result(request, desk, found, "png")

    state = SimpleNamespace(export=export, keys=Keys())
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    asyncio.run(run())
