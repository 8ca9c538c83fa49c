"""Which pictures sources give, how their outputs are called, and which mask is whose."""

import gc
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from engine.batch.inputs import Item, find_inputs
from engine.batch.listing import Listing
from engine.errors import MaskUnavailable, PlanError, UnreadableInput
from engine.geometry import Size
from engine.receipt import SCHEMA
from engine.tiling.export import SUFFIX
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan
from engine.tiling.seal import seal
from tests.outputs import FACTS

SIZE = Size(4, 5)


def make(folder: Path, *names: str) -> Path:
    """Empty files; names that end in a slash are folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(parents=True) if name.endswith("/") else path.touch()
    return folder


def names(*sources: object, out: Path | None = None, mask: object = "none") -> dict[str, str]:
    """Names of outputs → pictures."""
    items = find_inputs([str(s) for s in sources], out=None if out is None else str(out), mask=str(mask))
    found = [(item.name, item.image) for item in items]
    assert len(dict(found)) == len(found)
    return dict(found)


def masks(*sources: object, mask: object) -> dict[str, str | None]:
    """Names of outputs → masks; where there is none, what was said."""
    items = find_inputs([str(s) for s in sources], out=None, mask=str(mask))
    return {item.name: item.error if item.error is not None else item.mask for item in items}


def write_receipt(path: Path, *outputs: str) -> None:
    """A receipt that names these outputs, by their suffixes."""
    plan = Plan(path.stem, SIZE, 3, "uint8", Grid(SIZE), "0" * 64, "none", "lite", "1" * 64, {"scale": 1}, 0, 0)
    entry = {"sha256": "2" * 64, "bytes": 1, "digest_of": "file", "compression": "lzw"}
    formats = {suffix: fmt for fmt, suffix in SUFFIX.items()}
    made = {formats[Path(name).suffix]: {"name": name, **entry} for name in outputs}
    told = {"plan_id": plan.plan_id, "plan": plan.to_json(), "outputs": made, "finished": "2026-11-21T00:00:00Z"}
    path.write_bytes(seal({"schema": SCHEMA, **FACTS, **told}))


def test_a_folder_gives_its_pictures_and_nothing_that_a_run_has_left(tmp_path):
    make(tmp_path, "a.png", "b.TIF", "b.mask.png", "B.Mask.PNG", "a.generated.png", "a.json", "notes.txt")
    make(tmp_path, "c.zarr/", "d.0123456789abcdef.inprogress.zarr/", "e/")
    assert names(tmp_path) == {
        "a": f"{tmp_path}/a.png",
        "b": f"{tmp_path}/b.TIF",
        "c": f"{tmp_path}/c.zarr",
    }
    assert names(tmp_path / "c.zarr") == {"c": f"{tmp_path}/c.zarr"}
    with pytest.raises(UnreadableInput, match="0 pictures"):
        names(tmp_path / "e")
    with pytest.raises(PlanError, match="inside the input folder"):
        names(tmp_path, out=tmp_path / "out")


def test_sub_folders_are_mirrored_in_a_fixed_order(tmp_path):
    make(
        tmp_path,
        "z.png",
        "1890/scan 7.tif",
        "1890/scan 7.mask.png",
        "1890/b/c.jpg",
        "18.90/x.y.png",
        "deep.zarr/0/c.png",
    )
    assert names(tmp_path) == {
        name: f"{tmp_path}/{path}"
        for name, path in {
            "deep": "deep.zarr",
            "z": "z.png",
            "18.90/x.y": "18.90/x.y.png",
            "1890/scan 7": "1890/scan 7.tif",
            "1890/b/c": "1890/b/c.jpg",
        }.items()
    }
    assert list(names(tmp_path)) == ["deep", "z", "18.90/x.y", "1890/scan 7", "1890/b/c"]


def test_outputs_of_earlier_runs_are_no_inputs(tmp_path):
    make(tmp_path, "a.png", "a.tif", "sub/b.png", "sub/b.tif", "mine.json", "mine.png")
    write_receipt(tmp_path / "a.json", "a.tif", "a.zarr")
    write_receipt(tmp_path / "sub" / "b.json", "b.png")
    (tmp_path / "mine.json").write_text('{"outputs": {"png": {"name": "mine.png"}}}')
    make(tmp_path, "a.zarr/_engine/", "renamed/_engine/", "renamed/0.png", "t.iiif/info.json", "t.iiif/full/x.jpg")
    make(tmp_path, "_batch/thumb.png", "sub/_batch/thumb.png", f"t.iiif.{'0' * 32}.partial/x.jpg")
    make(tmp_path, f"t.iiif.{'1' * 32}.replaced/x.jpg", ".hidden.png", "._a.png", ".trash/a.png")
    assert names(tmp_path) == {
        "a": f"{tmp_path}/a.png",
        "mine": f"{tmp_path}/mine.png",
        "sub/b": f"{tmp_path}/sub/b.tif",
    }
    assert names(tmp_path / "a.zarr", tmp_path / "a.tif") == {
        "a.zarr": f"{tmp_path}/a.zarr",
        "a.tif": f"{tmp_path}/a.tif",
    }


def test_what_is_named_as_a_mask_is_none_when_the_shell_gave_it(tmp_path):
    make(tmp_path, "a.png", "a.mask.png")
    with pytest.raises(UnreadableInput, match=r"a\.mask\.png: 0 pictures"):
        names(tmp_path / "a.mask.png")


def test_folders_and_files_of_masks_are_no_inputs(tmp_path):
    make(tmp_path, "a.png", "b.png", "masks/a.png", "masks/sub/c.png", "sub/c.png")
    assert set(names(tmp_path, mask=tmp_path / "masks")) == {"a", "b", "sub/c"}
    assert set(names(tmp_path, mask=tmp_path / "b.png")) == {"a", "masks/a", "masks/sub/c", "sub/c"}
    assert set(names(tmp_path / "masks", mask=tmp_path / "masks")) == {"a", "sub/c"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", {"a"}),
        ("*", {"a", "b"}),
        ("**", {"a", "b", "1890/a", "1890/x/a", "1891/a"}),
        ("**/a.*", {"a", "1890/a", "1890/x/a", "1891/a"}),
        ("18*/*.png", {"1890/a", "1891/a"}),
        ("1890/**/a.png", {"a", "x/a"}),
        ("1?9[1-9]/*", {"1891/a"}),
        ("[!1]*", {"a", "b"}),
    ],
)
def test_a_pattern_is_mirrored_from_where_it_begins(pattern, found, tmp_path):
    make(tmp_path, "a.png", "a.mask.png", "b.tif", "b.txt", "1890/a.png", "1890/x/a.png", "1891/a.png")
    assert set(names(tmp_path / pattern)) == found


def test_a_pattern_searches_no_folder_in_vain_and_refuses_what_the_next_run_would_find(tmp_path, monkeypatch):
    make(tmp_path, "in/18/a.png", "in/19/", "in/out/", "in/b[1].png")
    assert names(tmp_path / "in" / "b[1].png") == {"b[1]": f"{tmp_path}/in/b[1].png"}
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert set(names(tmp_path / "in" / "18*" / "*.png", out=tmp_path / "in" / "out")) == {"18/a"}
    assert listed == [f"{tmp_path}/in", f"{tmp_path}/in/18"]
    for pattern in ("**/*.png", "o*/*.png", "*/*.png"):
        with pytest.raises(PlanError, match="inside the input folder"):
            names(tmp_path / "in" / pattern, out=tmp_path / "in" / "out")
    with pytest.raises(UnreadableInput, match="0 pictures"):
        names(tmp_path / "in" / "*.tif")


def test_a_pattern_below_the_working_folder_keeps_paths_as_they_were_written(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "sub/b.png")
    monkeypatch.chdir(tmp_path)
    assert names("**/*.png") == names(".") == {"a": "a.png", "sub/b": "sub/b.png"}
    assert names("./a.png", "a.png", "*.png") == {"a": "a.png"}


def test_a_list_is_read_line_by_line_relative_to_its_folder(tmp_path, monkeypatch):
    make(tmp_path, "in/lists/", "in/1890/a.png", "in/b.png", "elsewhere/c.png")
    listing = tmp_path / "in" / "all.txt"
    lines = [b"\xef\xbb\xbf1890/a.png\r\n", b"\n", b"./b.png\n", b"b.mask.png\n", b"missing.png\n", b"1890/../b.png\n"]
    lines += [b"../elsewhere/c.png\n", b"s3://bucket/in/d.tif\n", os.fsencode(tmp_path / "in" / "1890" / "e \xe9.png")]
    listing.write_bytes(b"".join(lines))
    expected = {
        "1890/a": f"{tmp_path}/in/1890/a.png",
        "b": f"{tmp_path}/in/b.png",
        "missing": f"{tmp_path}/in/missing.png",
        f"{str(tmp_path)[1:]}/elsewhere/c": f"{tmp_path}/elsewhere/c.png",
        "bucket/in/d": "s3://bucket/in/d.tif",
        "1890/e \xe9": f"{tmp_path}/in/1890/e \xe9.png",
    }
    assert names(listing) == expected
    monkeypatch.chdir(tmp_path / "in")
    assert set(names("all.txt")) == set(expected)
    listing.write_bytes(b"\xff\xfea\0.\0p\0n\0g\0")
    with pytest.raises(UnreadableInput, match="as UTF-8"):
        names(listing)
    listing.write_text("\n")
    with pytest.raises(UnreadableInput, match="0 pictures"):
        names(listing)
    with pytest.raises(UnreadableInput, match="cannot be opened"):
        names(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    "line", ["..", "s3://bucket//a.png", "s3://bucket/../a.png", "s3://", "_batch/a.png", "x/_engine/a.png"]
)
def test_nothing_outside_the_output_folder_can_be_named(line, tmp_path):
    make(tmp_path, "in/")
    (tmp_path / "in" / "l.txt").write_text(f"{line}\n")
    with pytest.raises(PlanError, match="outputs cannot lie"):
        names(tmp_path / "in" / "l.txt")


def test_pictures_that_are_missing_or_no_pictures_are_items_all_the_same(tmp_path):
    make(tmp_path, "a.gif")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    assert set(names(tmp_path / "a.gif", tmp_path / "gone.png", tmp_path)) == {"a", "gone", "dangling"}


def test_names_that_collide_keep_their_suffix(tmp_path):
    make(tmp_path, "a.png", "a.tif", "a.png.tif", "b.png", "sub/a.png", "B.tif", "c.png")
    assert set(names(tmp_path)) == {"a.png", "a.tif", "a.png.tif", "b.png", "B.tif", "c", "sub/a"}
    make(tmp_path, "d.png.tif", "d.png")
    assert {"d", "d.png.tif"} <= set(names(tmp_path))


def test_outputs_can_be_carried_to_file_systems_that_know_no_case(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "caf\xe9.png") for form in ("NFC", "NFD"))
    make(tmp_path, "Scan.tif", "scan.tif", nfc, nfd, "A/x.png", "a/x.png", "Stra\xdfe.png", "STRASSE.png", "plain.png")
    found = names(tmp_path)
    folded = [unicodedata.normalize("NFC", name.casefold()) for name in found]
    assert len(set(folded)) == len(folded) == 9
    assert "plain" in found
    shutil.copytree(tmp_path, tmp_path.parent / "again")
    assert list(names(tmp_path.parent / "again")) == list(found)


def test_the_same_place_in_two_sources_is_refused_and_a_picture_given_twice_is_one(tmp_path):
    make(tmp_path, "one/a.png", "two/a.png")
    with pytest.raises(PlanError, match="2 inputs have this name"):
        names(tmp_path / "one", tmp_path / "two")
    assert names(tmp_path / "one", tmp_path / "one" / "a.png", tmp_path / "one" / "*") == {"a": f"{tmp_path}/one/a.png"}


@pytest.mark.timeout(10)
def test_links_in_circles_come_to_an_end_and_every_folder_is_searched_once(tmp_path):
    make(tmp_path, "in/real/a.png", "in/b.png", "far/x/c.png", "other/d.png")
    for link, target in {
        "in/again": "in/real",
        "in/real/up": "in",
        "in/real/higher": ".",
        "in/far": "far",
        "far/back": "in",
        "far/x/self": "far/x",
        "in/loop": "in/loop",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert set(names(tmp_path / "in")) == {"real/a", "b", "far/x/c"}
    assert set(names(tmp_path / "in", out=tmp_path / "far" / "x")) == {"real/a", "b"}


def test_names_of_any_bytes_survive(tmp_path):
    odd = [b"new\nline.png", b"latin-1 \xe9.png", b"tab\t.png", b"[x]*?.png", b"quote'\".png", b"\xf0\x9f\x96\xbc.png"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).touch()
    found = names(tmp_path)
    assert {os.fsencode(image).removeprefix(os.fsencode(tmp_path) + b"/") for image in found.values()} == set(odd)
    assert {os.fsencode(name) + b".png" for name in found} == set(odd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path):
    make(tmp_path, "a.png", "closed/")
    (tmp_path / "closed").chmod(0)
    try:
        assert set(names(tmp_path)) == {"a", "closed"}
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    make(tmp_path, "in/a.png", "in/closed/b.png", "masks/a.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    items = list(find_inputs([str(tmp_path / "in")], out=None, mask=str(tmp_path / "masks")))
    assert items[1] == Item(f"{tmp_path}/in/closed", "closed", None, None)
    with pytest.raises(UnreadableInput, match="Permission denied"):
        names(tmp_path / "in" / "closed")


def test_masks_lie_beside_the_pictures_or_in_folders_like_theirs(tmp_path):
    make(tmp_path, "in/a.png", "in/a.mask.png", "in/1890/b.tif", "in/1890/b.mask.tif", "in/1890/b.png")
    beside = masks(tmp_path / "in", mask=tmp_path / "in")
    assert beside["a"] == f"{tmp_path}/in/a.mask.png"
    assert beside["1890/b.tif"] == beside["1890/b.png"] == f"{tmp_path}/in/1890/b.mask.tif"
    make(tmp_path, "m/a.png", "m/1890/b.tif", "m/1890/b.mask.jpg")
    shutil.rmtree(tmp_path / "in")
    make(tmp_path, "in/a.tif", "in/1890/b.tif")
    assert masks(tmp_path / "in", mask=tmp_path / "m") == {
        "a": f"{tmp_path}/m/a.png",
        "1890/b": f"{tmp_path}/m/1890/b.mask.jpg",
    }
    assert masks(tmp_path / "in" / "**", mask=tmp_path / "m" / "a.png")["1890/b"] == f"{tmp_path}/m/a.png"
    assert masks(tmp_path / "in", mask="none") == {"a": None, "1890/b": None}


def test_masks_in_one_folder_serve_pictures_in_many_where_none_can_be_mistaken(tmp_path):
    make(tmp_path, "in/1/a.png", "in/1/b.png", "in/2/b.png", "in/2/c.png", "in/b.png")
    make(tmp_path, "m/a.png", "m/b.png", "m/2/b.png")
    found = masks(tmp_path / "in", mask=tmp_path / "m")
    assert found["1/a"] == f"{tmp_path}/m/a.png"
    assert found["2/b"] == f"{tmp_path}/m/2/b.png"
    assert found["b"] == f"{tmp_path}/m/b.png"
    assert "3 pictures are called b" in found["1/b"]
    assert found["2/c"] == f"{tmp_path}/in/2/c.png: no c.png, c.png or c.mask.png in {tmp_path}/m. Add one."


def test_two_masks_of_a_rank_are_told_and_stop_nothing(tmp_path):
    make(tmp_path, "in/a.png", "in/b.png", "m/a.mask.png", "m/a.mask.tif", "m/b.png")
    found = masks(tmp_path / "in", mask=tmp_path / "m")
    assert "2 masks fit" in found["a"]
    assert found["b"] == f"{tmp_path}/m/b.png"
    assert "does not exist" in masks(tmp_path / "in", mask=tmp_path / "absent")["a"]
    item = next(find_inputs([str(tmp_path / "in")], out=None, mask=str(tmp_path / "m")))
    with pytest.raises(MaskUnavailable, match="2 masks fit"):
        item.job(tmp_path / "out", ("png",))


def test_a_job_lies_in_the_sub_folder_that_its_name_asks_for(tmp_path):
    job = Item("in/1890/a b.png", "1890/a b", "m.png", None).job(tmp_path, ("png",), replace=True)
    assert job.targets["png"] == tmp_path / "1890" / "a b.png"
    assert (job.image, job.mask, job.replace) == (Path("in/1890/a b.png"), Path("m.png"), True)
    assert Item("a.png", "a", None, None).job(tmp_path, ()).out == tmp_path


def test_many_pictures_cost_little_more_than_their_paths(tmp_path):
    """20,000 pictures: what is held until their turn comes, per picture."""
    import tracemalloc

    listing = tmp_path / "l.txt"
    listing.write_text("".join(f"folder {i // 1000}/scan {i}.tif\n" for i in range(20_000)))
    gc.collect()
    tracemalloc.start(10)
    items = find_inputs([str(listing)], out=None)
    next(items)
    gc.collect()  # of what other tests have left running, too
    traces = tracemalloc.take_snapshot().traces
    held = sum(one.size for one in traces if any("engine/batch" in frame.filename for frame in one.traceback))
    tracemalloc.stop()
    path_bytes = sys.getsizeof(f"{tmp_path}/folder 10/scan 10000.tif")
    assert path_bytes / 2 < held / 20_000 < path_bytes + 400


def test_masks_are_looked_up_in_listings_not_one_by_one(tmp_path, monkeypatch):
    make(tmp_path, *(f"in/{i % 3}/p{i}.png" for i in range(60)), *(f"m/{i % 3}/p{i}.png" for i in range(60)))
    listed, read = [], []
    scandir = os.scandir

    class Counted(tuple):
        def __iter__(self):
            read.append(len(self))
            return super().__iter__()

    def counted(*parts):
        files, *others = parts
        return Listing(Counted(files), *others)

    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr("engine.batch.listing.Listing", counted)
    found = masks(tmp_path / "in", mask=tmp_path / "m")
    assert all(mask == f"{tmp_path}/m/{name}.png" for name, mask in found.items())
    assert len(found) == 60
    assert len(listed) <= 8
    assert sum(read) <= 4 * 60


def test_shuffled_folders_give_the_same(tmp_path, monkeypatch):
    make(tmp_path, *(f"{i % 7}/{i}.png" for i in range(50)))
    order = list(names(tmp_path))
    scandir = os.scandir

    class Shuffled(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    generator = np.random.default_rng(0)
    monkeypatch.setattr(
        os, "scandir", lambda path: Shuffled(generator.permutation(np.array(list(scandir(path)), object)))
    )
    assert list(names(tmp_path)) == order
