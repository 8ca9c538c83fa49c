"""Every damaged byte of an output is found and named, the same command makes it good, and nothing intact is accused."""

import errno
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.bag import make_bag
from engine.errors import StorageError, UnreadableInput
from engine.geometry import Box, Size
from engine.receipt import Job, announce, is_finished, keeps_canvas, plan_id_of, refuse_taken, tidy, write_receipt
from engine.store import FileLock
from engine.tiling.canvas import Canvas, adding_to
from engine.tiling.damage import Kind
from engine.tiling.execute import run
from engine.tiling.export import SUFFIX
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.ledger import Ledger, Record
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard
from engine.upkeep import Verdict, verify_outputs
from tests.outputs import FACTS, files, timeless

FORMATS = ("ome-zarr", "tiff", "png")
SIZE = Size(75, 131)
BATCH = 25
"""Files damaged before each verification; each must be named."""


@dataclass
class Scene:
    """One finished picture, its pixels, and how to run the command that made it once more."""

    job: Job
    plan: Plan
    picture: np.ndarray
    computed: list[ShardKey] = field(default_factory=list)
    smaller: dict[ShardKey, np.ndarray] = field(default_factory=dict)
    """The shards of the levels above, once they were made."""

    @property
    def out(self) -> Path:
        return self.job.out

    @property
    def canvas(self) -> Path:
        return self.out / f"{self.job.name}.zarr"

    def restore(self) -> None:
        """As `Restorer.restore`, with a picture that is there already in the place of a network."""
        plan, job = self.plan, self.job
        self.computed.clear()
        targets = {name: job.out / f"{job.name}{SUFFIX[name]}" for name in job.formats}
        if is_finished(plan, targets, job):
            return
        refuse_taken(plan, targets, job)
        if plan_id_of(self.canvas) == plan.plan_id:
            with adding_to(self.canvas) as canvas:
                tidy(job, targets)
                announce(canvas.scratch, targets)
                self._export(canvas, targets)
                write_receipt(plan, targets, job, FACTS)
            return
        with Canvas.open(plan, job.out) as canvas:
            tidy(job, targets)
            half = HalveShard(canvas)

            def work(key: ShardKey) -> np.ndarray:
                self.computed.append(key)
                if key.level == 0:
                    return self.picture[plan.grid.box(key).slices]
                if key not in self.smaller:
                    self.smaller[key] = half(key)
                return self.smaller[key]

            for _ in run(canvas, plan.grid.all_keys(), work):
                pass
            announce(canvas.scratch, targets)
            self._export(canvas, targets)
            write_receipt(plan, targets, job, FACTS)
            if keeps_canvas(plan, targets, job):
                canvas.publish(self.canvas, replace=job.replace)
            else:
                canvas.discard()

    def _export(self, canvas: Canvas, targets: dict[str, Path]) -> None:
        """With another library's writers: what is verified are the bytes, whoever wrote them."""
        for name, path in targets.items():
            if name != "ome-zarr":
                Image.fromarray(canvas.read(Box.of(self.plan.size))).save(path)


def make_scene(out: Path, name: str = "a", *, size: Size = SIZE, formats=FORMATS, seed: int = 0) -> Scene:
    """A picture of noise, so that every shard has bytes of its own, in shards of 32 px."""
    grid = Grid(size, 16, 32)
    plan = Plan(name, size, 3, "uint8", grid, f"a{seed}", "none", "lite", "b", {"scale": 1}, 0, 0)
    picture = np.random.default_rng(seed).integers(0, 256, (size.h, size.w, 3), np.uint8)
    out.mkdir(exist_ok=True)
    scene = Scene(Job(Path(__file__), None, out, name, formats), plan, picture)
    scene.restore()
    return scene


def bad_files(verdicts: list[Verdict], out: Path) -> set[str]:
    return {str(problem.path.relative_to(out)) for verdict in verdicts for problem in verdict.problems}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is such a place: nothing here depends on the disk, and fsync costs nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def out(folder, request) -> Path:
    path = folder / str(abs(hash(request.node.name)))
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def finished(folder) -> Scene:
    """For tests that bring it back to what it was, which they check."""
    return make_scene(folder / "finished")


@pytest.fixture
def scene(finished, out) -> Scene:
    """A copy of it, to be spoilt: no file tells in which folder it is."""
    shutil.copytree(finished.out, out, dirs_exist_ok=True)
    return replace(finished, job=replace(finished.job, out=out), computed=[])


def batches(intact: dict[str, bytes], total: int, seed: int) -> Iterator[list[str]]:
    """Names of files to damage together, `total` in all, none of which is judged by another one of them."""
    rng = random.Random(seed)
    while total > 0:
        names: list[str] = []
        for name in rng.sample(sorted(intact), len(intact)):
            if len(names) < min(BATCH, total) and not any(judges(name, own) or judges(own, name) for own in names):
                names.append(name)
        total -= len(names)
        yield names


def judges(name: str, other: str) -> bool:
    """Whether `other` can be judged, or made good, only with what `name` holds."""
    if name == "a.zarr/_engine/plan.json":
        return other.endswith("zarr.json")
    if name == "a.json":
        return other in ("a.zarr/_engine/receipt.json", "a.png", "a.tif")
    return "/ledger/" in name and "/c/0/" in other and shard_of(name) == shard_of(other)


def check_found_and_repaired(scene: Scene, damaged: set[str], intact: dict[str, bytes]) -> list[Verdict]:
    """One verification names just the damaged files; the same command makes just these shards again."""
    verdicts = list(verify_outputs([scene.out]))
    assert bad_files(verdicts, scene.out) == damaged
    assert all(verdict.note == "" for verdict in verdicts)
    scene.restore()
    assert files(scene.out) == intact
    assert {key.name for key in scene.computed} == {shard for name in damaged if (shard := shard_of(name))}
    return verdicts


def shard_of(name: str) -> str | None:
    """The shard that a damaged file, an object or a record, costs."""
    parts = name.split("/")
    if parts[:3] == ["a.zarr", "_engine", "ledger"]:
        return f"{parts[3]}/{parts[4].removesuffix('.json')}"
    return f"{parts[1]}/{parts[4]}.{parts[5]}" if parts[2:3] == ["c"] else None


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_flipped_bits(scene, hundred):
    rng, intact, flips = random.Random(100 + hundred), files(scene.out), 0
    for names in batches(intact, 100, seed=100 + hundred):
        for name in names:
            flip(scene.out / name, rng.randrange(8 * len(intact[name])))
        flips += len(names)
        check_found_and_repaired(scene, set(names), intact)
    assert flips == 100


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_truncations(scene):
    rng, intact = random.Random(2), files(scene.out)
    for names in batches(intact, 200, seed=2):
        for name in names:
            (scene.out / name).write_bytes(intact[name][: rng.choice([0, 1, rng.randrange(len(intact[name]))])])
        verdicts = check_found_and_repaired(scene, set(names), intact)
        kinds = {problem.kind for verdict in verdicts for problem in verdict.problems}
        assert kinds <= {Kind.TRUNCATED, Kind.RECORD, Kind.METADATA}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_deletions(scene):
    intact = files(scene.out)
    for names in batches(intact, 200, seed=3):
        for name in names:
            (scene.out / name).unlink()
        verdicts = check_found_and_repaired(scene, set(names), intact)
        assert {problem.kind for verdict in verdicts for problem in verdict.problems} == {Kind.MISSING}


@pytest.mark.slow
def test_fifty_swapped_shards(scene):
    rng, intact = random.Random(4), files(scene.out)
    shards = sorted(name for name in intact if "/c/0/" in name)
    for _ in range(50 // 10):
        names = rng.sample(shards, 20)
        for one, other in zip(names[::2], names[1::2], strict=True):
            (scene.out / one).write_bytes(intact[other])
            (scene.out / other).write_bytes(intact[one])
        [verdict] = check_found_and_repaired(scene, set(names), intact)
        assert {problem.kind for problem in verdict.problems} == {Kind.SWAPPED}


def test_fifty_untouched_outputs_are_not_accused(out):
    for seed in range(50):
        make_scene(out, f"p{seed}", size=Size(1 + seed, 40), formats=("ome-zarr", "png")[: 1 + seed % 2], seed=seed)
    before = files(out)
    verdicts = list(verify_outputs([out]))
    assert len(verdicts) == 50
    assert [verdict for verdict in verdicts if not verdict.intact or verdict.note] == []
    assert files(out) == before


@pytest.mark.parametrize(
    ("name", "damage", "kind", "called"),
    [
        ("a.zarr/0/c/0/1/2", "flip", Kind.CHANGED, "shard 0/1.2"),
        ("a.zarr/0/c/0/1/2", "cut", Kind.TRUNCATED, "shard 0/1.2"),
        ("a.zarr/0/c/0/1/2", "delete", Kind.MISSING, "shard 0/1.2"),
        ("a.zarr/_engine/ledger/1/0.1.json", "flip", Kind.RECORD, "record 1/0.1"),
        ("a.zarr/_engine/ledger/1/0.1.json", "delete", Kind.MISSING, "record 1/0.1"),
        ("a.zarr/_engine/plan.json", "flip", Kind.METADATA, "plan"),
        ("a.zarr/_engine/plan.json", "delete", Kind.MISSING, "plan"),
        ("a.zarr/zarr.json", "flip", Kind.METADATA, "metadata zarr.json"),
        ("a.zarr/2/zarr.json", "delete", Kind.MISSING, "metadata 2/zarr.json"),
        ("a.zarr/_engine/receipt.json", "flip", Kind.METADATA, "receipt's copy"),
        ("a.json", "flip", Kind.METADATA, "receipt"),
        ("a.json", "delete", Kind.MISSING, "receipt"),
        ("a.png", "flip", Kind.CHANGED, "png"),
        ("a.tif", "cut", Kind.TRUNCATED, "tiff"),
        ("a.png", "delete", Kind.MISSING, "png"),
    ],
)
def test_what_each_damage_is_called(finished, name, damage, kind, called):
    intact = files(finished.out)
    path = finished.out / name
    if damage == "flip":
        flip(path, 8 * (len(intact[name]) // 2))
    elif damage == "cut":
        path.write_bytes(intact[name][:-1])
    else:
        path.unlink()
    [verdict] = check_found_and_repaired(finished, {name}, intact)
    assert verdict.path == finished.canvas
    [problem] = verdict.problems
    assert (problem.name, problem.kind) == (called, kind)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("name", "kind"), [("a.png", Kind.UNREADABLE), ("a.json", Kind.METADATA)])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(scene, name, kind):
    intact = files(scene.out)
    (scene.out / name).unlink()
    os.mkfifo(scene.out / name)
    [verdict] = verify_outputs([scene.out])
    assert [(problem.path.name, problem.kind) for problem in verdict.problems] == [(name, kind)]
    if name == "a.png":
        (scene.out / name).unlink()  # Pillow, which writes here, would wait for it
    scene.restore()
    assert files(scene.out) == intact


def test_what_is_damaged_together_with_its_judge_is_made_good_unjudged(scene):
    intact = files(scene.out)
    judged = ["a.zarr/2/zarr.json", "a.zarr/0/c/0/1/1", "a.zarr/zarr.json"]
    judges = ["a.zarr/_engine/plan.json", "a.zarr/_engine/ledger/0/1.1.json"]
    for name in (*judges, *judged):
        flip(scene.out / name, 99)
    assert bad_files(list(verify_outputs([scene.out])), scene.out) == set(judges)
    scene.restore()
    assert files(scene.out) == intact


def test_plan_and_receipt_may_both_be_lost_while_a_record_is_left(scene):
    intact = files(scene.out)
    names = {"a.zarr/_engine/plan.json", "a.json"}
    for name in names:
        flip(scene.out / name, 99)
    check_found_and_repaired(scene, names, intact)


def test_a_lost_plan_is_said_and_replaced(scene):
    intact = timeless(scene.out)
    shutil.rmtree(scene.canvas / "_engine" / "ledger")
    for name in ("a.zarr/_engine/plan.json", "a.zarr/_engine/receipt.json", "a.json"):
        flip(scene.out / name, 99)
    [verdict] = verify_outputs([scene.out])
    assert "plan" in {problem.name for problem in verdict.problems}
    assert "--replace" in verdict.note
    scene.job = Job(scene.job.image, None, scene.out, "a", FORMATS, replace=True)
    scene.restore()
    assert timeless(scene.out) == intact


def test_damage_of_a_canvas_in_progress(scene):
    intact = files(scene.out)
    working = scene.plan.working_folder(scene.out)
    scene.canvas.rename(working)
    (working / "_engine" / "ledger" / "0" / "0.0.json").unlink()  # not made yet: no damage
    flip(working / "0" / "c" / "0" / "1" / "1", 4000)
    flip(working / "_engine" / "ledger" / "0" / "2.0.json", 77)
    verdicts = list(verify_outputs([working]))
    assert [problem.name for problem in verdicts[0].problems] == ["record 0/2.0", "shard 0/1.1"]
    scene.restore()
    assert [key.name for key in scene.computed] == ["0/0.0", "0/1.1", "0/2.0"]
    assert files(scene.out) == intact


def test_a_canvas_that_is_being_written_is_left_alone(scene):
    working = scene.plan.working_folder(scene.out)
    scene.canvas.rename(working)
    flip(working / "0" / "c" / "0" / "1" / "1", 4000)
    before = files(scene.out)
    lock = FileLock.try_take(working / "_engine" / "lock")
    assert lock is not None
    [verdict] = verify_outputs([working])
    lock.release()
    assert (verdict.problems, "in use" in verdict.note) == ((), True)
    assert files(scene.out) == before


def test_damage_is_out_of_sight_until_it_is_repaired(scene):
    """Readers follow published names only; another command of the same plan must not take the canvas for rubbish."""
    intact = files(scene.out)
    flip(scene.canvas / "0" / "c" / "0" / "1" / "1", 4000)
    [verdict] = verify_outputs([scene.canvas])
    assert not verdict.intact
    assert not scene.canvas.exists()
    job = scene.job
    scene.job = Job(job.image, None, job.out, "a", ("png",))
    scene.restore()
    assert scene.plan.working_folder(scene.out).exists()
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True, False]  # the canvas is still not there
    scene.job = job
    scene.restore()
    assert files(scene.out) == intact


def test_a_format_made_again_publishes_a_canvas_that_waits(scene):
    intact = files(scene.out)
    flip(scene.canvas / "0" / "c" / "0" / "1" / "1", 4000)
    flip(scene.out / "a.png", 4000)
    assert len(next(verify_outputs([scene.out])).problems) == 2
    scene.job = Job(scene.job.image, None, scene.out, "a", ("png",))
    scene.restore()
    assert files(scene.out) == intact


def test_pictures_without_a_canvas_are_verified_by_their_receipt(out):
    scene = make_scene(out, formats=("tiff", "png"))
    assert [verdict.intact for verdict in verify_outputs([out])] == [True]
    intact = files(out)
    flip(out / "a.tif", 4000)
    [verdict] = verify_outputs([out / "a.json"])
    assert (verdict.path, [problem.name for problem in verdict.problems]) == (out / "a.json", ["tiff"])
    scene.restore()
    assert files(out) == intact


def test_every_bit_of_a_lone_receipt(out):
    make_scene(out, size=Size(5, 5), formats=("png",))
    path = out / "a.json"
    intact = path.read_bytes()
    for bit in range(0, 8 * len(intact), 7):
        flip(path, bit)
        [verdict] = verify_outputs([out])
        assert not verdict.intact, bit
        path.write_bytes(intact)


def test_what_is_not_ours_is_no_output(out):
    (out / "other.zarr").mkdir()
    (out / "a.png").write_bytes(b"a picture")
    for name, text in FOREIGN_JSON.items():
        (out / name).write_bytes(text)
    for path in (out, out / "gone", *(out / name for name in FOREIGN_JSON)):
        with pytest.raises(UnreadableInput, match=r"receipt of this program|0 outputs checked"):
            list(verify_outputs([path]))
    (out / "a.png").unlink()
    make_scene(out)
    assert [verdict.path for verdict in verify_outputs([out])] == [out / "a.zarr"]


FOREIGN_JSON = {
    "notes.json": b'{"outputs": [], "plan": 7, "plan_id": "x", "input": 1, "seal": 2}',
    "half.json": b'x "plan" y',
    "list.json": b"[1, 2]",
    "binary.json": b'\xff\xfe"seal"',
    "report.json": b'{"title": "made with cra-srgan-engine", "schema": "other/1"}',
}


def test_a_renamed_output_is_checked_but_not_taken_back(scene):
    renamed = scene.canvas.rename(scene.out / "copy.zarr")
    shutil.rmtree(renamed / "2" / "c")
    [verdict] = verify_outputs([renamed])
    assert [problem.kind for problem in verdict.problems] == [Kind.SWAPPED, Kind.MISSING, Kind.MISSING]
    assert "a.zarr" in verdict.note
    assert renamed.exists()


def swap(one: Path, other: Path) -> None:
    aside = one.rename(one.with_name("aside"))
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize(("suffix", "called"), [(".zarr", "ome-zarr"), (".json", "receipt")])
def test_what_changed_places_with_another_picture_is_found(out, suffix, called):
    scenes = [make_scene(out, name, seed=seed) for seed, name in enumerate("ab")]
    intact = files(out)
    swap(out / f"a{suffix}", out / f"b{suffix}")
    verdicts = list(verify_outputs([out]))
    found = [[(problem.name, problem.kind) for problem in verdict.problems] for verdict in verdicts]
    assert found == [[(called, Kind.SWAPPED)]] * 2
    assert ["its name" in verdict.note for verdict in verdicts] == [True, True]
    with pytest.raises(UnreadableInput, match="engine verify"):
        make_bag(out, out.with_name(f"{out.name}-bag"))
    swap(out / f"a{suffix}", out / f"b{suffix}")
    assert all(verdict.intact for verdict in verify_outputs([out]))
    for scene in scenes:
        scene.restore()
    assert files(out) == intact


def test_a_canvas_of_another_run_is_found(scene, folder):
    other = make_scene(folder / "elsewhere", seed=7)
    shutil.rmtree(scene.canvas)
    shutil.copytree(other.canvas, scene.canvas)
    [verdict] = verify_outputs([scene.out])
    assert [(problem.name, problem.kind) for problem in verdict.problems] == [("ome-zarr", Kind.SWAPPED)]
    assert scene.canvas.exists()


def test_records_that_are_not_those_of_the_receipt_are_found(scene):
    """A shard and its record changed together: only the receipt can tell."""
    shard, key = scene.canvas / "0" / "c" / "0" / "1" / "1", ShardKey(0, 1, 1)
    shard.write_bytes(b"x" * 100)
    ledger = Ledger(scene.canvas / "_engine" / "ledger", plan_id=scene.plan.plan_id)
    ledger.strike(key)
    ledger.add(Record(key, hashlib.sha256(b"x" * 100).hexdigest(), 100))
    [verdict] = verify_outputs([scene.out])
    assert [(problem.name, problem.kind) for problem in verdict.problems] == [("ome-zarr", Kind.CHANGED)]


def test_a_canvas_without_any_receipt_is_not_intact(scene):
    for path in (scene.out / "a.json", scene.canvas / "_engine" / "receipt.json"):
        path.unlink()
    flip(scene.out / "a.png", 4000)
    [verdict] = verify_outputs([scene.out])
    assert [(problem.name, problem.kind) for problem in verdict.problems] == [("receipt", Kind.MISSING)]
    assert "move its exported files away" in verdict.note
    for fmt in ("png", "tif"):
        (scene.out / f"a.{fmt}").rename(scene.out / f"moved.{fmt}")
    scene.restore()
    assert scene.computed == []
    assert all(verdict.intact for verdict in verify_outputs([scene.out]))


@pytest.mark.parametrize("older", ["a.json", "a.zarr/_engine/receipt.json"])
def test_the_older_one_of_two_receipts_is_made_good(out, older):
    scene = make_scene(out, formats=("ome-zarr", "png"))
    before = (out / older).read_bytes()
    scene.job = replace(scene.job, formats=FORMATS)
    scene.restore()
    intact = files(out)
    (out / older).write_bytes(before)
    [verdict] = verify_outputs([out])
    assert [(problem.path, problem.kind) for problem in verdict.problems] == [(out / older, Kind.OUTDATED)]
    assert files(out) == intact


def test_a_canvas_that_only_has_to_be_published_is_no_damage(scene):
    """Killed behind its receipt: all is there, and only the name is not."""
    intact = files(scene.out)
    working = scene.plan.working_folder(scene.out)
    scene.canvas.rename(working)
    verdicts = list(verify_outputs([scene.out]))
    assert [(verdict.path, verdict.problems) for verdict in verdicts] == [(working, ()), (scene.out / "a.json", ())]
    assert "in progress" in verdicts[1].note
    (working / "_engine" / "ledger" / "0" / "0.0.json").unlink()
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [True, False]
    scene.restore()
    assert files(scene.out) == intact


def test_the_swap_of_a_canvas_is_no_damage(out):
    """Killed between the new receipt and the new name."""
    old, new = make_scene(out), make_scene(out.with_name(f"{out.name}-new"), seed=1)
    for name in ("a.json", "a.png", "a.tif"):
        shutil.copy(new.out / name, out / name)
    shutil.copytree(new.canvas, new.plan.working_folder(out))
    verdicts = list(verify_outputs([out]))
    assert [(verdict.path, verdict.problems) for verdict in verdicts] == [
        (new.plan.working_folder(out), ()),
        (old.canvas, ()),
    ]
    assert "is being replaced" in verdicts[1].note


def test_a_canvas_carried_away_alone_is_intact(scene, folder):
    alone = folder / "alone" / "a.zarr"
    shutil.copytree(scene.canvas, alone)
    [verdict] = verify_outputs([alone])
    assert verdict.intact


def test_progress_tells_every_byte(scene):
    told: dict[Path, int] = {}
    list(verify_outputs([scene.out], progress=told.__setitem__))
    stored = [path for path in scene.out.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert told == {path: path.stat().st_size for path in stored}


def test_a_disk_that_fails_to_read(scene, monkeypatch):
    """Reading is the point of failure, not the bytes: it is named, and no other shard is accused."""
    from engine.tiling import damage

    real, opened, bad = damage.digest_of, damage.open_regular, scene.canvas / "0" / "c" / "0" / "1" / "1"

    def failing(path: Path):
        if path == bad:
            raise StorageError(f"{path}: Input/output error")
        return real(path)

    def unreadable(path: Path):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    monkeypatch.setattr(damage, "digest_of", failing)
    monkeypatch.setattr(damage, "open_regular", unreadable)
    [verdict] = verify_outputs([scene.canvas])
    assert [(problem.path, problem.kind) for problem in verdict.problems] == [(bad, Kind.UNREADABLE)]
