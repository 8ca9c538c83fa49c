"""What a person is told of a picture."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from engine.cli import app
from engine.image import ArrayPicture
from engine.models.checkpoint import load
from engine.planning import Request, make_plan
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
