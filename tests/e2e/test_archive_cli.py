"""The commands an archive uses: metadata, pages, verify and repair, clean, export."""

import hashlib
import json
from pathlib import Path

import bagit
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from typer.testing import CliRunner

from engine import failpoints
from engine.cli import app
from engine.credentials import check_credentials
from engine.warden import Limits
from tests.networks import TINY, random_checkpoint

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CANARY = "Canary of Lisbon"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def jpeg(path: Path, pixels: np.ndarray) -> Path:
    exif = Image.Exif()
    exif[0x010E] = CANARY
    Image.fromarray(pixels).save(path, quality=95, exif=exif, icc_profile=ICC, dpi=(300, 300))
    return path


def restore(image: Path, out: Path, model: str, *options: object) -> int:
    return call("restore", image, "--out", out, "--model", model, *options)[0]


@pytest.mark.parametrize("strip", [False, True])
def test_metadata_is_carried_unless_it_is_stripped(strip, pixels, model, tmp_path):
    image = jpeg(tmp_path / "a.jpg", pixels)
    formats = [part for name in ("ome-zarr", "tiff", "png", "jpeg", "jp2") for part in ("--format", name)]
    assert restore(image, tmp_path / "out", model, "--scale", 2, *formats, *["--strip-metadata"] * strip) == 0
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    archived = json.loads((tmp_path / "out" / "a.zarr" / "zarr.json").read_text())
    assert bool(found) is not strip
    assert ("exif" in json.dumps(archived)) is not strip
    with Image.open(tmp_path / "out" / "a.tif") as output:
        assert output.info["icc_profile"] == ICC
        assert (output.getexif().get(0x010E) == CANARY) is not strip
        if not strip:  # twice the pixels on the same paper
            assert output.info["dpi"] == pytest.approx((600, 600), rel=1e-3)


def test_a_page_is_asked_for_by_its_number(rng, model, tmp_path):
    image = tmp_path / "a.tif"
    pages = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    with tifffile.TiffWriter(image) as writer:
        for page in pages:
            writer.write(page, photometric="rgb")
    assert restore(image, tmp_path / "none", model, "--format", "tiff") == 3
    for number, page in enumerate(pages):
        out = tmp_path / str(number)
        assert restore(image, out, model, "--format", "tiff", "--page", number) == 0
        assert np.array_equal(tifffile.imread(out / "a.tif"), page)
    assert restore(image, tmp_path / "out", model, "--format", "tiff", "--page", 3) == 3


def test_a_flipped_bit_is_found_and_made_good(pixels, model, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    options = ("--scale", 4, "--format", "ome-zarr", "--format", "png")
    assert restore(image, out, model, *options) == 0
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert call("verify", out) == (0, f"{out / 'a.zarr'}: intact\n")
    for victim in (Path("a.zarr/0/c/0/0/0"), Path("a.png")):
        damaged = bytearray(before[victim])
        damaged[len(damaged) // 2] ^= 8
        (out / victim).write_bytes(damaged)
        code, said = call("verify", out)
        assert code == 3
        assert "damaged" in said
        assert restore(image, out, model, *options) == 0
        assert call("verify", out)[0] == 0
        after = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert after == before


def test_a_finished_canvas_is_exported_again(pixels, model, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    assert restore(image, out, model, "--scale", 2, "--format", "ome-zarr", "--format", "png") == 0
    code, said = call("export", out / "a.zarr", "--format", "tiff", "--format", "iiif", "--tiff-compression", "lzw")
    assert code == 0
    assert said.split() == [str(out / "a.tif"), str(out / "a.iiif")]
    with tifffile.TiffFile(out / "a.tif") as file:
        assert file.pages.first.compression == tifffile.COMPRESSION.LZW
        assert np.array_equal(file.asarray(), np.asarray(Image.open(out / "a.png")))
    assert json.loads((out / "a.iiif" / "info.json").read_text())["width"] == 112
    assert call("export", out / "a.zarr", "--format", "tiff")[0] == 4


def test_a_receipt_names_every_file_by_its_digest_and_a_bag_holds_them(pixels, model, tmp_path):
    image, mask, out = tmp_path / "a.png", tmp_path / "m.png", tmp_path / "out"
    missing = np.zeros(pixels.shape[:2], bool)
    missing[10:20, 5:50] = True
    Image.fromarray(pixels).save(image)
    Image.fromarray(missing).save(mask)
    assert restore(image, out, model, "--mask", mask, "--format", "tiff", "--format", "png") == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.generated.png", "a.json", "a.png", "a.tif"]
    receipt = json.loads((out / "a.json").read_text())
    for entry in (receipt["input"], receipt["mask"]):
        assert hashlib.sha256((tmp_path / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    for entry in receipt["outputs"].values():
        assert hashlib.sha256((out / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    assert set(receipt["outputs"]) == {"tiff", "png", "generated"}
    assert receipt["generated"]["share"] == missing.mean()
    assert np.array_equal(np.asarray(Image.open(out / "a.generated.png")), np.where(missing, 255, 0))

    assert call("bag", out, tmp_path / "bag", "--organization", "Town archive") == (0, f"{tmp_path / 'bag'}\n")
    assert bagit.Bag(str(tmp_path / "bag")).validate()
    stored = sorted(path.name for path in (tmp_path / "bag" / "data").iterdir())
    assert stored == ["a.generated.png", "a.json", "a.mets.xml", "a.png", "a.premis.xml", "a.tif"]


def test_outputs_are_signed_by_an_archive_with_its_own_certificate(pixels, model, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    assert restore(image, out, model, "--format", "tiff", "--format", "png", "--format", "jp2") == 0
    pytest.importorskip("c2pa", reason="c2pa-python is optional")
    from tests.test_credentials import identity

    files = identity(tmp_path)
    options = ("--certificate", files["certificates"], "--key", files["key"])
    assert call("sign", out, *options) == (0, f"{out / 'a.tif.c2pa'}\n{out / 'a.png.c2pa'}\n")
    assert check_credentials(out / "a.png") == []
    assert call("verify", out)[0] == 0
    (tmp_path / "empty").mkdir()
    assert call("sign", tmp_path / "empty", *options)[0] == 3


def test_another_compression_makes_the_tiff_anew(pixels, model, tmp_path):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    for compression in ("deflate", "none", "none", "lzw"):
        assert restore(image, out, model, "--format", "tiff", "--tiff-compression", compression) == 0
        with tifffile.TiffFile(out / "a.tif") as file:
            assert file.pages.first.compression.name.lower().removeprefix("adobe_") == compression


def test_pictures_and_masks_are_read_in_another_process(pixels, model, tmp_path, monkeypatch):
    """What a hostile file does to its decoder costs that file: the others are restored."""

    def crash(*arguments: object, **keywords: object) -> None:
        raise AssertionError("decoded in the parent")

    for name in ("good", "bad"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        Image.fromarray(np.eye(40, 56) > 0).save(tmp_path / f"{name}.mask.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:4000])
    monkeypatch.setattr("engine.image._load", crash)
    images = [tmp_path / "bad.png", tmp_path / "good.png"]
    code, said = call(
        "restore", *images, "--mask", tmp_path, "--out", tmp_path / "out", "--model", model, "--format", "png", "--json"
    )
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["status"], line["reason"]) for line in lines] == [("refused", "unreadable-input"), ("done", None)]
    assert code == 3
    assert (tmp_path / "out" / "good.png").exists()


def test_a_picture_that_takes_too_long_is_given_up(pixels, model, tmp_path, monkeypatch):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    monkeypatch.setattr("engine.isolate._limits", lambda size: Limits(timeout_s=1e-4))
    code, said = call("restore", image, "--out", out, "--model", model, "--json")
    assert (code, json.loads(said)["reason"]) == (3, "decoder-timeout")
    assert list(out.iterdir()) == []


def test_clean_lists_before_it_removes(pixels, model, tmp_path, monkeypatch):
    image, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(pixels).save(image)
    failpoints._counts.clear()
    monkeypatch.setenv("ENGINE_FAILPOINT", "record:2:eio")
    assert restore(image, out, model, "--scale", 2) == 3
    monkeypatch.delenv("ENGINE_FAILPOINT")
    (left,) = out.glob("*.inprogress.zarr")
    code, said = call("clean", out)
    assert code == 0
    assert str(left) in said
    assert left.exists()
    assert call("clean", out, "--yes")[0] == 0
    assert not left.exists()
