"""Masks that are found: written once, known again, never in the place of somebody's own."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from engine.cli.app import app
from engine.detection import DamageDetector
from engine.errors import OutputExists, StorageError
from engine.image import probe
from engine.models.checkpoint import embedded
from engine.receipt import read_receipt
from tests.networks import random_detector
from tests.train.conftest import soft_noise

cli = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_detector(tmp_path_factory.mktemp("detector")))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), soft_noise(96, 120))
    return path


def test_a_mask_is_written_and_known_again(model, image, tmp_path):
    detector = DamageDetector(model)
    found = detector.mask_of(probe(image), tmp_path / "out", "a")
    assert found.path == tmp_path / "out" / "a.mask.png"
    mask = cv2.imread(str(found.path), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (96, 120)
    assert set(np.unique(mask)) == {0, 255}
    assert found.share == pytest.approx((mask > 0).mean())
    assert [path.name for path in found.path.parent.iterdir()] == ["a.mask.png"]
    before = found.path.stat().st_mtime_ns
    assert DamageDetector(model).mask_of(probe(image), tmp_path / "out", "a").share is None
    assert found.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["by hand", "picture", "threshold"])
def test_a_mask_of_something_else_is_not_replaced_unasked(change, model, image, tmp_path):
    path = DamageDetector(model).mask_of(probe(image), tmp_path, "a").path
    if change == "by hand":
        cv2.imwrite(str(path), np.zeros((96, 120), np.uint8))
    elif change == "picture":
        cv2.imwrite(str(image), soft_noise(96, 120, seed=1))
    kept, detector = path.read_bytes(), DamageDetector(model, threshold=0.7 if change == "threshold" else None)
    with pytest.raises(OutputExists, match="--mask"):
        detector.mask_of(probe(image), tmp_path, "a")
    assert path.read_bytes() == kept
    assert detector.mask_of(probe(image), tmp_path, "a", replace=True).share is not None
    assert path.read_bytes() != kept


def test_a_lower_threshold_finds_more(model, image, tmp_path):
    shares = [DamageDetector(model, threshold=t).mask_of(probe(image), tmp_path, str(t)).share for t in (0.2, 0.5, 0.8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2]


def test_a_folder_that_is_a_file_is_said(model, image, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StorageError, match="out"):
        DamageDetector(model).mask_of(probe(image), tmp_path / "out", "a")


# The embedded detector, as people use it.


def damaged_picture(folder):
    """A photograph with two white scratches and a torn corner; the intact one, the damage."""
    from skimage import data

    intact = cv2.resize(data.astronaut(), (384, 384), interpolation=cv2.INTER_AREA)
    damage = np.zeros((384, 384), np.uint8)
    cv2.line(damage, (60, 20), (110, 360), 1, 3)
    cv2.line(damage, (250, 10), (235, 300), 1, 2)
    cv2.fillPoly(damage, [np.array([[384, 384], [330, 384], [384, 320]])], 1)
    picture = np.where(damage[..., None] > 0, 255, intact).astype(np.uint8)
    cv2.imwrite(str(folder / "scan.png"), picture[..., ::-1])
    return intact, damage > 0


@pytest.mark.skipif("detector" not in embedded(), reason="no detector is embedded")
def test_damage_is_found_and_filled(tmp_path):
    from engine.evaluate.metrics import psnr

    intact, damage = damaged_picture(tmp_path)
    run = cli.invoke(app, ["restore", str(tmp_path / "scan.png"), "--out", str(tmp_path / "out"), "--mask", "auto",
                           "--format", "png", "--json"])  # fmt: skip
    assert run.exit_code == 0, run.output
    found = cv2.imread(str(tmp_path / "out" / "scan.mask.png"), cv2.IMREAD_UNCHANGED) > 0
    assert (found & damage).sum() > 0.8 * damage.sum()
    near = cv2.dilate(damage.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    assert (found & ~near).mean() < 0.002
    made = cv2.imread(str(tmp_path / "out" / "scan.png"))[..., ::-1]
    given = np.where(damage[..., None], 255, intact).astype(np.uint8)
    assert psnr(intact, np.ascontiguousarray(made)) > psnr(intact, given) + 8
    receipt = read_receipt(tmp_path / "out" / "scan.json")
    assert receipt["mask"]["name"] == "scan.mask.png"
    assert receipt["generated"]["missing_px"] == found.sum()


@pytest.mark.skipif("detector" not in embedded(), reason="no detector is embedded")
def test_a_mask_is_made_edited_and_given_back(tmp_path):
    damaged_picture(tmp_path)
    run = cli.invoke(app, ["mask", str(tmp_path / "scan.png"), "--out", str(tmp_path / "masks"), "--json"])
    assert run.exit_code == 0, run.output
    (line,) = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    path = tmp_path / "masks" / "scan.mask.png"
    assert line["outputs"] == [str(path)]
    edited = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    edited[:200] = 0
    cv2.imwrite(str(path), edited)
    again = cli.invoke(app, ["mask", str(tmp_path / "scan.png"), "--out", str(tmp_path / "masks")])
    assert again.exit_code == 4
    assert "output-exists" in again.stderr
    run = cli.invoke(app, ["restore", str(tmp_path / "scan.png"), "--out", str(tmp_path / "out"), "--format", "png",
                           "--mask", str(tmp_path / "masks")])  # fmt: skip
    assert run.exit_code == 0, run.output
    given, made = (cv2.imread(str(tmp_path / place / "scan.png")) for place in (".", "out"))
    assert np.array_equal(given[:200], made[:200])
    assert not np.array_equal(given[200:], made[200:])
