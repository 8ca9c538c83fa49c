"""What a service has accepted is there again after it was killed; what was cut short is not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import OutputBusy, StorageError
from engine.geometry import Size
from engine.serve.archive import Archive, End, Job, Options, Picture, stored_bytes, work_of
from engine.serve.queue import Failure


def upload(archive: Archive, text: bytes = b"pixels") -> Path:
    folder = archive.incoming()
    (folder / "image.png").write_bytes(text)
    return folder


def picture(name: str = "p", owner: str = "a") -> Picture:
    return Picture(
        name, f"work of {name}", owner, "image.png", None, Options(scale=4), Size(10, 20), Size(40, 80), 1000
    )


def job(name: str, of: str = "p", owner: str = "a", created: float = 1.0) -> Job:
    return Job(name, owner, of, "scan é.png", created)


def test_what_was_accepted_is_there_again(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.accept(upload(archive, b"other"), picture("q"), replace(job("two", "q"), idempotency_key="k"))
    archive.end("q", End(5.0, Failure("unreadable-input", "image.png: is not"), 7))
    archive.close()
    again = Archive.open(tmp_path)
    assert (again.pictures, again.jobs, again.ends) == (archive.pictures, archive.jobs, archive.ends)
    assert [each.id for each in again.unfinished()] == ["p"]
    assert (again.folder("p") / "image.png").read_bytes() == b"pixels"
    assert again.find_job("a", "k") == again.jobs["two"]
    assert again.find_job("b", "k") is None
    again.close()


def test_one_service_at_a_time(tmp_path):
    archive = Archive.open(tmp_path)
    with pytest.raises(OutputBusy, match="another service"):
        Archive.open(tmp_path)
    archive.close()
    Archive.open(tmp_path).close()


def test_equal_work_is_one_picture_until_its_last_job_goes(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    accepted = archive.accept(upload(archive), replace(picture("q"), work=picture().work), job("two", "q"))
    assert accepted == archive.jobs["two"] == job("two", "p")
    assert len(archive.pictures) == 1
    assert list((tmp_path / "incoming").iterdir()) == []
    assert archive.drop("one") is None
    assert archive.folder("p").exists()
    assert archive.drop("two")[0] == "p"
    assert not archive.folder("p").exists()
    assert list((tmp_path / "jobs").iterdir()) == []
    archive.close()


def test_a_reduction_counts_as_much_as_is_read_for_it():
    assert replace(picture(), size=Size(4000, 2000)).megapixels == 8.0
    assert replace(picture(), output=Size(4000, 2000)).megapixels == 8.0


def test_what_is_equal():
    same = work_of("a", "1" * 64, None, Options(scale=4), model_sha256="m")
    assert same == work_of("a", "1" * 64, None, Options(scale=4), model_sha256="m")
    others = [
        work_of("b", "1" * 64, None, Options(scale=4), model_sha256="m"),
        work_of("a", "2" * 64, None, Options(scale=4), model_sha256="m"),
        work_of("a", "1" * 64, "3" * 64, Options(scale=4), model_sha256="m"),
        work_of("a", "1" * 64, None, Options(scale=2), model_sha256="m"),
        work_of("a", "1" * 64, None, Options(scale=4), model_sha256="n"),
    ]
    assert len({same, *others}) == 6


def test_what_was_cut_short_is_removed(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    upload(archive)  # killed while it was received
    archive.accept(upload(archive), picture("q"), job("two", "q"))
    archive.accept(upload(archive), picture("r"), job("three", "r"))
    archive.close()
    (tmp_path / "jobs" / "two.json").unlink()  # killed before the job's record was stored
    damaged = tmp_path / "jobs" / "three.json"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (tmp_path / "pictures" / "p" / "out").mkdir()
    for name in ("restored.ozx.1.partial", "out/restored.tif.2.partial"):  # killed while files were made
        (tmp_path / "pictures" / "p" / name).write_bytes(b"half")
    again = Archive.open(tmp_path)
    assert set(again.jobs) == {"one"}
    assert set(again.pictures) == {"p"}
    assert list(again.folder("p").rglob("*.partial")) == []
    assert list((tmp_path / "incoming").iterdir()) == []
    again.close()


def test_a_picture_whose_folder_lost_its_record_is_no_job(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.close()
    (tmp_path / "pictures" / "p" / "picture.json").unlink()
    again = Archive.open(tmp_path)
    assert (again.jobs, again.pictures) == ({}, {})
    again.close()


def test_bytes_and_age(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.accept(upload(archive), picture("q", "b"), job("two", "q", "b"))
    assert archive.bytes_of("a") == 1000  # at most, while it is under way
    stored = stored_bytes(archive.folder("p"))
    archive.end("p", End(100.0, None, stored))
    assert archive.bytes_of("a") == stored < 1000
    assert [each.id for each in archive.expired(100.5)] == ["one"]
    archive.accept(upload(archive), picture(), job("late", created=100.4))
    assert [each.id for each in archive.expired(100.45)] == ["one", "late"]
    assert [each.id for each in archive.expired(100.3)] == ["one"]  # asked for after its end
    assert archive.expired(99.5) == []
    archive.close()


def test_what_a_worker_wrote_after_a_picture_was_dropped_is_swept_away(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    late = archive.folder("dropped") / "out"
    late.mkdir(parents=True)
    archive.tidy()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["p"]
    assert list((tmp_path / "incoming").iterdir()) == []
    archive.close()


def test_a_picture_whose_job_could_not_be_stored_is_none(tmp_path, monkeypatch):
    archive = Archive.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_job_path", lambda _: tmp_path / "lock" / "one.json")  # which is no folder
        with pytest.raises(StorageError):
            archive.accept(upload(archive), picture(), job("one"))
    assert (archive.pictures, archive.unfinished()) == ({}, [])
    assert [*(tmp_path / "incoming").iterdir(), *(tmp_path / "pictures").iterdir()] == []
    archive.accept(upload(archive), picture(), job("one"))
    assert [each.id for each in archive.unfinished()] == ["p"]
    archive.close()


@pytest.mark.parametrize(("code", "again"), [("storage-full", True), ("process-died", True), ("mask-mismatch", False)])
def test_sent_again_a_picture_is_done_again_unless_it_failed_for_what_it_is(tmp_path, code, again):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.end("p", End(1.0, Failure(code, "why")))
    assert archive.needs_work(picture().work) is again
    archive.accept(upload(archive), picture(), job("two"))
    assert [each.id for each in archive.unfinished()] == ["p"] * again
    archive.close()
    opened = Archive.open(tmp_path)
    assert [each.id for each in opened.unfinished()] == ["p"] * again
    opened.close()


def test_files_added_to_a_picture_count(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.end("p", End(1.0, None, stored_bytes(archive.folder("p"))))
    before = archive.bytes_of("a")
    (archive.folder("p") / "export.tif").write_bytes(bytes(5000))
    archive.measure("p")
    assert archive.bytes_of("a") >= before + 5000
    archive.close()


def test_the_end_of_a_dropped_picture_is_nothing(tmp_path):
    archive = Archive.open(tmp_path)
    archive.accept(upload(archive), picture(), job("one"))
    archive.drop("one")
    archive.end("p", End(1.0))
    assert archive.ends == {}
    shutil.rmtree(tmp_path / "jobs")
    archive.close()
