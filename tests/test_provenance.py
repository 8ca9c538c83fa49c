"""What is told of a picture is true, says nothing of the machine, and is noticed when it is no longer true."""

import hashlib
import re
import socket
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bagit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.bag import make_bag
from engine.errors import OutputBusy, OutputExists, StorageError, UnreadableInput
from engine.generated_map import Generated, write_generated_map
from engine.geometry import Size
from engine.image import probe
from engine.mask import array_mask, no_mask, read_mask
from engine.models.checkpoint import load
from engine.preservation import METS, PREMIS, XLINK, XSI, mets_xml, premis_xml
from engine.provenance import describe, fixity_of, recorded_fixity
from engine.receipt import Job, read_receipt, write_receipt
from engine.tiling.canvas import Canvas
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan
from engine.tiling.seal import seal
from engine.upkeep import verify_outputs
from tests.outputs import FACTS

SIZE = Size(37, 53)
ODD_NAME = 'Käse & <b> "1" 50%'
NAMES = {"p": PREMIS, "m": METS}


def make_plan(size: Size = SIZE, *, scale: int = 1, box: str | None = None, out: Size | None = None, **fields) -> Plan:
    out = out or size.scaled(scale)
    return Plan(
        name=fields.pop("name", "scan"),
        size=out,
        channels=3,
        dtype="uint8",
        grid=Grid(out, 16, 32),
        input_sha256=fields.pop("input_sha256", "0" * 64),
        mask_sha256=fields.pop("mask_sha256", "1" * 64),
        model="lite",
        model_sha256="2" * 64,
        parameters={"scale": scale, "long_side_px": 0, "box": box or f"0,0,{size.h},{size.w}", "precision": "fp32"},
        projected_ram_bytes=1,
        projected_disk_bytes=1,
    )


def holes(size: Size = SIZE, share: float = 0.1) -> np.ndarray:
    return np.random.default_rng(5).random((size.h, size.w)) < share


def read_map(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def make_canvas(out: Path, plan: Plan) -> Path:
    """A published canvas of noise."""
    rng = np.random.default_rng(1)
    final = out / f"{plan.name}.zarr"
    with Canvas.open(plan, out) as canvas:
        for key in plan.grid.all_keys():
            size = plan.grid.box(key).size
            canvas.write(key, rng.integers(0, 256, (size.h, size.w, 3), dtype=np.uint8))
        working = recorded_fixity(canvas.root, name=final.name)
        canvas.publish(final, replace=False)
    assert working == recorded_fixity(final)
    return final


def make_work(folder: Path, *, name: str = "scan", with_canvas: bool = True, with_mask: bool = True) -> Job:
    """A picture, its mask, its outputs and their receipt, as a run leaves them."""
    sources, out = folder / "sources", folder / "out"
    sources.mkdir()
    rng = np.random.default_rng(2)
    image, mask = sources / f"{name}.png", sources / f"{name}.mask.png"
    Image.fromarray(rng.integers(0, 256, (SIZE.h, SIZE.w, 3), dtype=np.uint8)).save(image)
    Image.fromarray(holes()).save(mask)
    digests = {"input_sha256": fixity_of(image).sha256, "mask_sha256": fixity_of(mask).sha256 if with_mask else "none"}
    plan = make_plan(name=name, **digests)
    job = Job(image, mask if with_mask else None, out, name, ("png", "ome-zarr") if with_canvas else ("png",))
    out.mkdir()
    (out / f"{name}.png").write_bytes(image.read_bytes())
    if with_canvas:
        make_canvas(out, plan)
    generated = Generated(0, SIZE.num_pixels)
    if with_mask:
        missing = read_mask(mask, size=SIZE, scratch=folder / "scratch")
        generated = write_generated_map(missing, plan, out / f"{name}.generated.png")
    info = replace(probe(image), converted="CMYK was converted to sRGB.")
    write_receipt(plan, job.targets, job, describe(plan, load("lite").card, info, mask=job.mask, generated=generated))
    return job


def receipt_of(job: Job) -> dict[str, Any]:
    receipt = read_receipt(job.out / f"{job.name}.json")
    assert receipt is not None
    return receipt


def problems(job: Job) -> list[str]:
    return [problem.path.name for verdict in verify_outputs([job.out]) for problem in verdict.problems]


# The map of generated pixels


def test_at_scale_1_the_map_is_the_mask(tmp_path):
    missing = holes()
    generated = write_generated_map(array_mask(missing), make_plan(), tmp_path / "a.png")
    np.testing.assert_array_equal(read_map(tmp_path / "a.png"), np.where(missing, 255, 0))
    assert generated == Generated(int(missing.sum()), SIZE.num_pixels)


@pytest.mark.parametrize("scale", [2, 4, 16])
def test_at_a_scale_every_pixel_of_the_mask_is_repeated(tmp_path, scale):
    missing = holes()
    write_generated_map(array_mask(missing), make_plan(scale=scale), tmp_path / "a.png")
    expected = missing.repeat(scale, axis=0).repeat(scale, axis=1)
    np.testing.assert_array_equal(read_map(tmp_path / "a.png"), np.where(expected, 255, 0))


def test_a_box_has_its_own_map(tmp_path):
    missing = holes()
    plan = make_plan(scale=2, box="5,7,20,30", out=Size(40, 60))
    generated = write_generated_map(array_mask(missing), plan, tmp_path / "a.png")
    inside = missing[5:25, 7:37]
    np.testing.assert_array_equal(read_map(tmp_path / "a.png") > 0, inside.repeat(2, axis=0).repeat(2, axis=1))
    assert generated == Generated(int(inside.sum()), 600)


@settings(max_examples=25, deadline=None)
@given(out=st.tuples(st.integers(1, 70), st.integers(1, 70)), seed=st.integers(0, 99))
def test_at_any_size_a_pixel_is_generated_if_anything_under_it_was_missing(tmp_path_factory, out, seed):
    folder = tmp_path_factory.mktemp("map")
    missing = np.random.default_rng(seed).random((23, 31)) < 0.1
    missing[0, 0] = False
    size = Size(*out)
    write_generated_map(array_mask(missing), make_plan(Size(23, 31), out=size), folder / "a.png")
    found = read_map(folder / "a.png") > 0
    for y in range(size.h):  # in real numbers: the input rows that overlap [y, y + 1) of the output
        rows = [i for i in range(23) if i * size.h < (y + 1) * 23 and (i + 1) * size.h > y * 23]
        for x in range(size.w):
            columns = [i for i in range(31) if i * size.w < (x + 1) * 31 and (i + 1) * size.w > x * 31]
            assert found[y, x] == missing[np.ix_(rows, columns)].any()


def test_a_great_reduction_is_read_in_pieces(tmp_path):
    """The whole output is one tile, under which lie more input pixels than are read at once."""
    missing = np.zeros((1200, 10_000), np.bool_)
    missing[1199, 0] = missing[175, 5000] = True
    write_generated_map(array_mask(missing), make_plan(Size(*missing.shape), out=Size(16, 133)), tmp_path / "a.png")
    assert sorted(zip(*np.nonzero(read_map(tmp_path / "a.png")), strict=True)) == [(2, 66), (15, 0)]


def test_nothing_missing_gives_an_empty_map(tmp_path):
    assert write_generated_map(no_mask(SIZE), make_plan(), tmp_path / "a.png").missing_px == 0
    assert not read_map(tmp_path / "a.png").any()


# The receipt


def test_the_receipt_tells_what_was_done(tmp_path):
    job = make_work(tmp_path)
    document = receipt_of(job)
    assert document["generated"]["share"] == pytest.approx(holes().mean())
    assert document["generated"]["every_pixel_computed"] is False
    assert datetime.fromisoformat(document["finished"]).utcoffset() == timedelta(0)
    assert document["input"]["sha256"] == hashlib.sha256(job.image.read_bytes()).hexdigest()
    assert document["input"]["size_px"] == [SIZE.h, SIZE.w]
    assert document["mask"] == fixity_of(job.mask).to_json()
    assert document["outputs"]["png"] == fixity_of(job.out / "scan.png").to_json()
    assert document["outputs"]["ome-zarr"] == fixity_of(job.out / "scan.zarr").to_json()
    assert document["outputs"]["generated"] == fixity_of(job.out / "scan.generated.png").to_json()
    assert document["model"]["licence"] == "Apache-2.0"
    assert document["model"]["sha256"] == load("lite").card.sha256
    assert document["model"]["training"]["data"]["pictures"]
    assert {"cra-srgan-engine", "torch", "numpy", "zarr", "libvips"} == set(document["software"])
    assert "unknown" not in document["software"].values()
    assert document["converted"] == ["CMYK was converted to sRGB."]
    assert problems(job) == []


def test_above_scale_1_every_pixel_is_said_to_be_computed(tmp_path):
    job = make_work(tmp_path, with_canvas=False)
    told = describe(
        make_plan(scale=4), load("lite").card, probe(job.image), mask=job.mask, generated=Generated(1, SIZE.num_pixels)
    )["generated"]
    assert told["every_pixel_computed"] is True
    assert "Every output pixel was computed" in told["statement"]


def test_without_a_mask_nothing_is_said_to_be_missing(tmp_path):
    job = make_work(tmp_path, with_canvas=False, with_mask=False)
    document = receipt_of(job)
    assert document["mask"] is None
    assert (document["generated"]["share"], list(document["outputs"])) == (0, ["png"])
    for text in (premis_xml(document), mets_xml(document, sidecars={})):
        assert b"mask" not in text.replace(b"of the map", b"")


def test_nothing_of_the_machine_is_told(tmp_path):
    job = make_work(tmp_path)
    bag = make_bag(job.out, tmp_path / "bag")
    for path in (bag / "data" / f"scan{suffix}" for suffix in (".json", ".premis.xml", ".mets.xml")):
        text = path.read_text()
        for word in (str(tmp_path), str(Path.home()), str(Path.cwd()), socket.gethostname(), "hardware"):
            assert word not in text
        assert not re.search(r'"/', text)


@pytest.mark.parametrize("name", ["scan.png", "scan.generated.png", "scan.zarr", "scan.json"])
def test_one_flipped_byte_is_found_and_named(tmp_path, name):
    job = make_work(tmp_path)
    path = job.out / name
    if path.is_dir():
        path = max((file for file in path.rglob("c/*/*/*")), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    (wrong,) = problems(job)
    assert wrong == path.name


def test_a_format_asked_for_later_keeps_what_was_told_before(tmp_path):
    job = make_work(tmp_path)
    before = receipt_of(job)
    (job.out / "scan.tif").write_bytes(b"a picture")
    later = replace(job, formats=("tiff",), mask=None, tiff_compression="lzw")
    write_receipt(Plan.from_json(before["plan"]), later.targets, later, FACTS)
    after = receipt_of(job)
    assert after["outputs"] == before["outputs"] | {
        "tiff": {**fixity_of(job.out / "scan.tif").to_json(), "compression": "lzw"}
    }
    assert after["finished"] == before["finished"]


def test_a_shard_that_moved_to_another_place_is_found(tmp_path):
    """Digests alone would be the same set."""
    canvas = make_canvas(tmp_path, make_plan())
    before = fixity_of(canvas)
    one, other, *_ = sorted(canvas.glob("0/c/*/*/*"))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert fixity_of(canvas).sha256 != before.sha256


def test_the_root_of_the_records_is_that_of_the_stored_bytes(tmp_path):
    canvas = make_canvas(tmp_path, make_plan())
    assert fixity_of(canvas) == recorded_fixity(canvas)
    next((canvas / "_engine" / "ledger").rglob("*.*.json")).unlink()
    with pytest.raises(StorageError, match=r"shard \d/\d\.\d is not finished"):
        recorded_fixity(canvas)


def test_a_folder_of_files_has_one_digest(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "info.json"):
        (tmp_path / "x.iiif" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.iiif" / name).write_text(name)
    before = fixity_of(tmp_path / "x.iiif")
    assert (before.digest_of, before.num_bytes) == ("folder", 23)
    (tmp_path / "x.iiif" / "a").rename(tmp_path / "x.iiif" / "c")
    assert fixity_of(tmp_path / "x.iiif").sha256 != before.sha256


# PREMIS and METS


@pytest.mark.parametrize("name", ["scan", ODD_NAME, "line\nbreak", "bell\a", "a:b #?"])
def test_premis_names_each_file_with_its_digest_and_role(tmp_path, name):
    job = make_work(tmp_path, name=name)
    document = receipt_of(job)
    root = ElementTree.fromstring(premis_xml(document))
    assert root.tag == f"{{{PREMIS}}}premis"
    assert root.get("version") == "3.0"
    assert [child.tag.split("}")[1] for child in root] == ["object"] * 5 + ["event", "agent"]
    found = {
        thing.findtext("p:objectIdentifier/p:objectIdentifierValue", None, NAMES).replace("%07", "\a"): thing
        for thing in root.findall("p:object", NAMES)
    }
    assert list(found) == [
        f"source/{name}.png",
        f"mask/{name}.mask.png",
        f"outcome/{name}.png",
        f"outcome/{name}.zarr",
        f"outcome/{name}.generated.png",
    ]
    for link, linked in zip(root.findall("p:event/p:linkingObjectIdentifier", NAMES), found, strict=True):
        value = link.findtext("p:linkingObjectIdentifierValue", None, NAMES).replace("%07", "\a")
        assert value == linked
        role = "outcome" if linked.startswith("outcome/") else "source"
        assert link.findtext("p:linkingObjectRole", None, NAMES) == role
    mask = found[f"mask/{name}.mask.png"]
    assert mask.get(f"{{{XSI}}}type") == "premis:file"
    assert mask.findtext("p:objectCharacteristics/p:fixity/p:messageDigest", None, NAMES) == document["mask"]["sha256"]
    assert mask.findtext("p:objectCharacteristics/p:size", None, NAMES) == str(document["mask"]["bytes"])
    canvas = found[f"outcome/{name}.zarr"]
    assert canvas.get(f"{{{XSI}}}type") == "premis:representation"
    digest = canvas.findtext("p:significantProperties/p:significantPropertiesValue", None, NAMES)
    assert digest == document["outputs"]["ome-zarr"]["sha256"]
    assert root.findtext("p:event/p:eventType", None, NAMES) == "modification"
    assert load("lite").card.sha256 in root.find("p:agent/p:agentNote", NAMES).text


def test_a_picture_and_a_mask_of_one_name_are_two_objects(tmp_path):
    document = receipt_of(make_work(tmp_path, with_canvas=False))
    document["mask"]["name"] = document["input"]["name"] = "scan.png"
    found = ElementTree.fromstring(premis_xml(document)).findall(
        "p:object/p:objectIdentifier/p:objectIdentifierValue", NAMES
    )
    assert [value.text for value in found] == [
        "source/scan.png",
        "mask/scan.png",
        "outcome/scan.png",
        "outcome/scan.generated.png",
    ]


def test_the_type_attribute_means_the_namespace_of_premis(tmp_path):
    """Its value is a name with a prefix, which no XML library looks after."""
    text = premis_xml(receipt_of(make_work(tmp_path, with_canvas=False))).decode()
    assert f'xmlns:premis="{PREMIS}"' in text
    assert 'xsi:type="premis:file"' in text


def test_mets_lists_the_files_with_their_checksums(tmp_path):
    job = make_work(tmp_path, name=ODD_NAME)
    document = receipt_of(job)
    data = make_bag(job.out, tmp_path / "bag") / "data"
    root = ElementTree.parse(data / f"{ODD_NAME}.mets.xml").getroot()
    assert [child.tag.split("}")[1] for child in root] == ["metsHdr", "amdSec", "fileSec", "structMap"]
    groups = {group.get("USE"): group for group in root.iter(f"{{{METS}}}fileGrp")}
    assert list(groups) == ["source", "restored", "generated-pixels", "provenance"]
    places = {file: file.find("m:FLocat", NAMES) for file in root.iter(f"{{{METS}}}file")}
    hrefs = {place.get(f"{{{XLINK}}}href"): file for file, place in places.items()}
    assert {places[file].get("LOCTYPE") for file in groups["source"]} == {"OTHER"}  # not the restored one of its name
    assert {places[file].get("LOCTYPE") for file in groups["restored"]} == {"URL"}
    odd = "./K%C3%A4se%20%26%20%3Cb%3E%20%221%22%2050%25"
    assert hrefs[f"{odd}.json"].get("CHECKSUM") == fixity_of(job.out / f"{ODD_NAME}.json").sha256
    assert hrefs[f"{odd}.premis.xml"].get("CHECKSUM") == fixity_of(data / f"{ODD_NAME}.premis.xml").sha256
    assert hrefs[f"{odd}.mask.png"].attrib | {"ID": ""} == {
        "ID": "",
        "MIMETYPE": "image/png",
        "SIZE": str(document["mask"]["bytes"]),
        "CHECKSUM": document["mask"]["sha256"],
        "CHECKSUMTYPE": "SHA-256",
    }
    assert hrefs[f"{odd}.zarr"].get("CHECKSUM") is None
    identifiers = [file.get("ID") for file in root.iter(f"{{{METS}}}file")]
    assert [pointer.get("FILEID") for pointer in root.iter(f"{{{METS}}}fptr")] == identifiers
    assert len(set(identifiers)) == len(identifiers) == 7


def test_names_that_are_not_unicode_still_give_xml(tmp_path):
    document = receipt_of(make_work(tmp_path, with_canvas=False))
    document["input"]["name"] = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    text = premis_xml(document) + mets_xml(document, sidecars={})
    assert text.count(b"caf%E9.png") >= 3


# BagIt


def test_a_bag_is_valid_and_tells_of_damage(tmp_path):
    job = make_work(tmp_path, name="Käse & 1\n2")
    catalog = job.out / "_batch" / "catalog" / "part"
    catalog.parent.mkdir(parents=True)
    catalog.touch()  # says where the inputs lie, which is nobody's business
    folder = make_bag(job.out, tmp_path / "bag", information={"Source-Organization": "Archive\nof the town"})
    bag = bagit.Bag(str(folder))
    assert bag.validate()
    num_files = sum(path.is_file() for path in job.out.rglob("*")) - len([catalog]) + len(["premis", "mets"])
    assert bag.info["Payload-Oxum"].endswith(f".{num_files}")
    assert bag.info["Source-Organization"] == "Archive of the town"
    assert [verdict.intact for verdict in verify_outputs([folder / "data"])] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bag", "out", "scratch", "sources"]
    assert (folder / "data" / "Käse & 1\n2.png").stat().st_ino == (job.out / "Käse & 1\n2.png").stat().st_ino

    path = folder / "data" / "Käse & 1\n2.generated.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(bagit.BagValidationError, match="generated"):
        bag.validate()


def test_a_changed_tag_file_is_noticed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("a")
    folder = make_bag(out, tmp_path / "bag")
    (folder / "bag-info.txt").write_text((folder / "bag-info.txt").read_text() + "Contact-Name: Mallory\n")
    with pytest.raises(bagit.BagValidationError, match="bag-info"):
        bagit.Bag(str(folder)).validate()


def test_a_percent_sign_is_encoded_as_the_standard_says(tmp_path):
    """(The bagit package of the Library of Congress does not decode it, so this is compared by hand.)"""
    out = tmp_path / "out"
    out.mkdir()
    (out / "50%0A.txt").write_text("a")
    manifest = (make_bag(out, tmp_path / "bag") / "manifest-sha256.txt").read_text()
    assert manifest == f"{fixity_of(out / '50%0A.txt').sha256}  data/50%250A.txt\n"


def test_a_bag_is_refused_where_it_would_be_wrong(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnreadableInput, match="0 files"):
        make_bag(out, tmp_path / "bag")
    (out / "a.txt").write_text("a")
    with pytest.raises(OutputExists, match="lies in"):
        make_bag(out, out / "bag")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists, match="exists already"):
        make_bag(out, tmp_path / "taken")
    (out / "link").symlink_to("/etc/hostname")
    with pytest.raises(UnreadableInput, match="link"):
        make_bag(out, tmp_path / "bag")
    (out / "link").unlink()
    (out / "a.0123456789abcdef.inprogress.zarr").mkdir()
    with pytest.raises(OutputBusy, match="not finished"):
        make_bag(out, tmp_path / "bag")
    with pytest.raises(StorageError):
        make_bag(tmp_path / "nowhere", tmp_path / "bag")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("scan.png", damage),
        ("scan.png", Path.unlink),
        ("scan.generated.png", damage),
        ("scan.zarr/0/c/0/1/1", damage),
        ("scan.zarr/0/c/0/1/1", Path.unlink),
        ("scan.zarr/0/zarr.json", damage),
        ("scan.zarr/_engine/plan.json", damage),
        ("scan.json", damage),
        ("scan.json", Path.unlink),
    ],
)
def test_what_is_not_as_its_receipt_says_is_not_bagged(tmp_path, name, harm):
    job = make_work(tmp_path)
    harm(job.out / name)
    with pytest.raises(UnreadableInput, match="engine verify"):
        make_bag(job.out, tmp_path / "bag")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch", "sources"]


def test_what_was_struck_is_not_bagged(tmp_path):
    job = make_work(tmp_path)
    damage(job.out / "scan.png")
    assert problems(job) == ["scan.png"]
    with pytest.raises(UnreadableInput, match=r"scan\.png.*engine verify"):
        make_bag(job.out, tmp_path / "bag")


def test_scratch_is_not_bagged(tmp_path):
    job = make_work(tmp_path)
    scratch = job.out / "scan.zarr" / "_engine" / "scratch"
    scratch.mkdir()
    (scratch / "mask.raw").write_bytes(b"decoded")
    with pytest.raises(OutputBusy, match=r"scratch: is not finished"):
        make_bag(job.out, tmp_path / "bag")


@pytest.mark.parametrize("name", ["../out/scan.png", "/etc/hostname", "..", "a/b"])
def test_a_receipt_from_elsewhere_does_not_lead_out_of_its_folder(tmp_path, name):
    job = make_work(tmp_path, with_canvas=False)
    document = receipt_of(job)
    document["outputs"]["png"]["name"] = name
    (job.out / "scan.json").write_bytes(seal(document))
    assert read_receipt(job.out / "scan.json") is None
