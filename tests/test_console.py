"""What a person is told of a picture."""

import json
import os

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from engine.cli import app
from engine.image import ArrayPicture
from engine.models.checkpoint import load
from engine.planning import make_plan
from engine.request import Request
from tests.networks import TINY, random_checkpoint


def test_what_is_converted_or_left_out_is_told(tmp_path):
    image = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    text = PngInfo()
    text.add_text("Title", "The harbour")
    Image.fromarray(pixels).save(image, pnginfo=text)
    model = random_checkpoint(tmp_path, TINY)
    arguments = ["restore", image, "--out", tmp_path / "out", "--model", model, "--format", "png", "--json"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    (note,) = line["notes"]
    assert "Title" in note
    assert note in done.stderr
    receipt = json.loads((tmp_path / "out" / "a.json").read_text())
    assert [f"left out: {what}" for what in receipt["left_out"]] == line["notes"]
    arguments[3] = tmp_path / "stripped"
    stripped = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--strip-metadata")])
    assert "left out: PNG texts: 1" in stripped.stderr
    assert json.loads((tmp_path / "stripped" / "a.json").read_text())["left_out"] == ["PNG texts: 1"]
    told = [stripped.stdout, stripped.stderr]
    told += [path.read_text("latin-1") for path in (tmp_path / "stripped").rglob("*") if path.is_file()]
    assert not any("Title" in text for text in told)


def test_a_plan_counts_what_jpeg_2000_and_a_pyramid_need():
    card, picture = load("lite").card, ArrayPicture(np.zeros((3000, 3000, 3), np.uint8))
    digests = {"name": "a", "input_sha256": "0", "mask_sha256": "none"}
    formats = ("jp2", "tiff", "png")
    plans = {fmt: make_plan(Request(scale=4), picture, card, **digests, formats=[fmt])[0] for fmt in formats}
    samples = 12_000 * 12_000 * 3
    assert plans["jp2"].projected_ram_bytes > 11.6 * samples  # as measured with noise of 8 bit
    assert plans["png"].projected_ram_bytes < 2 << 30
    more = plans["tiff"].projected_disk_bytes - plans["png"].projected_disk_bytes
    assert more == pytest.approx(samples / 3, rel=0.01)


@pytest.mark.parametrize("verb", ["restore", "mask", "verify", "clean", "bag", "sign"])
def test_a_name_that_no_disk_takes_is_a_sentence(verb, tmp_path):
    image, long = tmp_path / "a.png", tmp_path / f"{'b' * 300}.png"
    Image.new("RGB", (20, 20)).save(image)
    arguments = {
        "restore": ["restore", long, "--out", tmp_path / "out"],
        "mask": ["restore", image, "--mask", long, "--out", tmp_path / "out"],
        "bag": ["bag", long, tmp_path / "bag"],
        "sign": ["sign", long, "--certificate", image, "--key", image],
    }.get(verb, [verb, long])
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 3
    if verb == "restore":  # one picture of many: told as any that cannot be opened
        assert "cannot be opened (File name too long)" in done.stderr
    else:
        assert "a name of 304 bytes" in done.stderr
        assert "255" in done.stderr
        assert "shorter" in done.stderr


def test_any_name_is_printed_by_every_verb(tmp_path):
    """On a terminal that takes ASCII alone, and complains; what would command it is shown, not sent."""
    folder, shown = tmp_path / os.fsdecode(b"a\xe9\xc3\xa9\x1b[31m"), r"a\udce9\xe9\x1b[31m"
    folder.mkdir()
    image, out = folder / "a.png", folder / "out"
    Image.new("RGB", (20, 20)).save(image)
    model = random_checkpoint(tmp_path, TINY)

    def said(*arguments: object) -> str:
        done = CliRunner(charset="ascii").invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.exception
        return done.output

    assert shown in said("plan", image, "--model", model)
    assert shown in said("restore", image, "--model", model, "--out", out)
    assert shown in said("verify", out)
    assert shown in said("export", out / "a.zarr", "--format", "tiff")
    assert shown in said("bag", out, folder / "bag")
    (out / f"a.png.{'0' * 32}.replaced").touch()
    assert shown in said("clean", out)


def test_plan_takes_what_decides_how_a_restoration_goes(tmp_path):
    image = tmp_path / "a.tif"
    with tifffile.TiffWriter(image) as writer:
        for size in (20, 30):
            writer.write(np.zeros((size, size, 3), np.uint8), photometric="rgb")
    options = ["--page", "1", "--strip-metadata", "--format", "tiff", "--tiff-compression", "zstd"]
    done = CliRunner().invoke(app, ["plan", str(image), "--model", str(random_checkpoint(tmp_path, TINY)), *options])
    assert done.exit_code == 0, done.output
    assert "30x30" in done.stdout


def test_only_tiles_are_said_to_be_finished_when_a_file_is_made_again(tmp_path):
    image, model = tmp_path / "a.png", random_checkpoint(tmp_path, TINY)
    Image.new("RGB", (20, 30)).save(image)
    arguments = ["restore", image, "--out", tmp_path / "out", "--model", model]
    said = []
    for _ in range(2):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        said.append(done.stderr)
        (tmp_path / "out" / "a.png").unlink()
    assert "no tile computed" not in said[0]
    assert "no tile computed" in said[1]
    assert "already finished" not in said[1]
