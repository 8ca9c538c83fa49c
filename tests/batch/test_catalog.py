"""No row is lost, torn, or read twice: whatever ends a writer or a merge, and whoever looks meanwhile."""

import hashlib
import logging
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context

import numpy as np
import pytest

import engine.batch.parts
from engine.batch import catalog
from engine.batch.catalog import CatalogWriter, Row, add_reviews, catalog_folder, load_catalog, merge, read_catalog
from engine.batch.parts import REVIEWED, ROWS, Output, list_parts
from engine.batch.rebuild import rebuild
from engine.batch.reviews import import_reviews
from engine.errors import OutputBusy, PlanError, StorageError
from engine.geometry import Size
from engine.outputs import batch_lock
from engine.receipt import Job, write_receipt
from engine.store import FileLock
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan
from tests.outputs import FACTS

MOMENT = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)


def row(name: str = "a", **changes: object) -> Row:
    made = Row(
        name=name,
        image=f"/in/{name}.tif",
        image_bytes=1 << 40,
        image_mtime_ns=1_795_000_000_123_456_789,
        mask=None,
        mask_bytes=0,
        mask_mtime_ns=0,
        request_id="r" * 64,
        status="done",
        reason=None,
        message=None,
        plan_id="p" * 64,
        image_sha256="s" * 64,
        outputs=(Output("png", "a.png", "d" * 64, 77), Output("iiif", "a.iiif", None, None)),
        megapixels=1.5,
        generated_share=0.25,
        seconds=3.5,
        attempts=1,
        finished=MOMENT,
    )
    return replace(made, **changes)


def refused(name: str) -> Row:
    why = {"status": "refused", "reason": "unreadable-input", "message": f"{name}: damaged. Scan it anew."}
    return row(name, **why, plan_id=None, image_sha256=None, outputs=())


def write(out, *rows: Row) -> None:
    with CatalogWriter(out) as writer:
        for each in rows:
            writer.add(each)


def parts(out) -> list[str]:
    return sorted(path.name for path in catalog_folder(out).iterdir())


@pytest.mark.parametrize(
    "made",
    [
        row(),
        refused("a"),
        row(
            "1890/scan 7", mask="s3://bucket/m.png", mask_bytes=3, mask_mtime_ns=4, review="rejected", note="dünn; «x»"
        ),
        row(
            "line\nbreak\ttab",
            image="/in/\udcff\udc80 name \udce9.png",
            outputs=(Output("png", "\udcff.png", None, 1),),
        ),
        row("\U0001f5bc \u202e", message="a\udc80b\x01"),
    ],
)
def test_a_row_comes_back_as_it_was(made, tmp_path):
    write(tmp_path, made, row("another"))
    assert read_catalog(tmp_path) == {made.name: made, "another": row("another")}
    assert [field.name for field in fields(Row)] == ROWS.schema.names
    assert isinstance(read_catalog(tmp_path)["another"].outputs[0], Output)


def test_the_newest_row_of_a_name_counts(tmp_path):
    write(tmp_path, refused("a"), row("b"), row("a", attempts=2))
    assert read_catalog(tmp_path)["a"].attempts == 2
    write(tmp_path, row("b", seconds=9.0))
    # by the order of writing, not by clocks, which differ between machines
    write(tmp_path, row("b", seconds=1.0, finished=MOMENT - timedelta(days=1)))
    assert read_catalog(tmp_path)["b"].seconds == 1.0


def test_no_catalog_is_an_empty_one(tmp_path):
    assert read_catalog(tmp_path) == {}
    write(tmp_path)
    assert not catalog_folder(tmp_path).exists()


def test_parts_are_written_when_they_are_full_and_superseded_while_they_are_not(tmp_path):
    with CatalogWriter(tmp_path, every_rows=10, every_s=0.05) as writer:
        for number in range(10):
            writer.add(row(str(number)))
        assert len(parts(tmp_path)) == 1
        for number in range(10, 15):
            writer.add(row(str(number)))
            deadline = time.monotonic() + 20
            while str(number) not in read_catalog(tmp_path):  # on the disk in time, though nothing more is added
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert len(parts(tmp_path)) == 2
    assert len(read_catalog(tmp_path)) == 15


def test_rows_are_stored_when_the_driver_fails(tmp_path):
    with suppress(RuntimeError), CatalogWriter(tmp_path) as writer:
        writer.add(row())
        raise RuntimeError
    assert set(read_catalog(tmp_path)) == {"a"}


def test_a_disk_that_refuses_is_told_and_the_rows_are_kept(tmp_path, monkeypatch):
    with CatalogWriter(tmp_path, every_s=0.02) as writer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(catalog, "write_part", _refusing)
            writer.add(row("a"))
            while writer._error is None:
                time.sleep(0.01)
        with pytest.raises(StorageError, match="refused"):
            writer.add(row("b"))
    assert set(read_catalog(tmp_path)) == {"a", "b"}


def _refusing(*_arguments, **_keywords):
    raise StorageError("refused")


def test_killed_writers_lose_at_most_what_was_not_stored(tmp_path):
    """SIGKILL at random moments; every full part is there, and nothing is torn."""
    stored = 0
    for seed in range(6):
        child = get_context("fork").Process(target=_write_for_ever, args=(tmp_path, seed))
        child.start()
        until = time.monotonic() + 20
        while len(read_catalog(tmp_path)) <= stored and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(random.Random(seed).uniform(0, 0.05))
        child.kill()
        child.join()
        found = load_catalog(tmp_path)
        assert found.damaged == ()
        numbers = {int(name.split("-")[1]) for name in found.rows if name.startswith(f"{seed}-")}
        assert numbers == set(range(len(numbers)))  # the first ones, without a gap
        assert len(found.rows) > stored
        stored = len(found.rows)


def _write_for_ever(out, seed: int) -> None:
    with CatalogWriter(out, every_rows=20) as writer:
        for number in range(10**6):
            writer.add(row(f"{seed}-{number}"))
            time.sleep(0.001)


def test_merged_is_the_same(tmp_path):
    for number in range(5):
        write(tmp_path, *(row(str(name), attempts=number) for name in range(number, number + 3)))
    before = read_catalog(tmp_path)
    path = merge(tmp_path)
    assert parts(tmp_path) == [path.name]
    assert read_catalog(tmp_path) == before
    assert merge(tmp_path) == path
    write(tmp_path, row("0", attempts=9))
    assert read_catalog(tmp_path)["0"].attempts == 9
    merge(tmp_path)
    assert read_catalog(tmp_path) == before | {"0": row("0", attempts=9)}


def test_nothing_merged_is_an_empty_part(tmp_path):
    assert merge(tmp_path).exists()
    assert read_catalog(tmp_path) == {}


@pytest.mark.parametrize("step", range(1, 12))
def test_a_merge_killed_at_any_step_changes_nothing(step, tmp_path, monkeypatch):
    for number in range(4):
        write(tmp_path, *(row(str(name), attempts=number) for name in range(number, number + 2)))
    add_reviews(tmp_path, {"1": ("accepted", "good")})
    before = read_catalog(tmp_path)
    steps = iter(range(1, 100))

    def stop(*_arguments):
        if next(steps) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr("engine.store.hit", stop)  # opening, writing, fsync, rename ...
    monkeypatch.setattr("engine.batch.parts.fsync_folder", stop)  # ... and after each part that is removed
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path)
    assert read_catalog(tmp_path) == before
    monkeypatch.undo()
    merge(tmp_path)
    assert read_catalog(tmp_path) == before


def test_readers_and_merges_beside_a_writer_see_every_row_that_was_stored(tmp_path):
    ended = threading.Event()
    faults: list[str] = []

    def look() -> None:
        most = 0
        while not ended.is_set():
            found = load_catalog(tmp_path)
            if len(found.rows) < most or found.damaged:
                faults.append(f"{len(found.rows)} rows after {most}; {found.damaged}")
            most = len(found.rows)

    def fold() -> None:
        while not ended.is_set():
            merge(tmp_path)

    threads = [threading.Thread(target=work) for work in (look, fold)]
    for thread in threads:
        thread.start()
    with CatalogWriter(tmp_path, every_rows=7, every_s=0.01) as writer:
        for number in range(400):
            writer.add(row(str(number)))
            writer.add(row("again", attempts=number))
            time.sleep(0.001)
    ended.set()
    for thread in threads:
        thread.join()
    assert faults == []
    found = read_catalog(tmp_path)
    assert len(found) == 401
    assert found["again"].attempts == 399


def test_a_scan_that_a_merge_overtook_is_made_again(tmp_path, monkeypatch):
    """It may have passed the place of the merged part before that was there, and those of its sources after."""
    for name in "abc":
        write(tmp_path, row(name))
    real, folder = engine.batch.parts._listed, catalog_folder(tmp_path)
    scans = [real(folder, ROWS), (set(), [])]
    merge(tmp_path)
    monkeypatch.setattr("engine.batch.parts._listed", lambda *given: scans.pop(0) if scans else real(*given))
    assert set(read_catalog(tmp_path)) == set("abc")


def test_every_changed_byte_of_a_part_is_noticed(tmp_path):
    write(tmp_path, row("kept"))
    write(tmp_path, row("lost"))
    path = list_parts(catalog_folder(tmp_path), ROWS)[1].path
    intact = path.read_bytes()
    rng = random.Random(0)
    spoilt = [intact[:cut] for cut in (0, 1, len(intact) // 2, len(intact) - 1)]
    for _ in range(60):
        changed = bytearray(intact)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        spoilt.append(bytes(changed))
    for data in spoilt:
        path.write_bytes(data)
        found = load_catalog(tmp_path)
        assert (set(found.rows), found.damaged) == ({"kept"}, (path,))


def test_damaged_and_foreign_parts_are_named_and_stay(tmp_path, caplog):
    write(tmp_path, row("a"))
    write(tmp_path, row("b"))
    folder = catalog_folder(tmp_path)
    torn = list_parts(folder, ROWS)[0].path
    torn.write_bytes(torn.read_bytes()[:-3])
    foreign = folder / "part-x.parquet"
    foreign.write_bytes(b"PAR1")
    (folder / f"part-1.{'0' * 32}.partial").write_bytes(b"half")
    assert load_catalog(tmp_path).damaged == (torn, foreign)
    with caplog.at_level(logging.WARNING):
        assert set(read_catalog(tmp_path)) == {"b"}
    assert torn.name in caplog.text
    assert foreign.name in caplog.text
    merge(tmp_path)
    assert torn.exists()
    assert foreign.exists()
    assert set(read_catalog(tmp_path)) == {"b"}


def restored(out, name: str, *, seed: int = 0) -> Plan:
    """A receipt as a run leaves it."""
    size = Size(20, 30)
    folder, stem = (out / name).parent, (out / name).name
    plan = Plan(stem, size, 3, "uint8", Grid(size, 16, 32), f"{seed:064x}", "none", "lite", "b", {"scale": 1}, 0, 0)
    job = Job(out / "in.png", None, folder, stem, ("png",))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.png").write_bytes(np.random.default_rng(seed).bytes(50))
    source = {"name": "in.png", "sha256": f"{seed:064x}", "bytes": 9, "digest_of": "file"}
    write_receipt(plan, job.targets, job, FACTS | {"input": source, "generated": FACTS["generated"] | {"share": 0.5}})
    return plan


def test_a_lost_catalog_is_rebuilt_from_the_receipts(tmp_path):
    plans = {name: restored(tmp_path, name, seed=seed) for seed, name in enumerate(["a", "1890/b", "1890/x/c.tif"])}
    (tmp_path / "notes.json").write_text("{}")
    assert rebuild(tmp_path) == 3
    rows = read_catalog(tmp_path)
    assert {name: found.plan_id for name, found in rows.items()} == {n: plan.plan_id for n, plan in plans.items()}
    found = rows["1890/b"]
    assert (found.status, found.image, found.image_bytes, found.image_sha256) == ("done", "in.png", 9, f"{1:064x}")
    assert (found.megapixels, found.generated_share) == (0.0006, 0.5)
    assert [(output.format, output.name, output.num_bytes) for output in found.outputs] == [("png", "b.png", 50)]
    before = parts(tmp_path)
    assert rebuild(tmp_path) == 0
    assert parts(tmp_path) == before
    restored(tmp_path, "a", seed=7)
    assert rebuild(tmp_path) == 1


def test_what_the_catalog_knows_of_a_receipt_is_not_forgotten(tmp_path):
    plan = restored(tmp_path, "a")
    rebuild(tmp_path)
    known = replace(read_catalog(tmp_path)["a"], seconds=4.5, request_id="r")
    write(tmp_path, known)
    assert rebuild(tmp_path) == 0
    assert read_catalog(tmp_path)["a"] == known
    write(tmp_path, refused("a"))
    assert rebuild(tmp_path) == 1
    assert read_catalog(tmp_path)["a"].plan_id == plan.plan_id


def test_no_catalog_is_rebuilt_under_a_running_batch(tmp_path):
    restored(tmp_path, "a")
    lock = FileLock.try_take(batch_lock(tmp_path))
    assert lock is not None
    with pytest.raises(OutputBusy):
        rebuild(tmp_path)
    lock.release()
    assert rebuild(tmp_path) == 1


@pytest.mark.parametrize("separator", [",", ";"])
def test_reviews_come_from_a_spreadsheet(separator, tmp_path):
    write(tmp_path, row("a"), row("1890/b"), row("c"))
    table = tmp_path / "reviews.csv"
    lines = ["name,review,note", "1890/b,Accepted,", 'c,rejected,"too, smooth\nhere"', ""]
    text = "\r\n".join(lines).replace(",", separator).replace(f"too{separator}", "too,")
    table.write_text(text, encoding="utf-8-sig", newline="")
    assert import_reviews(tmp_path, table) == 2
    found = read_catalog(tmp_path)
    assert [(found[name].review, found[name].note) for name in ("a", "1890/b", "c")] == [
        ("pending", None),
        ("accepted", None),
        ("rejected", "too, smooth\nhere"),
    ]
    table.write_text("name,review\nc,pending\n")
    import_reviews(tmp_path, table)
    assert read_catalog(tmp_path)["c"].review == "pending"
    before = read_catalog(tmp_path)
    merge(tmp_path)
    assert read_catalog(tmp_path) == before


def test_a_review_is_of_one_output(tmp_path):
    write(tmp_path, row("a"))
    add_reviews(tmp_path, {"a": ("accepted", None)})
    write(tmp_path, row("a", attempts=2))  # the same plan: the same output
    assert read_catalog(tmp_path)["a"].review == "accepted"
    merge(tmp_path)
    write(tmp_path, row("a", plan_id="q"))
    assert read_catalog(tmp_path)["a"].review == "pending"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,review\na,accepted\nx,accepted\n", "line 3: 'x' is not in the catalog"),
        ("name,review\na,good\n", "line 2: 'good' is not one of pending, accepted, rejected"),
        ("name,review\na\n", "line 2: '' is not one of"),
        ("name,review\na,accepted\na,rejected\n", "line 3: 'a' was reviewed in an earlier line"),
        ("name;verdict\na;accepted\n", "has the columns name, verdict; give it name and review"),
        ("", "has the columns none"),
        ('name,review\n"a,accepted\n', "is no CSV file"),
        (b"name,review\n\xff,accepted\n", "is no CSV file in UTF-8"),
        ("name,review\n" + "y,accepted\n" * 30, "30 lines cannot be taken.*and 10 more"),
    ],
)
def test_reviews_that_cannot_be_taken_are_all_named_and_none_is_stored(text, said, tmp_path):
    write(tmp_path, row("a"))
    table = tmp_path / "reviews.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=said):
        import_reviews(tmp_path, table)
    assert list_parts(catalog_folder(tmp_path), REVIEWED) == []
    with pytest.raises(PlanError, match="cannot be read"):
        import_reviews(tmp_path, tmp_path / "missing.csv")


def test_many_rows_are_read_in_little_time_and_memory(tmp_path):
    """In a process of its own, since memory that once was used stays with one."""
    program = "\n".join(
        [
            "import sys, time, resource",
            "from pathlib import Path",
            "from engine.batch.catalog import merge, read_catalog",
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024",
            "before, started = peak(), time.process_time()",
            "rows = read_catalog(Path(sys.argv[1]))",
            "print(len(rows), time.process_time() - started, peak() - before)",
        ]
    )
    with CatalogWriter(tmp_path) as writer:
        for number in range(20_000):
            digests = [hashlib.sha256(f"{number} {part}".encode()).hexdigest() for part in range(4)]
            outputs = (Output("png", f"{number}.png", digests[0], 1), Output("iiif", f"{number}.iiif", digests[1], 2))
            writer.add(row(str(number), plan_id=digests[2], image_sha256=digests[3], outputs=outputs))
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    num_rows, seconds, megabytes = map(float, done.stdout.split())
    assert num_rows == 20_000
    assert seconds < 1  # on a busy core; 0.3 on an idle one
    assert megabytes < 50
