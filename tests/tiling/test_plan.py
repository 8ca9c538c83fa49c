"""A plan is named by what changes its pixels, and is refused before anything is written."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import NotEnoughDisk, NotEnoughMemory, StorageReadOnly
from engine.geometry import Size
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan, canvas_bytes, validate

SIZE = Size(100, 70)
PLAN = Plan(
    name="scan",
    size=SIZE,
    channels=3,
    dtype="uint8",
    grid=Grid(SIZE, 16, 32),
    input_sha256="a" * 64,
    mask_sha256="none",
    model="lite",
    model_sha256="b" * 64,
    parameters={"scale": 4, "precision": "fp32", "noise": 0.5},
    projected_ram_bytes=1000,
    projected_disk_bytes=2000,
)

OTHER_PIXELS = [
    {"size": Size(70, 100), "grid": Grid(Size(70, 100), 16, 32)},
    {"channels": 4},
    {"dtype": "uint16"},
    {"grid": Grid(SIZE, 32, 32)},
    {"grid": Grid(SIZE, 16, 64)},
    {"input_sha256": "c" * 64},
    {"mask_sha256": "c" * 64},
    {"model": "full"},
    {"model_sha256": "c" * 64},
    {"parameters": {"scale": 4, "precision": "fp32"}},
    {"parameters": {"scale": 4, "precision": "bf16", "noise": 0.5}},
    {"parameters": {"scale": 4, "precision": "fp32", "noise": 0.25}},
]
SAME_PIXELS = [{"name": "copy"}, {"projected_ram_bytes": 1}, {"projected_disk_bytes": 1}]


def test_every_change_of_pixels_is_another_plan():
    ids = {replace(PLAN, **change).plan_id for change in OTHER_PIXELS}
    assert len(ids | {PLAN.plan_id}) == len(OTHER_PIXELS) + 1


@pytest.mark.parametrize("change", SAME_PIXELS)
def test_the_rest_is_not(change):
    assert replace(PLAN, **change).plan_id == PLAN.plan_id


def test_the_order_of_parameters_does_not_matter():
    turned = dict(reversed(PLAN.parameters.items()))
    assert replace(PLAN, parameters=turned).plan_id == PLAN.plan_id


def test_json_round_trip():
    again = Plan.from_json(json.loads(json.dumps(PLAN.to_json())))
    assert again == PLAN
    assert again.plan_id == PLAN.plan_id


HUGE = Size(1 << 20, 1 << 20)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"size": Size(1, 1)},
        {"size": Size(1, 2 << 20), "grid": Grid(Size(1, 2 << 20))},
        {"size": HUGE, "grid": Grid(HUGE, 512, 512)},
        {"channels": 5},
        {"channels": 0},
        *({"name": name} for name in ("../up", "", ".", "..", "a\0output", "output" * 50)),
    ],
)
def test_impossible_plans(change):
    with pytest.raises(ValueError, match="output"):
        replace(PLAN, **change)


def test_the_largest_output_is_possible():
    assert replace(PLAN, size=HUGE, grid=Grid(HUGE)).grid.num_shards > 1 << 18


@pytest.mark.parametrize(
    "change",
    [
        *({"size_px": size} for size in ([1.5, 2.5], ["a", 1], [True, 1], [1], 7, None, [10**12, 10**12], [0, 0])),
        *({name: value} for name in ("channels", "chunk_px", "projected_ram_bytes") for value in ("x", None, 1.5)),
        *({name: 7} for name in ("name", "dtype", "input_sha256", "model")),
        *({"parameters": value} for value in (None, [1], "ab", {"scale": None}, {"scale": [4]})),
        *({"name": name} for name in ("..", "a\0", "\ud800")),
        {"more": 1},
    ],
)
def test_what_is_no_plan_is_not_read_as_one(change):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Plan.from_json(PLAN.to_json() | change)


def test_canvas_bytes_is_the_size_of_the_arrays():
    arrays = [np.zeros((size.h, size.w, 4), np.uint16) for size in PLAN.grid.level_sizes]
    assert canvas_bytes(PLAN.grid, 4, "uint16") == sum(array.nbytes for array in arrays)


def test_a_plan_that_fits_is_accepted_and_writes_nothing(tmp_path):
    validate(PLAN, out=tmp_path / "new" / "out", max_memory_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_too_much_memory_names_both_numbers(tmp_path):
    with pytest.raises(NotEnoughMemory, match=r"1,000 bytes.* 999 "):
        validate(PLAN, out=tmp_path, max_memory_bytes=999)


def _disk_with(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, free))


def test_too_little_disk_names_both_numbers(tmp_path, monkeypatch):
    needed = 2000 + (64 << 20)
    _disk_with(monkeypatch, needed)
    validate(PLAN, out=tmp_path, max_memory_bytes=None)
    _disk_with(monkeypatch, needed - 1)
    with pytest.raises(NotEnoughDisk, match=f"{needed:,} bytes .*{needed - 1:,} "):
        validate(PLAN, out=tmp_path / "new", max_memory_bytes=None)


def test_what_is_stored_already_needs_no_space_again(tmp_path, monkeypatch):
    """The last shard of a large picture must be resumable on the disk that the others have filled."""
    stored = PLAN.working_folder(tmp_path) / "0" / "shard"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(os.urandom(1 << 20))
    os.sync()
    plan = replace(PLAN, projected_disk_bytes=2 << 20)
    _disk_with(monkeypatch, (65 << 20) + 65536)
    validate(plan, out=tmp_path, max_memory_bytes=None)
    with pytest.raises(NotEnoughDisk):
        validate(replace(plan, name="another"), out=tmp_path, max_memory_bytes=None)


def test_below_a_regular_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageReadOnly, match="file"):
        validate(PLAN, out=tmp_path / "file" / "out", max_memory_bytes=None)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_refuses_everybody():
    with pytest.raises(StorageReadOnly, match="/sys/kernel"):
        validate(PLAN, out=Path("/sys/kernel/new-output"), max_memory_bytes=None)
