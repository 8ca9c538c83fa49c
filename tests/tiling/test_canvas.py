"""One set per shard, records that tell the truth, and an output that is whole before it has its name."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from engine import store
from engine.errors import OutputBusy, OutputExists, StorageError, StorageReadOnly
from engine.geometry import Box, Size
from engine.tiling.canvas import Canvas, adding_to, damaged_metadata, stored_plan
from engine.tiling.durable import DurableStore
from engine.tiling.execute import run
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard
from engine.tiling.seal import seal, unseal

SIZE = Size(75, 100)


def make_plan(size: Size = SIZE, *, channels: int = 3, dtype: str = "uint8", name: str = "scan") -> Plan:
    return Plan(name, size, channels, dtype, Grid(size, 16, 32), "a", "none", "lite", "b", {"scale": 1}, 0, 0)


def make_picture(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    shape = (plan.size.h, plan.size.w, plan.channels)
    return rng.integers(0, np.iinfo(plan.dtype).max + 1, shape, plan.dtype)


def fill(canvas: Canvas, picture: np.ndarray) -> list:
    halve = HalveShard(canvas)

    def work(key: ShardKey) -> np.ndarray:
        return halve(key) if key.level else picture[canvas.grid.box(key).slices]

    return list(run(canvas, canvas.grid.all_keys(), work))


def published(plan: Plan, picture: np.ndarray, out: Path) -> Path:
    with Canvas.open(plan, out) as canvas:
        fill(canvas, picture)
        canvas.publish(out / f"{plan.name}.zarr", replace=False)
    return out / f"{plan.name}.zarr"


@pytest.mark.parametrize(
    ("size", "channels", "dtype"),
    [
        (Size(75, 100), 3, "uint8"),
        (Size(64, 64), 4, "uint16"),
        (Size(1, 1), 1, "uint8"),
        (Size(1, 131), 2, "uint8"),
        (Size(33, 31), 1, "uint16"),
    ],
)
def test_what_is_written_is_read(tmp_path, rng, size, channels, dtype):
    plan = make_plan(size, channels=channels, dtype=dtype)
    picture = make_picture(plan, rng)
    final = published(plan, picture, tmp_path)
    canvas = Canvas.load(final)
    assert canvas.plan == plan
    np.testing.assert_array_equal(canvas.read(Box.of(size)), picture)
    box = Box(0, size.w // 3, size.h // 2 + 1, size.w)
    np.testing.assert_array_equal(canvas.read(box), picture[box.slices])
    assert canvas.read(box).dtype == dtype
    plain = zarr.open_array(final, path="0", mode="r")  # without any code of ours
    np.testing.assert_array_equal(np.moveaxis(plain[...], 0, 2), picture)


def test_one_set_per_shard(tmp_path, rng, monkeypatch):
    plan = make_plan()
    sets = []
    real = DurableStore.set

    async def counted(self, key, value):
        sets.append(key)
        await real(self, key, value)

    with Canvas.open(plan, tmp_path) as canvas:
        monkeypatch.setattr(DurableStore, "set", counted)
        fill(canvas, make_picture(plan, rng))
        expected = [str(canvas.object_path(key).relative_to(canvas.root)) for key in plan.grid.all_keys()]
        assert sets == expected
        sets.clear()
        key = ShardKey(0, 2, 3)  # an edge shard, written again over an old object
        canvas.write(key, make_picture(plan, rng)[plan.grid.box(key).slices])
        assert sets == [str(canvas.object_path(key).relative_to(canvas.root))]


def test_records_hold_the_digest_of_the_files(tmp_path, rng):
    plan = make_plan()
    with Canvas.open(plan, tmp_path) as canvas:
        fill(canvas, make_picture(plan, rng))
        for key in plan.grid.all_keys():
            record = unseal((canvas.root / "_engine" / "ledger" / f"{key.name}.json").read_bytes())
            stored = canvas.object_path(key).read_bytes()
            assert record == {
                "key": key.name,
                "plan_id": plan.plan_id,
                "sha256": hashlib.sha256(stored).hexdigest(),
                "num_bytes": len(stored),
            }


def test_the_layout_is_whole_before_the_first_pixel(tmp_path):
    plan = make_plan(Size(75, 100))
    with Canvas.open(plan, tmp_path) as canvas:
        group = zarr.open_group(canvas.root, mode="r")
        assert sorted(group.array_keys()) == ["0", "1", "2", "3"]  # listed without a warning
        arrays = [group[str(level)] for level in range(4)]
        assert [array.shape for array in arrays] == [(3, 75, 100), (3, 38, 50), (3, 19, 25), (3, 10, 13)]
        assert {array.chunks for array in arrays} == {(3, 16, 16)}
        assert [array.shards for array in arrays] == [(3, 32, 32), (3, 32, 32), (3, 32, 32), (3, 16, 16)]
        assert {array.metadata.dimension_names for array in arrays} == {("c", "y", "x")}
        assert [codec.to_dict() for codec in arrays[0].compressors] == [
            {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
        ]


@pytest.mark.parametrize(
    ("channels", "dtype", "labels", "top"),
    [
        (3, "uint8", ["red", "green", "blue"], 255),
        (4, "uint16", ["red", "green", "blue", "alpha"], 65535),
        (1, "uint8", ["grey"], 255),
        (2, "uint16", ["grey", "alpha"], 65535),
    ],
)
def test_ome_zarr_metadata(tmp_path, channels, dtype, labels, top):
    plan = make_plan(Size(75, 100), channels=channels, dtype=dtype)
    with Canvas.open(plan, tmp_path) as canvas:
        ome = zarr.open_group(canvas.root, mode="r").attrs["ome"]
    assert ome["version"] == "0.5"
    [scales] = ome["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"]
    assert scales["name"] == "scan"
    for level, (dataset, size) in enumerate(zip(scales["datasets"], plan.grid.level_sizes, strict=True)):
        assert dataset["path"] == str(level)
        [transform] = dataset["coordinateTransformations"]
        assert transform["type"] == "scale"
        np.testing.assert_allclose(np.multiply(transform["scale"], (1, size.h, size.w)), (1, 75, 100), rtol=1e-15)
    assert [channel["label"] for channel in ome["omero"]["channels"]] == labels
    assert {channel["window"]["end"] for channel in ome["omero"]["channels"]} == {top}


def test_black_is_stored_and_resumes_as_done(tmp_path):
    plan = make_plan()
    black = np.zeros((75, 100, 3), np.uint8)
    with Canvas.open(plan, tmp_path) as canvas:
        assert not any(end.reused for end in fill(canvas, black))
        assert all(canvas.object_path(key).is_file() for key in plan.grid.all_keys())
    with Canvas.open(plan, tmp_path) as canvas:
        assert all(end.reused for end in fill(canvas, black))


def test_record_without_object_and_object_without_record_are_not_done(tmp_path, rng):
    plan, key = make_plan(), ShardKey(0, 1, 1)
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        assert not canvas.is_done(key)
        fill(canvas, picture)
        record = canvas.root / "_engine" / "ledger" / f"{key.name}.json"
        stored = canvas.object_path(key).read_bytes()
        canvas.object_path(key).unlink()
        assert not canvas.is_done(key)
        canvas.object_path(key).write_bytes(stored[:-1])
        assert not canvas.is_done(key)
        record.write_text(record.read_text().replace(hashlib.sha256(stored).hexdigest(), "0" * 64))
        canvas.write(key, picture[plan.grid.box(key).slices])  # over a stale record and a cut object
        assert canvas.is_done(key)
        canvas.verify([key])
        assert canvas.object_path(key).read_bytes() == stored
        record.unlink()
        assert not canvas.is_done(key)


@pytest.mark.parametrize("shape", [(32, 31, 3), (32, 32, 4), (32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(tmp_path, shape):
    with Canvas.open(make_plan(), tmp_path) as canvas, pytest.raises(ValueError, match=r"shard 0/0\.0"):
        canvas.write(ShardKey(0, 0, 0), np.zeros(shape, np.uint8))


def test_other_types_are_refused(tmp_path):
    with Canvas.open(make_plan(), tmp_path) as canvas, pytest.raises(ValueError, match="uint16"):
        canvas.write(ShardKey(0, 0, 0), np.zeros((32, 32, 3), np.uint16))


def test_reading_what_is_not_there_is_an_error_not_black(tmp_path, rng):
    plan = make_plan()
    with Canvas.open(plan, tmp_path) as canvas:
        canvas.write(ShardKey(0, 0, 0), make_picture(plan, rng)[:32, :32])
        assert canvas.read(Box(0, 0, 32, 32)).shape == (32, 32, 3)
        with pytest.raises(StorageError, match=r"0/0\.1"):
            canvas.read(Box(0, 0, 32, 33))
        with pytest.raises(ValueError, match="inside"):
            canvas.read(Box(0, 0, 76, 1))


def test_a_second_opener_is_turned_away_until_the_first_closes(tmp_path):
    plan = make_plan()
    first = Canvas.open(plan, tmp_path)
    with pytest.raises(OutputBusy, match="another process"):
        Canvas.open(plan, tmp_path)
    Canvas.open(make_plan(name="other"), tmp_path).close()
    first.close()
    Canvas.open(plan, tmp_path).close()


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    plan = make_plan()
    code = (
        "import json, sys, time; from pathlib import Path; from engine.tiling.canvas import Canvas;"
        "from engine.tiling.plan import Plan;"
        "canvas = Canvas.open(Plan.from_json(json.loads(sys.argv[1])), Path(sys.argv[2]));"
        "print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(plan.to_json()), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(OutputBusy):
            Canvas.open(plan, tmp_path)
        holder.send_signal(signal.SIGKILL)
    Canvas.open(plan, tmp_path).close()


def test_plans_never_mix(tmp_path, rng):
    plan = make_plan()
    other = replace(plan, parameters={"scale": 1, "precision": "bf16"})
    with Canvas.open(plan, tmp_path) as canvas:
        fill(canvas, make_picture(plan, rng))
    with Canvas.open(other, tmp_path) as canvas:
        assert not any(canvas.is_done(key) for key in plan.grid.all_keys())
        assert not any(canvas.object_path(key).exists() for key in plan.grid.all_keys())


def test_anothers_plan_under_our_name_is_refused(tmp_path):
    plan = make_plan()
    Canvas.open(plan, tmp_path).close()
    root = plan.working_folder(tmp_path)
    other = replace(plan, model_sha256="c")
    (root / "_engine" / "plan.json").write_bytes(seal({"plan": other.to_json(), "metadata": {}}))
    with pytest.raises(OutputExists):
        Canvas.open(plan, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": None},
        {"plan": {}},
        {"metadata": 5},
        {"metadata": {"../../../secret": "x"}},
        {"metadata": {"/dev/zero": "x"}},
        {"metadata": {"0/c/zarr.json": "x"}},
        {"metadata": {"zarr.json\0": "x"}},
        {"metadata": {"9/zarr.json": "x"}},
    ],
)
def test_a_sealed_plan_that_is_none_is_not_believed(tmp_path, change):
    plan = make_plan()
    Canvas.open(plan, tmp_path).close()
    path = plan.working_folder(tmp_path) / "_engine" / "plan.json"
    stored = unseal(path.read_bytes())
    assert stored is not None
    path.write_bytes(seal(stored | change))
    assert stored_plan(plan.working_folder(tmp_path)) is None
    path.write_bytes(seal(stored))
    assert stored_plan(plan.working_folder(tmp_path)) == plan


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json", "_engine/zarr.json"])
def test_a_canvas_whose_metadata_were_changed_is_not_read(tmp_path, rng, name):
    plan = make_plan()
    final = published(plan, make_picture(plan, rng), tmp_path)
    path = final / name
    path.write_text(path.read_text() + " ")
    with pytest.raises(StorageError, match="engine verify"):
        Canvas.load(final)


def test_one_process_at_a_time_adds_to_a_published_canvas(tmp_path, rng):
    plan = make_plan()
    final = published(plan, make_picture(plan, rng), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in final.rglob("*") if path.is_file()}
    with adding_to(final) as canvas:
        (canvas.scratch / "mask.raw").touch()
        with pytest.raises(OutputBusy), adding_to(final):
            pass
    assert {path: path.stat().st_mtime_ns for path in final.rglob("*") if path.is_file()} == before
    assert not canvas.scratch.exists()
    with pytest.raises(ZeroDivisionError), adding_to(final):
        raise ZeroDivisionError
    assert not canvas.scratch.exists()
    with pytest.raises(ZeroDivisionError):
        begin(final)
    assert (canvas.scratch / "begun").exists()


def begin(final: Path) -> None:
    with adding_to(final) as canvas:
        (canvas.scratch / "begun").touch()
        raise ZeroDivisionError


def test_resume_removes_partials(tmp_path):
    plan = make_plan()
    Canvas.open(plan, tmp_path).close()
    left = plan.working_folder(tmp_path) / "0" / "c" / "0" / "0" / "1.0123.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a shard")
    Canvas.open(plan, tmp_path).close()
    assert not left.exists()


@pytest.mark.parametrize("place", ["data", "index"])
def test_a_flipped_byte_is_found_at_publish_named_and_repaired(tmp_path, rng, place):
    plan, key = make_plan(), ShardKey(0, 2, 1)
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        fill(canvas, picture)
        intact = canvas.object_path(key).read_bytes()
        flip(canvas.object_path(key), at=100 if place == "data" else len(intact) - 20)
        with pytest.raises(StorageError, match=r"0/2\.1"):
            canvas.publish(tmp_path / "scan.zarr", replace=False)
    assert not (tmp_path / "scan.zarr").exists()
    with Canvas.open(plan, tmp_path) as canvas:
        ends = fill(canvas, picture)
        assert [end.key for end in ends if not end.reused] == [key]
        assert canvas.object_path(key).read_bytes() == intact
        canvas.publish(tmp_path / "scan.zarr", replace=False)


@pytest.mark.parametrize("at", [100, -20])
def test_a_flipped_byte_is_found_by_whoever_reads_it(tmp_path, rng, at):
    """Else the pyramid would average the damage into shards whose digests are right."""
    plan, key = make_plan(), ShardKey(0, 0, 0)
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        for level_key in plan.grid.keys(0):
            canvas.write(level_key, picture[plan.grid.box(level_key).slices])
        flip(canvas.object_path(key), at=at)
        with pytest.raises(StorageError, match=r"0/0\.0"):
            HalveShard(canvas)(ShardKey(1, 0, 0))
        assert not canvas.is_done(key)
        canvas.write(key, picture[plan.grid.box(key).slices])
        flip(canvas.object_path(key), at=at)
        with pytest.raises(StorageError, match=r"0/0\.0"):
            canvas.read(Box(0, 0, 32, 32))
        assert next(end.key for end in fill(canvas, picture) if not end.reused) == key


def flip(path: Path, *, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_an_unfinished_canvas_is_not_published(tmp_path, rng):
    plan = make_plan()
    with Canvas.open(plan, tmp_path) as canvas:
        canvas.write(ShardKey(0, 0, 0), make_picture(plan, rng)[:32, :32])
        with pytest.raises(StorageError, match=r"17 of 18 shards .*0/0\.1"):
            canvas.publish(tmp_path / "scan.zarr", replace=False)
        assert canvas.is_done(ShardKey(0, 0, 0))


def test_publish_leaves_nothing_lying(tmp_path, rng):
    plan = make_plan()
    with Canvas.open(plan, tmp_path) as canvas:
        (canvas.scratch / "deep").mkdir()
        (canvas.scratch / "deep" / "rows").write_bytes(b"0")
        fill(canvas, make_picture(plan, rng))
        canvas.publish(tmp_path / "scan.zarr", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]
    left = sorted(path.name for path in (tmp_path / "scan.zarr" / "_engine").iterdir())
    assert left == ["ledger", "plan.json", "zarr.json"]


def test_finished_work_is_in_the_way_unless_it_is_to_be_replaced(tmp_path, rng):
    plan = make_plan()
    final = published(plan, make_picture(plan, rng), tmp_path)
    other = replace(plan, model_sha256="c")
    picture = make_picture(other, rng)
    with Canvas.open(other, tmp_path) as canvas:
        fill(canvas, picture)
        with pytest.raises(OutputExists, match="--replace"):
            canvas.publish(final, replace=False)
        assert stored_plan(final) == plan
        canvas.publish(final, replace=True)
    assert stored_plan(final) == other
    np.testing.assert_array_equal(Canvas.load(final).read(Box.of(plan.size)), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]


def test_a_published_output_cannot_be_written(tmp_path, rng):
    plan = make_plan()
    canvas = Canvas.load(published(plan, make_picture(plan, rng), tmp_path))
    before = canvas.object_path(ShardKey(0, 0, 0)).read_bytes()
    with pytest.raises(ValueError, match="read-only"):
        canvas.write(ShardKey(0, 0, 0), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        canvas.discard()
    assert canvas.is_done(ShardKey(0, 0, 0))
    assert canvas.object_path(ShardKey(0, 0, 0)).read_bytes() == before


def test_loading_something_else_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is not an output"):
        Canvas.load(tmp_path)


def test_a_half_laid_out_canvas_is_laid_out_again(tmp_path, rng):
    plan = make_plan()
    Canvas.open(plan, tmp_path).close()
    root = plan.working_folder(tmp_path)
    (root / "_engine" / "plan.json").unlink()
    (root / "1" / "zarr.json").write_text('{"zarr_for')
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        fill(canvas, picture)
        np.testing.assert_array_equal(canvas.read(Box.of(plan.size)), picture)


@pytest.mark.parametrize("name", ["zarr.json", "_engine/zarr.json", "0/zarr.json", "3/zarr.json", "_engine/plan.json"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_damaged_metadata_is_laid_out_again_and_no_shard_is_lost(tmp_path, rng, name, damage):
    plan = make_plan()
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        fill(canvas, picture)
    path = plan.working_folder(tmp_path) / name
    intact = path.read_bytes()
    if damage == "flip":
        flip(path, at=len(intact) // 3)
    else:
        path.unlink()
    if name == "_engine/plan.json":
        assert stored_plan(canvas.root) is None
    else:
        assert damaged_metadata(canvas.root) == [path]
    with Canvas.open(plan, tmp_path) as canvas:
        assert path.read_bytes() == intact
        assert all(end.reused for end in fill(canvas, picture))
        assert damaged_metadata(canvas.root) == []


def test_a_disk_that_cannot_be_read_names_the_shard(tmp_path, rng, monkeypatch):
    plan = make_plan()
    final = published(plan, make_picture(plan, rng), tmp_path)
    canvas, key = Canvas.load(final), ShardKey(0, 1, 2)

    async def failing(self, key, prototype=None, byte_range=None):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DurableStore, "get", failing)
    with pytest.raises(StorageError, match=r"0/c/0/1/2: Input/output error"):
        canvas.read(plan.grid.box(key))


def test_discard_removes_everything(tmp_path, rng):
    plan = make_plan()
    canvas = Canvas.open(plan, tmp_path)
    fill(canvas, make_picture(plan, rng))
    canvas.discard()
    assert list(tmp_path.iterdir()) == []
    Canvas.open(plan, tmp_path).close()


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageReadOnly, match="file"):
        Canvas.open(make_plan(), tmp_path / "file")


def test_reading_a_box_decodes_one_shard_at_a_time(tmp_path, rng, monkeypatch):
    """Zarr would fetch ten shards at once, whatever their size."""
    plan = make_plan(Size(96, 96))
    final = published(plan, make_picture(plan, rng), tmp_path)
    canvas = Canvas.load(final)
    running, most = set(), []
    real = DurableStore.get

    async def counted(self, key, prototype=None, byte_range=None):
        running.add(key)
        most.append(len(running))
        try:
            return await real(self, key, prototype, byte_range)
        finally:
            running.discard(key)

    monkeypatch.setattr(DurableStore, "get", counted)
    canvas.read(Box.of(plan.size))
    assert max(most) == 1
    assert len(most) >= plan.grid.num_shards_of(0)


def test_the_same_plan_gives_the_same_objects(tmp_path, rng):
    plan = make_plan()
    picture = make_picture(plan, rng)
    objects = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        final = published(plan, picture, tmp_path / name)
        objects.append({str(p.relative_to(final)): p.read_bytes() for p in final.rglob("*") if p.is_file()})
    assert objects[0] == objects[1]
    assert os.sep + "c" + os.sep in "".join(objects[0])
    assert store.remove_partials(tmp_path) == 0


def test_one_that_wakes_after_the_publication_leaves_nothing(tmp_path, rng):
    """It has drawn a shard, slept while another drew it and the output was published, and would store its own."""
    plan = make_plan()
    picture = make_picture(plan, rng)
    with Canvas.open(plan, tmp_path) as canvas:
        late = Canvas.join(plan, tmp_path)
        fill(canvas, picture)
        final = tmp_path / "scan.zarr"
        canvas.publish(final, replace=False)
    key = next(plan.grid.keys(0))
    with pytest.raises(StorageError, match="is not in progress any more"):
        late.write(key, picture[plan.grid.box(key).slices])
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]
