"""The command as a user meets it: what it writes, what it says, how it exits."""

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import pyvips
import tifffile
import torch
from skimage import data as skimage_data
from torch.nn import functional as F
from typer.testing import CliRunner

import engine.planning
from engine import failpoints, restore
from engine.cli import app
from engine.errors import PlanError
from engine.geometry import Box
from engine.models.runner import TorchRunner
from engine.render import Renderer
from engine.request import Request
from engine.restoration import Restorer
from engine.tiling.canvas import Canvas
from engine.tiling.grid import Grid
from tests.networks import TINY, random_checkpoint

REPOSITORY = Path(__file__).parents[2]
FIELDS = {
    "input",
    "status",
    "reason",
    "outputs",
    "plan_id",
    "seconds",
    "peak_rss_bytes",
    "shards_total",
    "shards_done",
    "shards_reused",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture(autouse=True)
def _one_thread_again(monkeypatch):
    """The command takes every processor; the tests after it should not."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(engine.planning, "Grid", partial(Grid, chunk_px=32, shard_px=64))


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def restored(*arguments: object) -> tuple[int, list[dict]]:
    """Exit code and the JSON objects on stdout of `engine restore ... --json`."""
    done = call("restore", *arguments, "--json")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


_SPACES = {(1, "uint8"): "b-w", (2, "uint8"): "b-w", (1, "uint16"): "grey16", (2, "uint16"): "grey16"}


def write(path: Path, pixels: np.ndarray) -> Path:
    """PNG or TIFF of (h, w, c) uint8 or uint16."""
    space = _SPACES.get((pixels.shape[2], pixels.dtype.name), "srgb" if pixels.dtype == np.uint8 else "rgb16")
    image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels)).copy(interpretation=space)
    image.write_to_file(str(path))
    return path


def read(path: Path) -> np.ndarray:
    """(h, w, c) of an output of any format."""
    if path.suffix == ".zarr":
        canvas = Canvas.load(path)
        return canvas.read(Box.of(canvas.plan.size))
    pixels = tifffile.imread(path) if path.suffix == ".tif" else pyvips.Image.new_from_file(str(path)).numpy()
    return pixels if pixels.ndim == 3 else pixels[..., None]


def noise(h: int, w: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (h, w, channels), dtype, endpoint=True)


def photo(h: int = 40, w: int = 56) -> np.ndarray:
    return skimage_data.astronaut()[60 : 60 + h, 180 : 180 + w].copy()


def holes(h: int, w: int) -> np.ndarray:
    missing = np.zeros((h, w), bool)
    missing[h // 4 : h // 2, w // 3 : w // 2] = True
    missing[:, w // 5] = True
    return missing


def write_mask(path: Path, missing: np.ndarray) -> Path:
    return write(path, missing[..., None].astype(np.uint8) * 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_known_pixels_are_identical_at_scale_1(channels, dtype, model, tmp_path):
    pixels, missing = noise(40, 56, channels, dtype), holes(40, 56)
    image = write(tmp_path / "a.png", pixels)
    assert np.array_equal(read(image), pixels)
    mask = write_mask(tmp_path / "m.png", missing)
    out = tmp_path / "out"
    options = ["--format", "ome-zarr", "--format", "tiff", "--format", "png"]
    code, (line,) = restored(image, "--out", out, "--mask", mask, "--model", model, *options)
    assert code == 0
    assert [Path(path).name for path in line["outputs"]] == ["a.zarr", "a.tif", "a.png", "a.generated.png"]
    *made, generated = [read(Path(path)) for path in line["outputs"]]
    assert np.array_equal(generated[..., 0] == 255, missing)
    colours = 1 if channels <= 2 else 3
    for output in made:
        assert output.dtype == pixels.dtype
        assert np.array_equal(output[~missing], pixels[~missing])
        assert np.array_equal(output[..., colours:], pixels[..., colours:])  # alpha is not ours to invent
        assert np.array_equal(output, made[0])
    assert (made[0][missing][:, :colours] != pixels[missing][:, :colours]).mean() > 0.9


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("with_mask", [False, True])
def test_colour_stays(scale, with_mask, tmp_path):
    """Reduced by the card's own operator, the output gives back the known pixels."""
    pixels = photo(32, 40)
    missing = holes(32, 40) if with_mask else np.zeros((32, 40), bool)
    image, mask = write(tmp_path / "a.png", pixels), write_mask(tmp_path / "m.png", missing)
    code, (line,) = restored(
        image, "--out", tmp_path / "out", "--scale", scale, "--mask", mask if with_mask else "none", "--format", "png"
    )
    assert code == 0
    output = torch.from_numpy(read(Path(line["outputs"][0])).astype(np.float32)).permute(2, 0, 1)[None]
    reduced = F.interpolate(output, size=(32, 40), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    error = ((reduced - pixels)[~missing] ** 2).mean()
    assert 10 * np.log10(255**2 / error) >= 45


def test_json_tells_what_was_done(model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--scale", 2, "--model", model)
    assert code == 0
    assert set(line) >= FIELDS
    assert (line["input"], line["status"], line["reason"]) == (str(image), "done", None)
    assert line["shards_total"] == line["shards_done"] == 1
    assert line["shards_reused"] == 0
    assert line["peak_rss_bytes"] > 1 << 20
    assert all(Path(path).exists() for path in line["outputs"])
    assert line["plan_id"] == Canvas.load(tmp_path / "out" / "a.zarr").plan.plan_id


def test_stdout_is_for_programs_and_stderr_for_people(model, tmp_path):
    """The command itself, in a process of its own."""
    image = write(tmp_path / "a.png", noise(20, 30))
    arguments = ["restore", image, tmp_path / "none.png", "--out", tmp_path / "out", "--model", model, "--json"]
    command = [sys.executable, "-m", "engine.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["status"] for line in lines] == ["done", "refused"]
    assert lines[1]["reason"] == "unreadable-input"
    assert "Traceback" not in done.stderr
    assert "a.png" in done.stderr
    assert "none.png" in done.stderr


USAGE = [
    ["--scale", "3"],
    ["--scale", "2", "--long-side", "50"],
    ["--box", "1,2,3"],
    ["--max-memory", "much"],
    ["--format", "bmp"],
    ["--nonsense"],
]


@pytest.mark.parametrize("options", USAGE, ids=[" ".join(options) for options in USAGE])
def test_wrong_usage_exits_2_and_writes_nothing(options, model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    assert call("restore", image, "--out", tmp_path / "out", "--model", model, *options).exit_code == 2
    assert not (tmp_path / "out").exists()


REFUSED = [
    (["--max-memory", "1MB"], "not-enough-memory"),
    (["--box", "0,0,21,5"], "plan"),
    (["--long-side", "481"], "output-too-large"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_refused_plan_exits_4_and_writes_nothing(options, reason, model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model, *options)
    assert (code, line["status"], line["reason"]) == (4, "refused", reason)
    assert sum(character.isdigit() for character in line["message"]) >= 2
    assert not (tmp_path / "out").exists()


def png_header(side: int) -> bytes:
    """A valid start of a PNG that announces `side` x `side` RGB pixels and holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_input(kind: str, folder: Path) -> Path:
    path = folder / "bad.png"
    whole = write(folder / "whole.png", noise(40, 40)).read_bytes()
    (folder / "whole.png").unlink()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "disguised":
        tifffile.imwrite(folder / "t.tif", noise(10, 10))
        (folder / "t.tif").rename(path)
    elif kind == "giant":
        path.write_bytes(png_header(60_000))
    elif kind == "empty":
        path.touch()
    else:
        path.write_text("just words")
    return path


BAD = {
    "truncated": "unreadable-input",
    "disguised": "disguised-input",
    "giant": "too-many-pixels",
    "empty": "unreadable-input",
    "words": "unreadable-input",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_input_is_refused_and_the_others_go_on(kind, model, tmp_path):
    bad, good = bad_input(kind, tmp_path), write(tmp_path / "good.png", noise(20, 20))
    out = tmp_path / "out"
    code, (first, second) = restored(bad, good, "--out", out, "--model", model, "--format", "png")
    assert code == 3
    assert (first["status"], first["reason"]) == ("refused", BAD[kind])
    assert "bad.png" in first["message"]
    assert second["status"] == "done"
    assert sorted(path.name for path in out.iterdir()) == ["_batch", "good.json", "good.png"]
    if kind == "giant":
        assert "3,600,000,000" in first["message"]
        assert f"{1 << 30:,}" in first["message"]


def test_a_mask_of_another_size_is_refused_with_both_sizes(model, tmp_path):
    image, mask = write(tmp_path / "a.png", noise(20, 30)), write_mask(tmp_path / "m.png", holes(21, 30))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--mask", mask, "--model", model)
    assert (code, line["reason"]) == (3, "mask-mismatch")
    assert "30x20" in line["message"]
    assert "30x21" in line["message"]
    assert not list((tmp_path / "out").iterdir())


def test_a_full_mask_is_refused(model, tmp_path):
    image, mask = write(tmp_path / "a.png", noise(20, 30)), write_mask(tmp_path / "m.png", np.ones((20, 30), bool))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--mask", mask, "--model", model)
    assert (code, line["reason"]) == (3, "nothing-known")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("scale", [1, 2])
def test_an_empty_mask_is_no_mask(scale, model, tmp_path):
    image, mask = write(tmp_path / "a.png", noise(20, 30)), write_mask(tmp_path / "m.png", np.zeros((20, 30), bool))
    found = []
    for name, option in (("one", mask), ("two", "none")):
        code, (line,) = restored(
            image, "--out", tmp_path / name, "--mask", option, "--model", model, "--scale", scale, "--format", "png"
        )
        assert code == 0
        found.append(read(Path(line["outputs"][0])))
    assert np.array_equal(*found)


def test_a_mask_that_is_not_there_is_refused(model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--mask", "missing.png", "--model", model)
    assert (code, line["reason"]) == (3, "mask-unavailable")


@pytest.mark.parametrize(("h", "w", "scale"), [(1, 1, 16), (1, 1, 1), (1, 10_000, 1), (10_000, 1, 1), (1, 700, 2)])
def test_thin_pictures_are_restored(h, w, scale, model, tmp_path):
    pixels, missing = noise(h, w), np.zeros((h, w), bool)
    missing.flat[h * w // 3 : h * w // 3 + 40 if h * w > 1 else 0] = True
    image, mask = write(tmp_path / "a.png", pixels), write_mask(tmp_path / "m.png", missing)
    code, _ = restored(image, "--out", tmp_path / "out", "--mask", mask, "--scale", scale, "--model", model)
    assert code == 0
    for name in ("a.zarr", "a.png"):
        output = read(tmp_path / "out" / name)
        assert output.shape == (h * scale, w * scale, 3)
        if scale == 1:
            assert np.array_equal(output[~missing], pixels[~missing])


def test_a_read_only_folder_is_named_and_nothing_written(model, tmp_path, monkeypatch):
    def refused(*_args: object, **_options: object):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    image = write(tmp_path / "a.png", noise(20, 30))
    monkeypatch.setattr("engine.tiling.plan.tempfile.TemporaryFile", refused)
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model)
    assert (code, line["status"], line["reason"]) == (3, "failed", "storage-read-only")
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_output_folder_is_refused(model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    out = tmp_path / "out"
    out.write_text("a list")
    code, (line,) = restored(image, "--out", out, "--model", model)
    assert (code, line["status"], line["reason"]) == (4, "refused", "output-exists")
    assert out.read_text() == "a list"


def test_a_name_cannot_command_the_terminal(model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30)).rename(tmp_path / "a\x1b[2Jb.png")
    result = call("restore", image, "--out", tmp_path / "out", "--model", model)
    assert result.exit_code == 0
    assert "\x1b" not in result.stderr
    assert "a\\x1b[2Jb.png" in result.stderr


def test_a_full_disk_fails_and_the_rerun_finishes(model, tmp_path, monkeypatch):
    image = write(tmp_path / "a.png", noise(20, 30))
    failpoints._counts.clear()
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_FAILPOINT", "temp-write:5:enospc")
        code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model)
    assert (code, line["reason"]) == (3, "storage-full")
    assert not (tmp_path / "out" / "a.zarr").exists()
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model)
    assert (code, line["status"]) == (0, "done")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_another_plans_work_is_kept_unless_it_is_to_be_replaced(model, tmp_path):
    image, out = write(tmp_path / "a.png", noise(20, 30)), tmp_path / "out"
    common = [image, "--out", out, "--model", model]
    assert restored(*common)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, (line,) = restored(*common, "--scale", 2)
    assert (code, line["reason"]) == (4, "output-exists")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    code, (line,) = restored(*common, "--scale", 2, "--replace")
    assert code == 0
    assert all(read(Path(path)).shape == (40, 60, 3) for path in line["outputs"])
    assert sorted(path.name for path in out.iterdir()) == ["a.json", "a.png", "a.zarr"]


def test_a_foreign_file_is_never_overwritten(model, tmp_path):
    image, out = write(tmp_path / "a.png", noise(20, 30)), tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("a letter")
    code, (line,) = restored(image, "--out", out, "--model", model)
    assert (code, line["reason"]) == (4, "output-exists")
    assert (out / "a.png").read_text() == "a letter"
    assert [path.name for path in out.iterdir()] == ["a.png"]


@pytest.mark.parametrize("options", [[], ["--replace"]])
def test_the_input_is_never_overwritten(options, model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    before = image.read_bytes()
    code, (line,) = restored(image, "--out", tmp_path, "--model", model, "--scale", 2, *options)
    assert (code, line["reason"]) == (4, "output-exists")
    assert image.read_bytes() == before


def test_colliding_stems_keep_their_suffixes(model, tmp_path):
    one, two = write(tmp_path / "a.png", noise(20, 30)), write(tmp_path / "a.tif", noise(20, 30, seed=1))
    code, lines = restored(one, two, "--out", tmp_path / "out", "--model", model)
    assert code == 0
    names = [Path(path).name for line in lines for path in line["outputs"]]
    assert names == ["a.png.zarr", "a.png.png", "a.tif.zarr", "a.tif.png"]
    assert np.array_equal(read(tmp_path / "out" / "a.tif.png"), read(two))


def test_two_inputs_of_one_name_are_refused(model, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.png", noise(5, 5))
    done = call("restore", tmp_path / "x", tmp_path / "y", "--out", tmp_path / "out", "--model", model)
    assert done.exit_code == 4
    assert "a.png" in done.stderr


@pytest.mark.parametrize("inside", [".", "below/it"])
def test_an_output_folder_inside_the_inputs_is_refused(inside, model, tmp_path):
    write(tmp_path / "a.png", noise(20, 30))
    done = call("restore", tmp_path, "--out", tmp_path / inside, "--model", model)
    assert done.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_with_masks_beside_the_pictures(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pictures = {name: noise(20, 30, seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, pixels in pictures.items():
        write(folder / f"{name}.png", pixels)
        write_mask(folder / f"{name}.mask.png", holes(20, 30))
    (folder / "notes.txt").write_text("not a picture")
    code, lines = restored(folder, "--mask", folder, "--out", tmp_path / "out", "--model", model, "--format", "png")
    assert code == 0
    assert [Path(line["input"]).name for line in lines] == ["a.png", "b.png"]
    for name, pixels in pictures.items():
        output, missing = read(tmp_path / "out" / f"{name}.png"), holes(20, 30)
        assert np.array_equal(output[~missing], pixels[~missing])
        assert not np.array_equal(output[missing], pixels[missing])


def test_an_empty_folder_is_refused(model, tmp_path):
    (tmp_path / "in").mkdir()
    assert call("restore", tmp_path / "in", "--out", tmp_path / "out", "--model", model).exit_code == 3


def test_a_second_run_reuses_everything(model, tmp_path, small_shards, monkeypatch):
    image, out = write(tmp_path / "a.png", noise(50, 70)), tmp_path / "out"
    arguments = [image, "--out", out, "--model", model, "--scale", 2]
    _, (first,) = restored(*arguments)
    assert first["shards_total"] > 6
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(TorchRunner, "decode", None)  # would fail if a pixel were computed again
    code, (second,) = restored(*arguments)
    assert code == 0
    assert second["shards_reused"] == second["shards_total"] == first["shards_total"]
    assert second["plan_id"] == first["plan_id"]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()} == before


def test_another_format_is_made_from_the_finished_canvas(model, tmp_path, small_shards, monkeypatch):
    image, out = write(tmp_path / "a.png", noise(50, 70)), tmp_path / "out"
    arguments = [image, "--out", out, "--model", model, "--scale", 2]
    assert restored(*arguments, "--format", "ome-zarr")[0] == 0
    monkeypatch.setattr(TorchRunner, "decode", None)
    code, (line,) = restored(*arguments, "--format", "ome-zarr", "--format", "tiff")
    assert code == 0
    assert line["shards_reused"] == line["shards_total"]
    assert np.array_equal(read(out / "a.tif"), read(out / "a.zarr"))
    code, (line,) = restored(*arguments, "--format", "png")
    assert code == 0
    assert np.array_equal(read(out / "a.png"), read(out / "a.zarr"))


def test_pictures_alone_leave_no_canvas(model, tmp_path):
    image, out = write(tmp_path / "a.png", photo()), tmp_path / "out"
    code, _ = restored(image, "--out", out, "--model", model, "--format", "png", "--format", "jpeg")
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "a.json", "a.png"]
    assert np.array_equal(read(out / "a.png"), photo())
    assert np.abs(read(out / "a.jpg").astype(int) - photo()).mean() < 5


def test_a_format_made_earlier_stays_finished(model, tmp_path):
    image, out = write(tmp_path / "a.png", photo()), tmp_path / "out"
    arguments = (image, "--out", out, "--model", model, "--format")
    for fmt in ("png", "tiff"):
        assert restored(*arguments, fmt)[1][0]["shards_reused"] == 0
    written = (out / "a.png").stat().st_mtime_ns
    assert restored(*arguments, "png")[1][0]["shards_reused"] == 1
    assert (out / "a.png").stat().st_mtime_ns == written


@pytest.mark.parametrize(("fmt", "dtype", "channels"), [("jpeg", "uint16", 3), ("jpeg", "uint8", 4)])
def test_a_format_that_cannot_hold_the_picture_is_refused(fmt, dtype, channels, model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30, channels, dtype))
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model, "--format", fmt)
    assert (code, line["reason"]) == (4, "output-unsupported")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1, 2])
def test_a_box_is_those_pixels_of_the_whole(scale, model, tmp_path, small_shards):
    image, mask = write(tmp_path / "a.png", noise(70, 90)), write_mask(tmp_path / "m.png", holes(70, 90))
    common = [image, "--mask", mask, "--model", model, "--scale", scale, "--format", "ome-zarr"]
    assert restored(*common, "--out", tmp_path / "whole")[0] == 0
    assert restored(*common, "--out", tmp_path / "part", "--box", "7,13,41,66")[0] == 0
    whole, part = read(tmp_path / "whole" / "a.zarr"), read(tmp_path / "part" / "a.zarr")
    assert np.array_equal(part, whole[7 * scale : 48 * scale, 13 * scale : 79 * scale])


@pytest.mark.parametrize("options", [{"scale": 2}, {"long_side_px": 150}, {"long_side_px": 85}])
@pytest.mark.parametrize("with_mask", [False, True])
def test_shards_join_without_a_trace(options, with_mask, model, tmp_path, small_shards):
    """What is stored shard by shard is what one call draws in memory."""
    pixels, missing = noise(60, 90), holes(60, 90)
    image, mask = write(tmp_path / "a.png", pixels), write_mask(tmp_path / "m.png", missing)
    option = ["--scale", options["scale"]] if "scale" in options else ["--long-side", options["long_side_px"]]
    given = ["--mask", mask if with_mask else "none"]
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model, *given, *option)
    assert code == 0
    assert line["shards_total"] >= 4
    whole = Restorer(model=model).array(pixels, missing if with_mask else None, Request(**options), scratch=tmp_path)
    assert np.array_equal(read(tmp_path / "out" / "a.zarr"), whole)
    assert np.array_equal(read(tmp_path / "out" / "a.png"), whole)


def test_a_reduction_is_drawn_in_bounded_pieces(model, tmp_path, monkeypatch):
    """However many input pixels lie under a shard; and the cut is not seen."""
    image = write(tmp_path / "a.png", noise(90, 130))
    outputs, drawn = [], []
    draw = Renderer.draw
    monkeypatch.setattr(Renderer, "draw", lambda self, box: drawn.append(box.size.num_pixels) or draw(self, box))
    for most in (1 << 24, 500):
        monkeypatch.setattr("engine.restoration.MAX_DRAWN_PIXELS", most)
        drawn.clear()
        out = tmp_path / str(most)
        code, _ = restored(image, "--out", out, "--long-side", 33, "--model", model, "--format", "png")
        assert code == 0
        assert max(drawn) <= most
        outputs.append(read(out / "a.png"))
    assert len(drawn) > 10
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("make", ["flat", "ramp"])
def test_no_step_at_the_borders_of_shards(make, model, tmp_path, small_shards):
    line = np.full(150, 128) if make == "flat" else np.linspace(60, 190, 150)
    pixels = np.repeat(np.rint(line).astype(np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    write(tmp_path / "a.png", pixels)
    assert restored(tmp_path / "a.png", "--out", tmp_path / "out", "--model", model, "--scale", 2)[0] == 0
    steps = np.abs(np.diff(read(tmp_path / "out" / "a.zarr").astype(int), axis=1)).max((0, 2))
    borders = np.zeros(steps.size, bool)
    borders[63::64] = True
    assert steps[borders].max() <= steps[~borders].max()


def test_the_function_does_what_the_command_does(model, tmp_path):
    image = write(tmp_path / "a.png", noise(20, 30))
    receipt = restore(image, out=tmp_path / "one", scale=2, model=model)
    assert engine.restore(image, out=tmp_path / "one", scale=2, model=model).plan_id == receipt.plan_id
    assert restored(image, "--out", tmp_path / "two", "--model", model, "--scale", 2)[0] == 0
    assert np.array_equal(read(receipt.outputs[0]), read(tmp_path / "two" / "a.zarr"))
    assert (tmp_path / "one" / "a.png").read_bytes() == (tmp_path / "two" / "a.png").read_bytes()


@pytest.mark.parametrize("asked", [Request(precision="bf16"), Request(device="cuda")])
def test_a_restorer_refuses_a_request_for_other_sums(asked, model, tmp_path):
    """Its plan would tell of them."""
    with pytest.raises(PlanError, match="this restorer works in fp32 on cpu"):
        Restorer(model=str(model)).array(np.zeros((8, 8, 3), np.uint8), None, asked, scratch=tmp_path)


def test_plan_says_what_it_would_take_and_writes_nothing(model, tmp_path):
    image = write(tmp_path / "a.png", noise(300, 400))
    before = sorted(tmp_path.rglob("*"))
    done = call("plan", image, "--out", tmp_path / "out", "--scale", 16, "--model", model)
    assert done.exit_code == 0, done.stderr
    for part in ("6400x4800", "halo", "memory", "disk", "tiles", "expected", "| "):
        assert part in done.stdout
    assert done.stdout.count("   |") == 3 * 4  # 4800 x 6400 in shards of 2048
    assert sorted(tmp_path.rglob("*")) == before
    done = call("plan", image, "--out", tmp_path / "out", "--scale", 16, "--model", model, "--max-memory", "1MB")
    assert done.exit_code == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_the_embedded_models_are_listed():
    done = call("model", "list")
    assert done.exit_code == 0
    assert any(line.startswith("lite: joint, clean, x1, x2, x4, x8, x16, ") for line in done.stdout.splitlines())


def test_doctor_finds_this_installation_healthy():
    done = call("doctor")
    assert done.exit_code == 0, done.stdout
    assert "lite: a tile equals" in done.stdout
    assert "BAD" not in done.stdout


def test_an_unknown_model_is_named(tmp_path):
    image = write(tmp_path / "a.png", noise(5, 5))
    done = call("restore", image, "--out", tmp_path / "out", "--model", "nobody")
    assert done.exit_code == 3
    assert "nobody" in done.stderr


def test_bytes_do_not_depend_on_the_decoder_of_the_picture(model, tmp_path):
    """The same pixels as PNG and TIFF are restored alike."""
    pixels = photo()
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    write(tmp_path / "b.tif", pixels)
    code, _ = restored(
        tmp_path / "a.png", tmp_path / "b.tif", "--out", tmp_path / "out", "--model", model, "--scale", 2
    )
    assert code == 0
    assert np.array_equal(read(tmp_path / "out" / "a.zarr"), read(tmp_path / "out" / "b.zarr"))


@pytest.mark.parametrize("name", ["a.png", "a.json"])
def test_a_file_put_beside_finished_work_is_not_overwritten(name, model, tmp_path):
    image, out = write(tmp_path / "a.png", photo()), tmp_path / "out"
    assert restored(image, "--out", out, "--model", model, "--format", "tiff")[0] == 0
    if name == "a.json":
        (out / "a.tif").unlink()
    (out / name).write_text("mine")
    code, (line,) = restored(image, "--out", out, "--model", model, "--format", "png")
    assert (code, line["reason"]) == (4, "output-exists")
    assert (out / name).read_text() == "mine"


def test_a_foreign_folder_survives_replace(model, tmp_path):
    image, mine = write(tmp_path / "a.png", photo()), tmp_path / "out" / "a.zarr" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, (line,) = restored(image, "--out", tmp_path / "out", "--model", model, "--replace")
    assert (code, line["reason"]) == (4, "output-exists")
    assert mine.read_text() == "mine"


def test_a_receipt_that_is_none_stops_one_picture_only(model, tmp_path):
    images = [write(tmp_path / f"{stem}.png", photo()) for stem in "ab"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("[1]")
    code, lines = restored(*images, "--out", tmp_path / "out", "--model", model, "--format", "png")
    assert [line["status"] for line in lines] == ["refused", "done"]
    assert code == 3


def test_no_picture_is_dropped_when_a_name_meets_a_kept_suffix(model, tmp_path):
    images = [write(tmp_path / name, photo()) for name in ("a.png", "a.tif", "a.png.tif")]
    code, lines = restored(*images, "--out", tmp_path / "out", "--model", model, "--format", "png")
    assert code == 0
    assert len({output for line in lines for output in line["outputs"]}) == 3
