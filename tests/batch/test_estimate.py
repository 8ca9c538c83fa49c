"""What many pictures would take is what a run of each would be allowed, and it is known from headers alone."""

import faulthandler
import os
import re
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import engine.isolate
from engine import image
from engine.batch.estimate import Estimate, Refused, check_disk, estimate, to_text
from engine.batch.inputs import find_inputs
from engine.cli import app
from engine.errors import DecoderCrashed, NotEnoughDisk
from engine.isolate import probe_many_in_child
from engine.models.checkpoint import load
from engine.planning import disk_bytes, kept_bytes
from engine.receipt import Job
from engine.request import Request
from engine.restoration import Restorer
from engine.tiling.grid import Grid
from tests.networks import TINY, random_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture
def one_core(monkeypatch):
    """The commands take every processor, which others may be using."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three good pictures, of which two have a mask, and one of each kind that is refused."""
    folder = tmp_path_factory.mktemp("in")
    for name, h, w in [("a", 30, 40), ("sub/b", 300, 200), ("sub/c", 64, 64), ("wrong", 10, 10), ("many", 100, 3000)]:
        write(folder / "in" / f"{name}.png", h, w)
    for name, h, w in [("a", 30, 40), ("sub/b", 300, 200), ("sub/c", 64, 64), ("wrong", 11, 10), ("many", 100, 3000)]:
        write(folder / "masks" / f"{name}.png", h, w)
    (folder / "in" / "bad.png").write_text("no picture")
    (folder / "in" / "worse.png").touch()
    write(folder / "masks" / "bad.png", 1, 1)
    write(folder / "masks" / "worse.png", 1, 1)
    write(folder / "in" / "unmasked.png", 5, 5)
    return folder


def write(path: Path, h: int, w: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((h, w, 3), np.uint8))


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def total_of(pictures: Path, model: str, *, mask: str | None = None, **request: object) -> Estimate:
    items = find_inputs([str(pictures / "in")], out=None, mask=mask or str(pictures / "masks"))
    card = load(model).card
    return estimate(items, Request(**request), card, out=pictures / "out", formats=("png",), max_pixels=100_000)


def test_sums_are_those_of_the_plans_of_each(model, pictures, one_core):
    total = total_of(pictures, model, scale=2)
    restorer = Restorer(model=model)
    plans = [
        restorer.plan(
            Job(pictures / "in" / name, pictures / "masks" / name, pictures, Path(name).stem, ("png",)),
            Request(scale=2),
        )[0]
        for name in ("a.png", "sub/b.png", "sub/c.png")
    ]
    assert total.num_pictures == 8
    assert total.input_pixels == 30 * 40 + 300 * 200 + 64 * 64
    assert total.output_pixels == sum(plan.size.num_pixels for plan in plans) == 4 * total.input_pixels
    assert total.num_shards == sum(plan.grid.num_shards for plan in plans)
    assert total.ram_bytes == max(plan.projected_ram_bytes for plan in plans)
    assert total.kept_bytes == 4 * total.output_pixels  # a PNG, and the map of what was generated
    assert total.disk_bytes(1) == total.kept_bytes + total.passing_bytes < sum(p.projected_disk_bytes for p in plans)
    assert total.disk_bytes(100) >= sum(plan.projected_disk_bytes for plan in plans)
    assert 0 < total.kept_operations < total.operations


def test_what_would_be_refused_is_listed_by_its_reason(model, pictures):
    total = total_of(pictures, model)
    assert {code: (refused.count, refused.first) for code, refused in total.refused.items()} == {
        "unreadable-input": (2, ["bad", "worse"]),
        "mask-mismatch": (1, ["wrong"]),
        "too-many-pixels": (1, ["many"]),
        "mask-unavailable": (1, ["unmasked"]),
    }
    assert total.exit_code == 3
    too_large = total_of(pictures, model, mask="none", max_memory_bytes=1)
    assert too_large.refused["not-enough-memory"].count == 5
    assert len(too_large.refused["not-enough-memory"].first) == 3
    assert Estimate(refused={"plan": Refused(1, ["a"], as_planned=True)}).exit_code == 4
    assert Estimate().exit_code == 0


def test_what_is_copied_costs_the_network_nothing(model, pictures):
    assert total_of(pictures, model, mask="none").operations == 0
    assert total_of(pictures, model, mask="none", scale=2).operations > 0
    assert total_of(pictures, model).operations > 0


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("formats", [("ome-zarr",), ("png",), ("ome-zarr", "png", "tiff"), ("iiif", "jpeg")])
def test_what_stays_is_a_part_of_what_is_needed(formats, has_mask):
    layout = image.ArrayPicture(np.zeros((300, 200, 3), np.uint16))
    grid = Grid(layout.size.scaled(8))
    kept = kept_bytes(layout, grid, has_mask=has_mask, formats=formats)
    needed = disk_bytes(layout, grid, has_mask=has_mask, formats=formats)
    flat = grid.size.num_pixels * 6
    pyramid = sum(size.num_pixels for size in grid.level_sizes) * 6
    each = {"ome-zarr": pyramid, "tiff": pyramid}
    assert kept == sum(each.get(fmt, flat) for fmt in formats) + (grid.size.num_pixels if has_mask else 0)
    staged = layout.size.num_pixels * (6 + 2 * has_mask) + int(0.3 * layout.size.num_pixels * 6) * has_mask
    step = 0 if "ome-zarr" in formats else pyramid
    on_its_way = flat if formats != ("ome-zarr",) else grid.size.num_pixels * has_mask
    assert needed == kept + step + staged + on_its_way


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    check_disk(Estimate(num_pictures=3), tmp_path, num_workers=1)
    with pytest.raises(NotEnoughDisk, match="3 pictures need up to"):
        check_disk(Estimate(num_pictures=3, kept_bytes=1 << 60), tmp_path, num_workers=1)
    with pytest.raises(NotEnoughDisk):
        check_disk(Estimate(num_pictures=3, passing_bytes=1 << 60), tmp_path, num_workers=1)


def test_hours_are_for_here_and_for_workers(tmp_path):
    refused = {"x": Refused(5, ["a\n", "b", "c"])}
    total = Estimate(num_pictures=9, operations=7.2e9, kept_operations=6e9, refused=refused)
    text = to_text(total, out=tmp_path, here_per_s=1e6, core_per_s=5e5, num_workers=8, speed=2.5)
    assert "2.00 hours of network time on this machine" in text
    assert "0.20 hours of network time with 8 workers, each 2.5 x as fast as one core here" in text
    assert "20 % more work" in text
    assert "9, of which 4 can be restored" in text
    assert r"5 x: a\n, b, c, ..." in text
    assert "workers" not in to_text(total, out=tmp_path, here_per_s=1, core_per_s=1, num_workers=None, speed=1)


def test_a_header_that_kills_its_reader_costs_no_other_picture(tmp_path, monkeypatch):
    """The server of this test forks readers that die of one file."""
    for name in "abc":
        write(tmp_path / f"{name}.png", 4, 5)
    probe = image.probe

    def hostile(path, **options):
        if path.name == "b.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return probe(path, **options)

    monkeypatch.setattr(engine.isolate, "probe", hostile)
    monkeypatch.setattr(engine.isolate, "in_child", in_fork)
    found = probe_many_in_child([tmp_path / f"{name}.png" for name in "abc"])
    assert [type(one) for one in found] == [image.ImageInfo, DecoderCrashed, image.ImageInfo]
    assert probe_many_in_child([]) == []


def in_fork(function, /, *arguments, subject, limits=None, **keywords):
    """As `in_child`, but of this process, so that what a test has replaced is replaced there too."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # it is to crash, and nobody wants to read of it
        try:
            function(*arguments, **keywords)
        except Exception:
            os._exit(0)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise DecoderCrashed(f"{subject}: a decoder crashed")
    return function(*arguments, **keywords)


def test_plan_of_many_pictures_is_a_table_and_writes_nothing(model, pictures, one_core):
    before = sorted(pictures.rglob("*"))
    arguments = ["plan", pictures / "in", "--mask", pictures / "masks", "--model", model, "--scale", 4]
    done = call(*arguments, "--out", pictures / "out", "--workers", 4, "--speed", 2)
    assert done.exit_code == 3, done.output
    assert re.search(r"pictures +8, of which 4 can be restored", done.stdout)
    for part in ("mask-mismatch: wrong", "mask-unavailable: unmasked", "shards", "GiB are free", "for one process"):
        assert part in done.stdout
    assert "with 4 workers, each 2 x as fast" in done.stdout
    assert sorted(pictures.rglob("*")) == before
    done = call("plan", pictures / "in" / "sub", "--model", model, "--out", pictures / "out", "--max-memory", "1MB")
    assert done.exit_code == 4
    assert "not-enough-memory: b, c" in done.stdout
    done = call("plan", pictures / "in", "--model", model, "--out", pictures / "in" / "out")
    assert done.exit_code == 4
    assert "inside the input folder" in done.stderr


def test_restore_mirrors_the_sub_folders_and_tells_each_picture(model, pictures, tmp_path, one_core):
    arguments = ["restore", pictures / "in", "--out", tmp_path, "--mask", pictures / "masks", "--model", model]
    done = call(*arguments, "--format", "png", "--max-pixels", 100_000)
    assert done.exit_code == 3
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = ("a", "sub/b", "sub/c")
    made = {name for name in made if not name.startswith("_batch/")}
    assert made == {name + suffix for name in names for suffix in (".png", ".generated.png", ".json")}
    again = call("restore", pictures / "in", tmp_path, "--out", tmp_path / "x", "--model", model)
    assert again.exit_code == 4  # the second source would be searched, and the output lies in it
