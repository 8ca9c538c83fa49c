"""A canvas on an object store: the bytes of a local one, several writers, and nothing touched that is recorded."""

import json
import threading

import numpy as np
import pytest

from engine.errors import StorageError
from engine.tiling.canvas import Canvas, damaged_metadata, stored_plan
from engine.tiling.execute import run
from engine.tiling.grid import ShardKey
from engine.tiling.layout import object_key, stored_metadata
from engine.tiling.pyramid import HalveShard
from engine.tiling.remote_canvas import RemoteCanvas
from tests.faults.storage_job import SMALL, picture

FIRST = ShardKey(0, 0, 0)
FIRST_OBJECT = object_key(0, 0, 0)


def pixels_of(key: ShardKey):
    return picture(SMALL)[SMALL.grid.box(key).slices]


def fill(canvas) -> list[str]:
    """Makes what is missing; the names of the shards that were computed."""
    half = HalveShard(canvas)
    ends = run(canvas, canvas.grid.all_keys(), lambda key: half(key) if key.level else pixels_of(key))
    return [end.key.name for end in ends if not end.reused]


def objects(prefix) -> dict[str, bytes]:
    return {key: prefix.get(key) for key in prefix.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    """Every file of the same output in a folder."""
    out = tmp_path_factory.mktemp("local")
    with Canvas.open(SMALL, out) as canvas:
        fill(canvas)
        canvas.publish(out / "scan.zarr", replace=False)
    return {
        path.relative_to(out / "scan.zarr").as_posix(): path.read_bytes()
        for path in (out / "scan.zarr").rglob("*")
        if path.is_file()
    }


def test_the_objects_are_the_files_of_a_local_canvas(prefix, local):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        assert len(fill(canvas)) == SMALL.grid.num_shards
        canvas.verify(canvas.grid.all_keys())
        assert objects(canvas.root) == local
        np.testing.assert_array_equal(canvas.read(SMALL.grid.box(FIRST)), pixels_of(FIRST))


def test_what_is_recorded_is_not_made_again(prefix, local):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        canvas.write(FIRST, pixels_of(FIRST))
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        again = fill(canvas)
        assert FIRST.name not in again
        assert len(again) == SMALL.grid.num_shards - 1
        assert objects(canvas.root) == local


def test_a_finished_canvas_is_loaded_and_cannot_be_written(prefix):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        fill(canvas)
        root = canvas.root
    loaded = RemoteCanvas.load(root)
    assert stored_plan(root) == SMALL
    assert damaged_metadata(root) == []
    assert stored_metadata(root).icc is None
    np.testing.assert_array_equal(loaded.read(SMALL.grid.box(FIRST)), pixels_of(FIRST))
    with pytest.raises(ValueError, match="read-only"):
        loaded.write(FIRST, pixels_of(FIRST))
    with pytest.raises(StorageError, match="not an output"):
        RemoteCanvas.load(prefix / "elsewhere")


def test_two_writers_of_everything_make_the_same_objects(prefix, local):
    """Both compute every shard, side by side."""
    done = []

    def write() -> None:
        with RemoteCanvas.open(SMALL, prefix) as canvas:
            half = HalveShard(canvas)
            for key in SMALL.grid.all_keys():
                canvas.write(key, half(key) if key.level else pixels_of(key))
            canvas.verify(canvas.grid.all_keys())
            done.append(objects(canvas.root))

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert done == [local, local]


def test_a_late_writer_of_the_same_bytes_changes_nothing(s3, prefix):
    with RemoteCanvas.open(SMALL, prefix) as first, RemoteCanvas.open(SMALL, prefix) as late:
        first.write(FIRST, pixels_of(FIRST))
        s3.requests.clear()
        late.write(FIRST, pixels_of(FIRST))
        changes = [request for request in s3.requests if request.method in ("PUT", "POST", "DELETE")]
        assert [request.status for request in changes] == [412, 412]


def test_a_late_writer_of_other_bytes_loses(prefix, local):
    with RemoteCanvas.open(SMALL, prefix) as first, RemoteCanvas.open(SMALL, prefix) as late:
        first.write(FIRST, pixels_of(FIRST))
        late.write(FIRST, pixels_of(FIRST) ^ 1)
        first.verify([FIRST])
        assert first.root.get(FIRST_OBJECT) == local[FIRST_OBJECT]


def test_bytes_without_a_record_are_replaced(prefix, local):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        canvas.root.put(FIRST_OBJECT, b"of an attempt that nothing is known of")
        canvas.write(FIRST, pixels_of(FIRST))
        canvas.verify([FIRST])
        assert canvas.root.get(FIRST_OBJECT) == local[FIRST_OBJECT]


def test_a_record_of_other_bytes_is_found_and_struck(prefix, local):
    """Two writers of other bytes, of whom the slower one's record meets the faster one's object."""
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        canvas.write(FIRST, pixels_of(FIRST) ^ 1)
        canvas.root.put(FIRST_OBJECT, local[FIRST_OBJECT])
        with pytest.raises(StorageError, match=r"1 of 12 shards .*0/0\.0"):
            canvas.verify([FIRST])
        canvas.write(FIRST, pixels_of(FIRST))
        canvas.verify([FIRST])
        assert objects(canvas.root)[f"_engine/ledger/{FIRST.name}.json"] == local[f"_engine/ledger/{FIRST.name}.json"]


def test_looking_for_a_record_deletes_none(s3, prefix):
    """Between the look and the deletion another writer might create it."""
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        s3.requests.clear()
        assert not any(canvas.is_done(key) for key in canvas.grid.all_keys())
        assert {request.method for request in s3.requests} == {"GET"}


@pytest.mark.parametrize("action", ["lose-answer", "lose-request", "busy", "busy-but-done"])
def test_no_lost_answer_changes_the_result(s3, prefix, local, action):
    faults = [s3.fail(action, "PUT", key, times=2) for key in ("/c/0/", "/ledger/", "zarr.json", "plan.json")]
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        fill(canvas)
        canvas.verify(canvas.grid.all_keys())
        assert objects(canvas.root) == local
    assert all(fault.met >= 2 for fault in faults)


def test_a_store_that_stays_busy_stops_the_job_with_a_sentence(s3, prefix, monkeypatch):
    monkeypatch.setattr("engine.objects.MAX_RETRIES", 1)
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        s3.fail("busy", "PUT", "/c/0/0/1", times=1000)
        with pytest.raises(StorageError, match="0/c/0/0/1: could not be written"):
            fill(canvas)
        s3.faults.clear()
        assert "0/0.0" not in fill(canvas)


def test_a_store_that_cannot_be_read_names_the_object(s3, prefix, monkeypatch):
    monkeypatch.setattr("engine.objects.MAX_RETRIES", 0)
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        fill(canvas)
        s3.fail("busy", "GET", FIRST_OBJECT, times=1000)
        with pytest.raises(StorageError, match=f"{FIRST_OBJECT}: could not be read"):
            canvas.read(SMALL.grid.box(FIRST))


def test_a_missing_shard_is_refused_not_black(prefix):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        fill(canvas)
        canvas.root.delete(FIRST_OBJECT)
        with pytest.raises(StorageError, match="missing or damaged"):
            canvas.read(SMALL.grid.box(FIRST))


def test_a_damaged_layout_is_made_again(prefix, local):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        fill(canvas)
        root = canvas.root
    root.put("1/zarr.json", json.dumps({}).encode())
    assert damaged_metadata(root) == [root / "1/zarr.json"]
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        assert fill(canvas) == []
        assert objects(root) == local


def test_discarding_leaves_nothing_here_or_there(prefix):
    canvas = RemoteCanvas.open(SMALL, prefix)
    fill(canvas)
    scratch = canvas.scratch
    assert scratch.is_dir()
    canvas.discard()
    assert objects(prefix) == {}
    assert not scratch.exists()


def test_a_canvas_with_damaged_metadata_is_not_read(prefix):
    with RemoteCanvas.open(SMALL, prefix) as canvas:
        root = canvas.root
    metadata = root.get("0/zarr.json")
    root.put("0/zarr.json", metadata.replace(b"zstd", b"gzip"))
    with pytest.raises(StorageError, match=r"0/zarr\.json: it and 0 more of the metadata files are not as they were"):
        RemoteCanvas.load(root)
    root.put("0/zarr.json", metadata)
    assert RemoteCanvas.load(root).plan == SMALL
