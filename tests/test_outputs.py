"""Outputs in sub-folders are verified, signed and cleaned as others are, and no output is taken for a folder."""

import os
from pathlib import Path

import pytest
from PIL import Image

from engine.credentials import sign_outputs
from engine.errors import UnreadableInput
from engine.leftovers import Sort, clean, stale
from engine.outputs import batch_lock, output_folders, runs_batch
from engine.receipt import Job, write_receipt
from engine.store import FileLock
from engine.tiling.canvas import Canvas
from engine.upkeep import verify_outputs
from tests.outputs import FACTS
from tests.test_leftovers import PLAN, RANDOM, age, filled, published

SUBFOLDERS = ("", "1890", "1890/glass plates", "x.iiif", "y.zarr")
"""The last two only look like outputs."""


def archive(out: Path) -> Path:
    """A picture, published and with a PNG, in every folder."""
    for name in SUBFOLDERS:
        published(out / name)
        Image.new("RGB", (4, 4)).save(out / name / "a.png")
        targets = {"ome-zarr": out / name / "a.zarr", "png": out / name / "a.png"}
        job = Job(Path(__file__), None, out / name, "a", tuple(targets))
        write_receipt(PLAN, targets, job, FACTS)
    return out


def test_folders_are_walked_in_order_and_outputs_are_not_gone_into(tmp_path):
    out = archive(tmp_path / "out")
    (out / "a.iiif" / "0,0,4,4").mkdir(parents=True)
    (out / "a.iiif" / "info.json").write_text("{}")
    (out / "foreign.zarr" / "0").mkdir(parents=True)
    (out / "foreign.zarr" / "zarr.json").write_text("{}")
    filled(out / "1890").close()
    for name in (f"a.iiif.{RANDOM}.partial", f"a.zarr.{RANDOM}.replaced", "_batch/catalog", "1890/_engine"):
        (out / name / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    (out / "loop").symlink_to(out)
    assert [str(folder.relative_to(out)) for folder in output_folders(out)] == [".", *SUBFOLDERS[1:]]


def test_damage_in_a_sub_folder_is_found(tmp_path):
    archive(tmp_path)
    verdicts = list(verify_outputs([tmp_path]))
    assert {str(verdict.path.relative_to(tmp_path)) for verdict in verdicts} == {
        str(Path(name, "a.zarr")) for name in SUBFOLDERS
    }
    assert all(verdict.intact for verdict in verdicts)
    (tmp_path / "1890" / "glass plates" / "a.png").write_bytes(b"other")
    [bad] = [verdict for verdict in verify_outputs([tmp_path]) if not verdict.intact]
    assert bad.path.parent == tmp_path / "1890" / "glass plates"
    assert [problem.name for problem in bad.problems] == ["png"]


def test_outputs_in_sub_folders_are_signed(tmp_path, monkeypatch):
    archive(tmp_path)
    asked: list[tuple[Path, str]] = []

    def sign(output: Path, document, **_files) -> Path:
        asked.append((output, document["outputs"]["png"]["name"]))
        return output

    monkeypatch.setattr("engine.credentials.write_credentials", sign)
    list(sign_outputs(tmp_path, certificates=tmp_path, key=tmp_path))
    assert asked == [(tmp_path / name / "a.png", "a.png") for name in SUBFOLDERS]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableInput, match="0 receipts"):
        list(sign_outputs(tmp_path / "empty", certificates=tmp_path, key=tmp_path))


def leave(out: Path) -> set[str]:
    """What killed runs leave, and a batch that was killed."""
    filled(out / "1890").close()
    partials = [f"1890/b.png.{RANDOM}.partial", f"_batch/catalog/part-1.{RANDOM}.partial"]
    for name in partials:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
        age(out / name)
    (out / "_batch" / "catalog" / "part-x.parquet").write_bytes(b"kept")
    return {*partials, str(PLAN.working_folder(out / "1890").relative_to(out))}


def test_leftovers_in_sub_folders_and_of_a_batch_go(tmp_path):
    left = leave(tmp_path)
    before = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    found = stale(tmp_path)
    assert {str(leftover.path.relative_to(tmp_path)) for leftover in found} == left
    assert {leftover.sort for leftover in found} == {Sort.IN_PROGRESS, Sort.PARTIAL}
    assert list(clean(found)) == found
    gone = before - {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {name for name in gone if not name.startswith(min(left) + os.sep)} >= left
    assert (tmp_path / "_batch" / "catalog" / "part-x.parquet").exists()


@pytest.mark.parametrize("where", ["", "out", "out/1890"])
def test_nothing_is_stale_while_a_batch_is_at_work(where, tmp_path):
    """The batch's folder may be the one that is cleaned, one above, or one below, which then is left alone."""
    out = tmp_path / "out"
    leave(out)
    all_of_it = stale(out)
    lock = FileLock.try_take(batch_lock(tmp_path / where))
    assert lock is not None
    listed = [] if where != "out/1890" else [left for left in all_of_it if "1890" not in left.path.parts]
    assert stale(out) == listed
    assert list(clean(all_of_it)) == listed  # listed before the batch began: looked at once more
    assert runs_batch(out / "1890" / "b.png")
    lock.release()
    assert len(stale(out)) == len(all_of_it) - len(listed)
    assert not runs_batch(out / "1890" / "b.png")


def test_a_canvas_in_a_sub_folder_that_is_being_written_stays(tmp_path):
    leave(tmp_path)
    with Canvas.open(PLAN, tmp_path / "1890"):
        assert [left.sort for left in stale(tmp_path)] == [Sort.PARTIAL, Sort.PARTIAL]
