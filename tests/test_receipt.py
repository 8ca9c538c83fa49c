"""A receipt says what is ours: nothing else is written over, nothing of it is forgotten, none is believed blindly."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import Mock

import pytest

from engine.bag import make_bag
from engine.errors import OutputExists, StorageError, UnreadableInput
from engine.geometry import Size
from engine.receipt import (
    announce,
    is_finished,
    looks_like_receipt,
    read_receipt,
    receipt_copy,
    receipt_of,
    refuse_taken,
    store_receipt,
    write_receipt,
)
from engine.restoration import export_finished
from engine.tiling.canvas import adding_to
from engine.tiling.damage import Kind
from engine.tiling.seal import seal, unseal
from engine.upkeep import verify_outputs
from tests.outputs import FACTS, files
from tests.test_upkeep import Scene, flip, make_scene

FORMATS = ("ome-zarr", "tiff", "png")


@pytest.fixture
def scene(tmp_path) -> Scene:
    return make_scene(tmp_path / "out")


def of_another_plan(scene: Scene, *formats: str, replace_: bool = True) -> Scene:
    """The same picture with another parameter, into the same folder."""
    plan = replace(scene.plan, parameters={"scale": 1, "precision": "bf16"})
    job = replace(scene.job, formats=formats or scene.job.formats, replace=replace_)
    return Scene(job, plan, scene.picture, [])


# What may be written over


class Beside:
    """The same command in another process (here a thread), which waits before each of its steps."""

    STEPS = ("tests.test_upkeep.announce", "tests.test_upkeep.Image.fromarray", "tests.test_upkeep.write_receipt")
    LOOKS = ("os.path.lexists", *(f"engine.receipt.{name}" for name in ("_announced", "receipt_of", "read_receipt")))
    LOOKS = (*LOOKS, *(f"engine.receipt.{name}" for name in ("plan_id_of", "_is_canvas", "looks_like_receipt")))

    def __init__(self, scene: Scene, patch: pytest.MonkeyPatch) -> None:
        self.looks, self.on_look, self._has_ended = 0, dict[int, int](), False
        self._turn, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(scene,), daemon=True)
        for name in (*self.STEPS, "engine.tiling.canvas.hit"):
            patch.setattr(name, self._before(resolve_name(name), self._wait))
        for name in self.LOOKS:
            patch.setattr(name, self._before(resolve_name(name), self._look))
        self._thread.start()
        self._waits.acquire()

    def step(self, count: int) -> None:
        for _ in range(count):
            if not self._has_ended:
                self._turn.release()
                self._waits.acquire()

    def _run(self, scene: Scene) -> None:
        scene.restore()
        self._has_ended = True
        self._waits.release()

    def _wait(self) -> None:
        if threading.current_thread() is self._thread:
            self._waits.release()
            self._turn.acquire()

    def _look(self) -> None:
        """Our own look at the folder, before which the other may take steps."""
        if threading.current_thread() is not self._thread:
            self.looks += 1
            self.step(self.on_look.get(self.looks, 0))

    @staticmethod
    def _before(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
        def acting(*arguments: object, **named: object) -> object:
            act()
            return function(*arguments, **named)

        return acting


def test_what_another_process_is_making_is_not_in_the_way(tmp_path):
    """Whatever it does between whichever of our looks."""
    small = Size(20, 20)
    whole, drawn = make_scene(tmp_path / "whole", size=small), tmp_path / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_upkeep.announce", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_scene(drawn, size=small)
    most_steps, num_looks, cases = 6, 100, 0
    for before, look, during in product(range(most_steps), range(1, 100), (1, most_steps)):
        if look <= num_looks:
            out = tmp_path / f"{cases}"
            shutil.copytree(drawn, out)
            job = replace(whole.job, out=out, formats=("ome-zarr", "png"))
            with pytest.MonkeyPatch.context() as patch:
                other = Beside(Scene(job, whole.plan, whole.picture), patch)
                other.step(before)
                other.on_look[look] = during
                refuse_taken(whole.plan, job.targets, job)
                num_looks = max(1, other.looks) if look == 1 else num_looks
                other.step(most_steps)
            assert is_finished(whole.plan, job.targets, job)
            cases += 1
    assert cases > 100


def check_refused(scene: Scene, path: Path) -> None:
    before = files(scene.out)
    with pytest.raises(OutputExists, match="no receipt says that this program made it") as refusal:
        scene.restore()
    assert str(refusal.value).startswith(f"{path}: ")
    assert files(scene.out) == before


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.json"])
def test_replace_does_not_cover_a_foreign_file(tmp_path, name):
    """Among them the only scan of another picture, when outputs go into the folder of the inputs."""
    scene = make_scene(tmp_path / "elsewhere")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b'{"title": "mine"}')
    scene.job = replace(scene.job, out=out, replace=True)
    check_refused(scene, out / name)


@pytest.mark.parametrize("name", ["a.png", "a.iiif"])
def test_replace_does_not_cover_a_folder_that_no_receipt_names(tmp_path, name):
    scene = make_scene(tmp_path / "out", formats=("ome-zarr",))
    (scene.out / name).mkdir()
    (scene.out / name / "info.json").write_text("{}")
    made = of_another_plan(scene, "png", "iiif")
    check_refused(made, scene.out / name)


def test_a_file_that_a_receipt_names_as_its_input_only_is_not_ours(tmp_path):
    scene = make_scene(tmp_path / "out", formats=("tiff",))
    receipt = receipt_of(scene.out, "a")
    assert receipt is not None
    assert receipt["input"]["name"] == "a.png"
    (scene.out / "a.png").write_bytes(b"mine")
    check_refused(of_another_plan(scene, "png"), scene.out / "a.png")


def test_the_receipt_of_another_picture_is_not_written_over(scene):
    scene.job = replace(scene.job, name="b")
    (scene.out / "a.json").rename(scene.out / "b.json")
    check_refused(of_another_plan(scene, "png"), scene.out / "b.json")


@pytest.mark.parametrize("harm", [None, "flip", "strike", "lose"])
def test_replace_covers_what_a_receipt_names(scene, harm):
    if harm == "flip":
        for path in (scene.out / "a.json", receipt_copy(scene.canvas)):
            flip(path, 999)
    elif harm == "strike":
        flip(scene.out / "a.png", 4000)
        assert not next(verify_outputs([scene.out])).intact
    elif harm == "lose":  # its copy still tells
        (scene.out / "a.json").unlink()
    with pytest.raises(OutputExists, match="--replace"):
        of_another_plan(scene, replace_=False).restore()
    of_another_plan(scene).restore()
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]


def test_replace_covers_what_a_run_of_another_plan_was_about_to_make(scene):
    out = scene.out.with_name("other")
    killed = scene.plan.working_folder(out)
    shutil.copytree(scene.canvas, killed)
    scratch = killed / "_engine" / "scratch"
    scratch.mkdir()
    announce(scratch, {"png": out / "a.png"})
    (out / "a.png").write_bytes(b"half of a run")
    made = of_another_plan(replace_scene(scene, out), "png")
    refuse_taken(made.plan, made.job.targets, made.job)
    killed.rename(out / f"a.b{killed.name.removeprefix('a')}")  # of another picture, whose name begins alike
    with pytest.raises(OutputExists, match="no receipt"):
        refuse_taken(made.plan, made.job.targets, made.job)


def replace_scene(scene: Scene, out: Path) -> Scene:
    return Scene(replace(scene.job, out=out), scene.plan, scene.picture, [])


# What may stay


@pytest.mark.parametrize("formats", [("png",), ("ome-zarr",)])
def test_nothing_of_a_replaced_output_stays(scene, formats):
    (scene.out / "notes.txt").write_text("mine")
    of_another_plan(scene, *formats).restore()
    suffixes = {"png": "a.png", "ome-zarr": "a.zarr"}
    expected = {"a.json", "notes.txt", *(suffixes[fmt] for fmt in formats)}
    assert {path.name for path in scene.out.iterdir()} == expected
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]


def test_a_run_that_is_cut_short_while_it_removes_goes_on(scene, monkeypatch):
    made = of_another_plan(scene, "png")
    with monkeypatch.context() as patch:
        patch.setattr("engine.receipt.store_receipt", no_more)
        with pytest.raises(StorageError):
            made.restore()
    (scene.out / f"a.zarr.{'0' * 32}.partial").mkdir()  # a canvas of which half is removed
    made.restore()
    assert sorted(path.name for path in scene.out.iterdir() if path.suffix != ".partial") == ["a.json", "a.png"]


def no_more(*_: object) -> None:
    raise StorageError("the disk is gone")


def cut_short(scene: Scene, monkeypatch: pytest.MonkeyPatch, *formats: str) -> None:
    """Adds formats to a published canvas, up to the receipt."""
    job, scene.job = scene.job, replace(scene.job, formats=formats)
    with monkeypatch.context() as patch:
        patch.setattr("tests.test_upkeep.write_receipt", no_more)
        with pytest.raises(StorageError):
            scene.restore()
    (scene.canvas / "_engine" / "scratch" / "mask.raw").write_bytes(b"decoded")
    scene.job = job


def test_the_same_command_goes_on_when_it_was_cut_short_behind_an_export(tmp_path, monkeypatch):
    scene = make_scene(tmp_path / "out", formats=("ome-zarr",))
    cut_short(scene, monkeypatch, "ome-zarr", "png")
    partial = scene.out / f"a.png.{'0' * 32}.partial"
    partial.mkdir()
    scene.job = replace(scene.job, formats=("ome-zarr", "png"))
    scene.restore()
    assert not partial.exists()
    assert not (scene.canvas / "_engine" / "scratch").exists()
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]


def test_another_command_leaves_nothing_of_one_that_was_cut_short(tmp_path, monkeypatch):
    scene = make_scene(tmp_path / "out", formats=("ome-zarr",))
    intact = files(scene.out)
    cut_short(scene, monkeypatch, "png")
    assert (scene.out / "a.png").exists()
    scene.restore()
    assert files(scene.out) == intact
    assert not (scene.canvas / "_engine" / "scratch").exists()
    cut_short(scene, monkeypatch, "png")
    scene.job = replace(scene.job, formats=("tiff",))
    scene.restore()
    assert set(files(scene.out)) == {*intact, "a.tif"}


def test_a_finished_run_leaves_alone_what_another_process_is_adding(tmp_path):
    scene = make_scene(tmp_path / "out", formats=("ome-zarr",))
    with adding_to(scene.canvas) as canvas:
        announce(canvas.scratch, {"png": scene.out / "a.png"})
        (scene.out / "a.png").write_bytes(b"on its way")
        assert is_finished(scene.plan, scene.job.targets, scene.job)
        assert (canvas.scratch / "exporting-png").exists()
        assert (scene.out / "a.png").exists()


# Exports


def test_an_export_beside_its_canvas_is_in_the_receipt(scene):
    made = export_finished(scene.canvas, out=scene.out, formats=["jp2"])
    assert made == [scene.out / "a.jp2"]
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]
    flip(scene.out / "a.jp2", 4000)
    [verdict] = verify_outputs([scene.out])
    assert [problem.name for problem in verdict.problems] == ["jp2"]
    export_finished(scene.canvas, out=scene.out, formats=["jp2"], replace=True)
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]
    make_bag(scene.out, scene.out.with_name("bag"))


def test_an_export_in_the_place_of_an_output_is_no_damage_and_is_finished(scene):
    before = (scene.out / "a.tif").read_bytes()
    with pytest.raises(OutputExists, match="exists already"):
        export_finished(scene.canvas, out=scene.out, formats=["tiff"])
    export_finished(scene.canvas, out=scene.out, formats=["tiff"], tiff_compression="lzw", replace=True)
    assert (scene.out / "a.tif").read_bytes() != before
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]
    job = replace(scene.job, formats=("tiff",))
    assert is_finished(scene.plan, job.targets, replace(job, tiff_compression="lzw"))
    assert not is_finished(scene.plan, job.targets, job)


def test_an_export_never_replaces_a_foreign_file(scene):
    elsewhere = scene.out.with_name("masters")
    elsewhere.mkdir()
    (elsewhere / "a.tif").write_bytes(b"the only scan")
    with pytest.raises(OutputExists, match="no receipt"):
        export_finished(scene.canvas, out=elsewhere, formats=["tiff"], replace=True)
    (elsewhere / "a.tif").rename(elsewhere / "b.tif")
    assert export_finished(scene.canvas, out=elsewhere, formats=["tiff"]) == [elsewhere / "a.tif"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["a.tif", "b.tif"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_damaged_or_renamed_canvas_is_not_exported(scene, beside):
    out = scene.out if beside else scene.out.with_name("exports")
    renamed = scene.canvas.rename(scene.out / "b.zarr")
    with pytest.raises(StorageError, match=r"give it back the name a\.zarr"):
        export_finished(renamed, out=out, formats=["jp2"])
    renamed.rename(scene.canvas)
    text = (scene.canvas / "zarr.json").read_text()
    (scene.canvas / "zarr.json").write_text(text.replace("archive", "archived") + "\n")
    with pytest.raises(StorageError, match="engine verify"):
        export_finished(scene.canvas, out=out, formats=["jp2"])
    assert not list(scene.out.parent.rglob("*.jp2"))
    assert not list(scene.canvas.rglob("lock"))


# Receipts from elsewhere

LOST = object()


def changed(receipt: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    *parents, last = path
    place = receipt
    for name in parents:
        place = place[name]
    if value is LOST:
        del place[last]
    else:
        place[last] = value
    return receipt


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((field,), LOST) for field in ("schema", "input", "mask", "generated", "model", "software", "plan_id")),
        *(((field,), LOST) for field in ("plan", "outputs", "finished")),
        *(((field,), None) for field in ("input", "generated", "plan", "outputs", "finished")),
        *(((field,), "x") for field in ("mask", "input", "plan_id", "outputs", "finished")),
        *(((field,), 5) for field in ("plan_id", "plan", "finished")),
        (("plan_id",), "../../../../x/x/"),
        (("input", "sha256"), "x"),
        (("input", "name"), "\ud800"),
        (("software",), {}),
        *((("plan", "size_px"), size) for size in ([10**12, 10**12], [0, 0], ["a", 1])),
        (("plan", "shard_px"), 0),
        (("plan", "name"), "../x"),
        (("plan", "more"), 1),
        (("outputs",), [1]),
        (("outputs", "png"), 3),
        (("outputs", "png", "name"), LOST),
        *(
            (("outputs", "png", "name"), name)
            for name in (7, "a\0b", "a" * 400, "/dev/zero", "..", "", "a.zarr", "b.png")
        ),
        (("outputs", "png", "bytes"), "x"),
        (("outputs", "png", "bytes"), None),
        (("outputs", "png", "sha256"), 1),
        (("outputs", "png", "sha256"), "x"),
        (("outputs", "png", "digest_of"), LOST),
        (("outputs", "tiff", "compression"), LOST),
        (("outputs", "weird"), {"name": "x", "sha256": None, "bytes": None, "digest_of": "file"}),
    ],
)
def test_a_sealed_receipt_that_is_none_is_damage(tmp_path, path, value):
    scene = make_scene(tmp_path / "out", formats=("tiff", "png"))
    receipt = read_receipt(scene.out / "a.json")
    assert receipt is not None
    (scene.out / "a.json").write_bytes(seal(receipt))
    assert receipt_of(scene.out, "a") == receipt
    (scene.out / "a.json").write_bytes(seal(changed(receipt, path, value)))
    assert read_receipt(scene.out / "a.json") is None
    if path == ("schema",):
        return
    [verdict] = verify_outputs([scene.out])
    assert [(problem.name, problem.kind) for problem in verdict.problems] == [("receipt", Kind.METADATA)]
    with pytest.raises(UnreadableInput, match="engine verify"):
        make_bag(scene.out, tmp_path / "bag")


def test_a_struck_output_is_part_of_an_intact_receipt(scene):
    receipt = receipt_of(scene.out, "a")
    assert receipt is not None
    receipt["outputs"]["png"] |= {"sha256": None, "bytes": None}
    store_receipt(scene.out, "a", receipt)
    assert receipt_of(scene.out, "a") == receipt


def test_a_hostile_plan_in_both_receipts_does_not_hang_or_lead_outside(scene):
    receipt = receipt_of(scene.out, "a")
    assert receipt is not None
    receipt["plan"]["size_px"] = [10**12, 10**12]
    for path in (scene.out / "a.json", receipt_copy(scene.canvas)):
        path.write_bytes(seal(receipt))
    (scene.canvas / "_engine" / "plan.json").unlink()
    [verdict] = verify_outputs([scene.out])
    assert {"plan", "receipt", "receipt's copy"} <= {problem.name for problem in verdict.problems}


def test_one_hostile_picture_does_not_stop_the_verification_of_the_others(tmp_path):
    out = tmp_path / "out"
    for seed, name in enumerate("abc"):
        make_scene(out, name, seed=seed)
    plan = out / "b.zarr" / "_engine" / "plan.json"
    stored = unseal(plan.read_bytes())
    assert stored is not None
    plan.write_bytes(seal({**stored, "metadata": {"/dev/zero": "x"}}))
    assert [verdict.intact for verdict in verify_outputs([out])] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "is_ours"),
    [
        (lambda text: text, True),
        (lambda text: text[: len(text) // 2], True),
        (lambda text: text.replace(b"cra-srgan-engine/receipt", b"cra-srgan-engine/receipf", 1), True),
        (lambda text: text.replace(b"cra-srgan", b"cra-srgbn", 1), True),
        (lambda text: b'{"input": 1, "plan": 2, "plan_id": 3, "outputs": 4}', False),
        (lambda text: b'{"software": "cra-srgan-engine"}', False),
        (lambda text: b"", False),
    ],
)
def test_what_looks_like_a_receipt(tmp_path, change: Callable[[bytes], bytes], is_ours):
    scene = make_scene(tmp_path / "out", formats=("png",))
    path = scene.out / "a.json"
    path.write_bytes(change(path.read_bytes()))
    assert looks_like_receipt(path) is is_ours


def test_a_receipt_of_a_canvas_that_was_made_again_elsewhere_is_of_that_one(scene):
    """Another processor may give other bytes; whichever format was asked for, the receipt tells of what is there."""
    receipt = receipt_of(scene.out, "a")
    assert receipt is not None
    receipt["outputs"]["ome-zarr"]["sha256"] = "0" * 64
    store_receipt(scene.out, "a", receipt)
    job = replace(scene.job, formats=("png",))
    write_receipt(scene.plan, job.targets, job, FACTS)
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True]
