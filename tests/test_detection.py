"""Masks that are found: written once, known again, never in the place of somebody's own."""

import json
from functools import partial

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from engine.batch.inputs import find_inputs
from engine.batch.run import restore_all
from engine.batch.work import DONE, Order
from engine.cli.app import app
from engine.detection import DamageDetector
from engine.errors import OutputExists, StorageError
from engine.image import probe
from engine.mask import DETECTED
from engine.models.card import embedded
from engine.receipt import Job, read_receipt
from engine.request import Request
from engine.restoration import Part, Restorer
from tests.networks import TINY, random_checkpoint, random_detector
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
    if change == "by hand":
        with pytest.raises(OutputExists, match="move it"):
            detector.mask_of(probe(image), tmp_path, "a", replace=True)
        assert path.read_bytes() == kept
    else:
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


@pytest.fixture
def embedded_is_random(model, monkeypatch):
    """What is loaded as the embedded detector is one that finds damage anywhere."""
    monkeypatch.setattr("engine.restoration.DamageDetector", partial(DamageDetector, model))


@pytest.mark.usefixtures("embedded_is_random")
def test_a_batch_finds_the_damage_of_each_picture_once(tmp_path):
    generator = str(random_checkpoint(tmp_path, TINY))
    for name in ("in/a", "in/1890/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.png"), soft_noise(64, 72, seed=len(name)))
    out, orders = tmp_path / "out", {}
    for detect in (False, True):
        order = orders[detect] = Order(out, formats=("png",), model=generator, detect=detect, replace=True)
        mask = DETECTED if detect else "none"
        items = list(find_inputs([str(tmp_path / "in")], out=str(out), mask=mask))
        told = list(restore_all(items, order, order.restorer(threads=1)))
        assert [one.status for one in told] == [DONE, DONE]
        assert not any(one.looked_up for one in told)  # another request
    masks = [out / "1890" / "b.mask.png", out / "a.mask.png"]
    assert sorted(out.rglob("*.mask.png")) == masks
    assert [read_receipt(path.with_name(f"{path.stem[0]}.json"))["mask"]["name"] for path in masks] == [
        path.name for path in masks
    ]
    assert all(one.looked_up for one in restore_all(items, orders[True], orders[True].restorer(threads=1)))


@pytest.mark.usefixtures("embedded_is_random")
def test_parts_of_a_picture_take_the_mask_that_was_found_when_it_began(image, tmp_path, monkeypatch):
    restorer = Restorer(model=str(random_checkpoint(tmp_path, TINY)), threads=1)
    job = Job(image, None, tmp_path / "out", "a", ("png",), detect=True)
    assert restorer.lay_out(job, Request())
    monkeypatch.setattr(DamageDetector, "strips", None)  # it is not looked for again
    part = Part(restorer, job, Request(), tmp_path / "scratch")
    list(part.draw(part.plan.grid.all_keys()))
    part.canvas.close()
    receipt = restorer.restore(job, Request())
    assert receipt.shards_reused == receipt.shards_total
    made = read_receipt(tmp_path / "out" / "a.json")
    found = cv2.imread(str(tmp_path / "out" / "a.mask.png"), cv2.IMREAD_UNCHANGED)
    assert made["generated"]["missing_px"] == (found > 0).sum() > 0


@pytest.mark.skipif("detector" in embedded(), reason="a detector is embedded")
def test_without_a_detector_the_remedy_is_said(image, tmp_path):
    run = cli.invoke(app, ["restore", str(image), "--out", str(tmp_path / "out"), "--mask", "auto"])
    assert run.exit_code == 3
    assert "engine mask --model FILE" in run.stderr


def test_masks_are_written_by_a_detector_of_ones_own(model, image, tmp_path):
    run = cli.invoke(app, ["mask", str(image), "--model", model, "--out", str(tmp_path / "masks")])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "masks" / "a.mask.png").exists()
