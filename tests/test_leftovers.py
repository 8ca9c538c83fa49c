"""What may go is listed and removed; what is in use, not ours, or somebody's only copy stays."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UnreadableInput
from engine.geometry import Size
from engine.leftovers import QUIET_S, Sort, clean, stale
from engine.receipt import Job, announce, write_receipt
from engine.store import FileLock
from engine.tiling.canvas import Canvas
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from tests.outputs import FACTS

SIZE = Size(9, 12)
PLAN = Plan("a", SIZE, 3, "uint8", Grid(SIZE, 16, 32), "a", "none", "lite", "b", {"scale": 1}, 0, 0)
RANDOM = "0123456789abcdef" * 2
KEY = ShardKey(0, 0, 0)


def filled(out: Path) -> Canvas:
    canvas = Canvas.open(PLAN, out)
    canvas.write(KEY, np.full((9, 12, 3), 7, np.uint8))
    return canvas


def published(out: Path) -> Path:
    filled(out).publish(out / "a.zarr", replace=False)
    return out / "a.zarr"


def receive(canvas: Path) -> None:
    write_receipt(PLAN, {"ome-zarr": canvas}, Job(Path(__file__), None, canvas.parent, "a", ("ome-zarr",)), FACTS)


def age(path: Path) -> None:
    """As if nobody had touched it for long."""
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - 2 * QUIET_S,) * 2)


def names(out: Path) -> list[tuple[str, Sort]]:
    return [(str(left.path.relative_to(out)), left.sort) for left in stale(out)]


def everything(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def test_leftovers_of_every_sort_go_and_nothing_else(tmp_path):
    receive(published(tmp_path))
    kept = everything(tmp_path)
    filled(tmp_path).close()
    partials = [f"a.png.{RANDOM}.partial", f"a.png.{RANDOM}.partial.{RANDOM}.partial"]
    for name in (*partials, f"a.zarr/_engine/receipt.json.{RANDOM}.partial"):
        (tmp_path / name).write_bytes(b"half")
        age(tmp_path / name)
    old = published(tmp_path / "elsewhere")
    old.rename(tmp_path / f"a.zarr.{RANDOM}.replaced")
    (tmp_path / "elsewhere").rmdir()
    (tmp_path / f"a.png.{RANDOM}.replaced").write_bytes(b"old")
    (tmp_path / "a.png").write_bytes(b"new")
    (tmp_path / "a.zarr" / "_engine" / "scratch").mkdir()
    before, found = everything(tmp_path), stale(tmp_path)
    assert everything(tmp_path) == before  # listing changes nothing
    assert {(left.path.name, left.sort) for left in found} == {
        (PLAN.working_folder(tmp_path).name, Sort.IN_PROGRESS),
        (partials[0], Sort.PARTIAL),
        (partials[1], Sort.PARTIAL),
        (f"receipt.json.{RANDOM}.partial", Sort.PARTIAL),
        (f"a.zarr.{RANDOM}.replaced", Sort.REPLACED),
        (f"a.png.{RANDOM}.replaced", Sort.REPLACED),
        ("scratch", Sort.SCRATCH),
    }
    assert all(left.num_bytes > 0 for left in found if left.sort is not Sort.SCRATCH)
    assert list(clean(found)) == found
    assert everything(tmp_path) == kept | {"a.png"}
    assert stale(tmp_path) == []


def test_what_is_being_written_stays(tmp_path):
    with filled(tmp_path):
        partial = tmp_path / f"a.png.{RANDOM}.partial"
        partial.write_bytes(b"half")
        age(partial)
        (tmp_path / f"a.tif.{RANDOM}.replaced").write_bytes(b"old")
        (tmp_path / "a.tif").write_bytes(b"new")
        assert stale(tmp_path) == []
    assert len(stale(tmp_path)) == 3


def test_work_that_was_taken_up_since_it_was_listed_stays(tmp_path):
    filled(tmp_path).close()
    found = stale(tmp_path)
    with Canvas.open(PLAN, tmp_path) as canvas:
        assert list(clean(found)) == []
        assert canvas.is_done(KEY)


def test_a_fresh_partial_may_have_a_writer(tmp_path):
    partial = tmp_path / f"a.png.{RANDOM}.partial"
    partial.write_bytes(b"half")
    assert stale(tmp_path) == []
    age(partial)
    assert names(tmp_path) == [(partial.name, Sort.PARTIAL)]


def test_an_output_that_lost_its_name_in_a_swap_stays(tmp_path):
    """Killed between the two renames: the old output has a strange name, the new one none yet."""
    old = published(tmp_path).rename(tmp_path / f"a.zarr.{RANDOM}.replaced")
    filled(tmp_path).close()
    assert stale(tmp_path) == []
    filled(tmp_path).publish(tmp_path / "a.zarr", replace=False)
    assert not old.exists()  # the run that gave the name finished the swap


def test_a_canvas_that_waits_for_its_repair_stays(tmp_path):
    final = published(tmp_path)
    receive(final)
    final.rename(PLAN.working_folder(tmp_path))
    assert stale(tmp_path) == []
    (tmp_path / "a.json").unlink()
    assert stale(tmp_path) == []  # its copy inside still tells


@pytest.mark.parametrize(
    "name",
    [
        "a.0123456789abcdef.inprogress.zarr/notes.txt",
        "a.0123456789abcdef.inprogress.zarr/0/../mine/x",
        f"a.zarr.{RANDOM}.replaced/notes.txt",
        "a.png.partial",
        f"a.{RANDOM[:31]}.partial",
        "scratch/x",
        "a.replaced",
        "b.zarr/_engine/scratch/x",
    ],
)
def test_what_is_not_ours_stays(tmp_path, name):
    path = Path(os.path.normpath(tmp_path / name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    (tmp_path / "a.zarr").mkdir()
    age(tmp_path)
    assert stale(tmp_path) == []


def test_exports_go_with_the_unfinished_work_that_knows_them(tmp_path):
    published(tmp_path)
    job = Job(Path(__file__), None, tmp_path, "a", ("ome-zarr", "png"))
    (tmp_path / "a.png").write_bytes(b"in the receipt")
    write_receipt(PLAN, job.targets, job, FACTS)
    canvas = filled(tmp_path / "b")
    announce(canvas.scratch, {"png": tmp_path / "b" / "a.png"})
    (tmp_path / "b" / "a.png").write_bytes(b"in none")
    (tmp_path / "b" / "a.tif").write_bytes(b"mine")
    assert stale(tmp_path / "b") == []
    canvas.close()
    found = stale(tmp_path / "b")
    assert [left.sort for left in found] == [Sort.EXPORT, Sort.IN_PROGRESS]
    assert list(clean(found)) == found
    assert everything(tmp_path / "b") == {"a.tif"}
    scratch = tmp_path / "a.zarr" / "_engine" / "scratch"
    scratch.mkdir()
    announce(scratch, {"png": tmp_path / "a.png", "jpeg": tmp_path / "a.jpg"})
    (tmp_path / "a.jpg").write_bytes(b"in none")
    assert names(tmp_path) == [("a.jpg", Sort.EXPORT), ("a.zarr/_engine/scratch", Sort.SCRATCH)]


def test_links_stay(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    filled(elsewhere).close()
    out = tmp_path / "out"
    out.mkdir()
    (out / PLAN.working_folder(out).name).symlink_to(PLAN.working_folder(elsewhere))
    assert stale(out) == []


def test_half_a_removal_is_a_leftover(tmp_path):
    filled(tmp_path).close()
    folder = PLAN.working_folder(tmp_path)
    (folder / "_engine" / "plan.json").unlink()
    assert [left.path for left in clean(stale(tmp_path))] == [folder]
    folder.mkdir()
    assert [left.path for left in clean(stale(tmp_path))] == [folder]


def test_another_programs_lock_does_not_matter(tmp_path):
    filled(tmp_path).close()
    lock = FileLock.try_take(tmp_path / "other" / "lock")
    assert lock is not None
    assert len(stale(tmp_path)) == 1
    lock.release()


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(UnreadableInput, match="no folder"):
        stale(tmp_path / "gone")
