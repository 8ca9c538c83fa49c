"""Which files a folder of inputs gives, and what a person is told of a picture."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from engine.cli import app
from engine.console import find_pictures
from engine.errors import PlanError, UnreadableInput
from engine.image import ArrayPicture
from engine.models.checkpoint import load
from engine.planning import Request, make_plan
from tests.networks import TINY, random_checkpoint


def test_a_folder_gives_its_pictures_and_nothing_that_a_run_has_left(tmp_path):
    for name in ("a.png", "b.TIF", "b.mask.png", "a.generated.png", "a.json", "notes.txt"):
        (tmp_path / name).touch()
    for name in ("c.zarr", "d.0123456789abcdef.inprogress.zarr", "e"):
        (tmp_path / name).mkdir()
    assert find_pictures([tmp_path], None) == {
        "a": tmp_path / "a.png",
        "b": tmp_path / "b.TIF",
        "c": tmp_path / "c.zarr",
    }
    assert find_pictures([tmp_path / "c.zarr"], None) == {"c": tmp_path / "c.zarr"}
    with pytest.raises(UnreadableInput, match="0 pictures"):
        find_pictures([tmp_path / "e"], None)
    with pytest.raises(PlanError, match="inside the input folder"):
        find_pictures([tmp_path], tmp_path / "out")


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
