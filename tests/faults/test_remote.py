"""Outputs on an object store: whatever is killed, lost or late, a pointer names what is there, bit for bit."""

import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import engine.guide
import engine.planning
from engine import objects, remote
from engine.cli import app
from engine.errors import OutputExists, StorageError, UnreadableInput
from engine.objects import Prefix
from engine.receipt import read_receipt
from engine.remote import read_pointer
from engine.restoration import restore
from engine.tiling.grid import Grid
from engine.tiling.seal import seal
from engine.upkeep import verify_outputs
from tests.forked import JobServer, job_server
from tests.networks import TINY, random_checkpoint

JOB = Path(__file__).with_name("s3_job.py")
KILLED = -signal.SIGKILL
WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A picture of 60 x 130 px with a hole, and a network."""
    folder = tmp_path_factory.mktemp("inputs")
    missing = np.zeros((60, 130), np.uint8)
    missing[20:35, 40:90] = 255
    cv2.imwrite(str(folder / "a.png"), np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8))
    cv2.imwrite(str(folder / "m.png"), missing)
    random_checkpoint(folder, TINY)
    return folder


def model_of(folder: Path) -> str:
    return str(next(folder.glob("*.safetensors")))


@pytest.fixture
def _small(monkeypatch) -> None:
    monkeypatch.setattr(engine.planning, "Grid", partial(Grid, chunk_px=32, shard_px=64))
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 32)


@pytest.fixture
def run(_small, folder):
    """Restores the picture at x2."""

    def run(out: Any, **options: Any):
        given = {"mask": folder / "m.png", "scale": 2, "model": model_of(folder), **options}
        return restore(given.pop("image", folder / "a.png"), out=str(out), **given)

    return run


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory) -> dict[str, Any]:
    """What a run into a folder makes, by format and key, without what tells the time."""
    out = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.planning, "Grid", partial(Grid, chunk_px=32, shard_px=64))
        patch.setattr(engine.guide, "GUIDE_PX", 32)
        restore(folder / "a.png", out=out, mask=folder / "m.png", scale=2, model=model_of(folder))
    receipt = read_receipt(out / "a.json")
    assert receipt is not None
    made = {fmt: out / entry["name"] for fmt, entry in receipt["outputs"].items()}
    found = {f"{fmt}/": path.read_bytes() for fmt, path in made.items() if path.is_file()}
    canvas = made["ome-zarr"]
    for path in canvas.rglob("*"):
        if path.is_file() and path.name != "receipt.json":  # of which there is no copy on an object store
            found[f"ome-zarr/{path.relative_to(canvas).as_posix()}"] = path.read_bytes()
    del receipt["finished"]
    return found | {"receipt": receipt}


def published(out: Prefix) -> dict[str, Any]:
    """The same of what a pointer names."""
    pointer = read_pointer(out, "a")
    assert pointer is not None
    assert pointer.receipt is not None
    found: dict[str, bytes] = {}
    for fmt, place in remote.places(out, pointer.receipt).items():
        for key in place.keys() if fmt == "ome-zarr" else [""]:
            found[f"{fmt}/{key}"] = place.get(key)
    del pointer.receipt["finished"], pointer.receipt["prefix"]
    return found | {"receipt": pointer.receipt}


def in_parts(out: Prefix) -> list[str]:
    """The parts of all plans below a prefix."""
    return sorted({"/".join(key.split("/")[:3]) for key in out.keys() if key.count("/") > 1})  # noqa: SIM118


def test_a_picture_from_the_store_to_the_store_is_as_a_local_one(prefix, run, folder, local, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("a.png", "m.png"):
        (prefix / "in").upload(name, folder / name)
    receipt = run(prefix / "out", image=str(prefix / "in/a.png"), mask=str(prefix / "in/m.png"))
    assert published(prefix / "out") == local
    assert [str(place).rpartition("/")[2] for place in receipt.outputs] == ["a.zarr", "a.png", "a.generated.png"]
    assert list(tmp_path.iterdir()) == []


def test_the_pointer_is_stored_last_and_once(s3, prefix, run):
    run(prefix)
    changes = [request for request in s3.requests if request.method in WRITES]
    assert changes[-1].path.endswith("/a.json")
    assert sum(request.path.endswith("/a.json") for request in changes) == 1


def test_finished_work_is_looked_up_and_not_touched(s3, prefix, run, local):
    first = run(prefix)
    s3.requests.clear()
    again = run(prefix)
    assert [request for request in s3.requests if request.method in WRITES] == []
    assert (again.outputs, again.shards_reused) == (first.outputs, first.shards_total)
    assert published(prefix) == local


def test_another_format_is_added_to_what_is_there(s3, prefix, run):
    run(prefix, formats=("ome-zarr",))
    s3.requests.clear()
    receipt = run(prefix, formats=("tiff", "iiif"))
    assert receipt.shards_reused == receipt.shards_total
    assert s3.count("PUT", r"\.zarr/") == 0
    pointer = read_pointer(prefix, "a")
    assert set(pointer.receipt["outputs"]) == {"ome-zarr", "tiff", "iiif", "generated"}
    s3.requests.clear()
    run(prefix, formats=("iiif", "ome-zarr"))
    assert [request for request in s3.requests if request.method in WRITES] == []
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


def test_without_ome_zarr_the_canvas_goes(prefix, run):
    run(prefix, formats=("png",))
    assert not any(".zarr" in key for key in prefix.keys())  # noqa: SIM118
    assert remote.stale(prefix, now=datetime.now(UTC) + timedelta(days=2)) == []
    assert len(list(prefix.keys())) == 3


def test_another_plan_is_refused_and_swapped_in_where_that_is_asked_for(prefix, run, local):
    run(prefix)
    old = in_parts(prefix)
    with pytest.raises(OutputExists, match="--replace"):
        run(prefix, scale=1)
    assert in_parts(prefix) == old
    run(prefix, scale=1, replace=True)
    assert read_pointer(prefix, "a").receipt["plan"]["parameters"]["scale"] == 1
    assert remote.stale(prefix) == []  # somebody may be reading the old ones
    stale = remote.stale(prefix, now=datetime.now(UTC) + timedelta(days=2))
    assert sorted(str(part.path.path).removeprefix(f"{prefix.path}/") for part in stale) == old
    assert {part.sort for part in stale} == {"replaced"}
    assert list(remote.clean(prefix, stale)) == stale
    assert not set(in_parts(prefix)) & set(old)
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]
    run(prefix, replace=True)
    assert published(prefix) == local


def test_another_program_s_object_under_the_pointer_s_name_is_not_replaced(prefix, run):
    prefix.put("a.json", b"{}")
    with pytest.raises(OutputExists, match="another plan or program"):
        run(prefix)
    assert prefix.get("a.json") == b"{}"


def test_a_pointer_that_leads_elsewhere_is_not_followed(prefix, run):
    run(prefix, formats=("png",))
    pointer = read_pointer(prefix, "a")
    prefix.put("a.json", seal({**pointer.receipt, "prefix": "../other"}))
    assert read_pointer(prefix, "a").receipt is None


def test_another_compression_of_the_same_plan_takes_nothing_away(prefix, run, folder):
    """Its bytes differ, and the pointer names the old ones until it names the new ones."""
    common = ["restore", str(folder / "a.png"), "--format", "tiff", "--model", model_of(folder)]
    runner = CliRunner()
    for compression in ("zstd", "lzw"):
        done = runner.invoke(app, [*common, "--out", str(prefix), "--tiff-compression", compression])
        assert done.exit_code == 0, done.output
    assert len(in_parts(prefix)) == 2
    assert read_pointer(prefix, "a").receipt["outputs"]["tiff"]["compression"] == "lzw"
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


@pytest.mark.parametrize("action", ["lose-answer", "lose-request", "busy", "busy-but-done"])
def test_no_lost_answer_changes_what_is_published(s3, prefix, run, local, action):
    faults = [s3.fail(action, "PUT", key, times=2) for key in (r"a\.json", "/c/0/", "/ledger/", r"a\.png", "plan")]
    run(prefix)
    assert all(fault.met >= 2 for fault in faults)
    assert published(prefix) == local
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


@pytest.mark.parametrize(("first", "second"), [("ome-zarr", "png"), ("png", "ome-zarr")])
def test_a_pointer_that_another_writer_stored_meanwhile_is_looked_at_again(prefix, run, monkeypatch, first, second):
    """Between the look at the pointer and its replacement, the same plan is published with another format.

    One of the two needs its canvas only as a step, and deletes it.
    """
    real, publish, publishing = remote.read_pointer, remote.publish, [False, False]

    def late(out, name):
        found = real(out, name)
        if publishing == [True, False]:  # the first look there
            publishing[1] = True
            run(prefix, formats=(first,))
        return found

    def begun(*arguments, **named):
        publishing[0] = True
        return publish(*arguments, **named)

    monkeypatch.setattr(remote, "read_pointer", late)
    monkeypatch.setattr(remote, "publish", begun)
    run(prefix, formats=(second,))
    assert publishing == [True, True]
    assert set(real(prefix, "a").receipt["outputs"]) == {"ome-zarr", "png", "generated"}
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


def damage_shard(out: Prefix) -> None:
    key = next(key for key in out.keys() if key.endswith(".zarr/0/c/0/0/1"))  # noqa: SIM118
    data = bytearray(out.get(key))
    data[len(data) // 2] ^= 1
    out.put(key, bytes(data))


def delete(out: Prefix, part: str) -> None:
    out.delete(next(key for key in out.keys() if key.endswith(part)))  # noqa: SIM118


def test_what_was_damaged_meanwhile_is_not_published(s3, prefix, run, monkeypatch):
    monkeypatch.setattr(objects, "MAX_RETRIES", 1)
    objects._client.cache_clear()
    fault = s3.fail("busy", "PUT", r"a\.json", times=1000)
    with pytest.raises(StorageError, match=r"a\.json"):
        run(prefix, formats=("ome-zarr",))
    s3.faults.remove(fault)
    damage_shard(prefix)
    with pytest.raises(StorageError, match=r"1 of .* shards are missing or damaged"):
        run(prefix, formats=("ome-zarr",))
    assert prefix.get("a.json") is None
    run(prefix, formats=("ome-zarr",))
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


DAMAGES = {
    "shard 0/0.1": damage_shard,
    "shard 1/0.0": lambda out: delete(out, ".zarr/1/c/0/0/0"),
    "record 0/0.1": lambda out: delete(out, "ledger/0/0.1.json"),
    "png": lambda out: delete(out, "/a.png"),
    "plan": lambda out: delete(out, "plan.json"),
    "metadata 0/zarr.json": lambda out: delete(out, "0/zarr.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_struck_and_made_again(prefix, run, local, name):
    run(prefix)
    DAMAGES[name](prefix)
    [verdict] = verify_outputs([prefix])
    assert [problem.name for problem in verdict.problems] == [name]
    assert not next(verify_outputs([prefix])).intact  # it stays named until it is made
    run(prefix)
    assert published(prefix) == local
    assert [verdict.intact for verdict in verify_outputs([prefix / "a.json"])] == [True]


def test_a_damaged_pointer_costs_no_shard(prefix, run, local):
    run(prefix)
    prefix.put("a.json", prefix.get("a.json")[:-1])
    [verdict] = verify_outputs([prefix])
    assert "--replace" in verdict.note
    assert remote.stale(prefix, now=datetime.now(UTC) + timedelta(days=2)) == []
    receipt = run(prefix, replace=True)
    assert receipt.shards_reused == receipt.shards_total
    assert published(prefix) == local


def test_the_commands_take_urls_or_say_that_they_do_not(prefix, run, folder, tmp_path):
    run(prefix)
    runner = CliRunner()
    assert runner.invoke(app, ["verify", str(prefix)]).output == f"{prefix}/a.json: intact\n"
    damage_shard(prefix)
    assert runner.invoke(app, ["verify", str(prefix / "a.json")]).exit_code == 3
    run(prefix)
    cleaned = runner.invoke(app, ["clean", str(prefix)])
    assert (cleaned.exit_code, cleaned.output) == (0, "")
    export = ["export", str(prefix / "a.json"), "--format", "tiff"]
    assert runner.invoke(app, export).exit_code == 2
    done = runner.invoke(app, [*export, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.tif").is_file()
    keys = ["--certificate", str(folder / "a.png"), "--key", str(folder / "a.png")]
    for refused in (["bag", str(prefix), str(tmp_path / "bag")], ["sign", str(prefix), *keys]):
        done = runner.invoke(app, refused)
        assert done.exit_code == 2
        assert "object store" in done.output.replace("\n", " ")
    assert runner.invoke(app, ["verify", str(prefix / "elsewhere")]).exit_code == 3


def test_an_input_that_is_not_there_is_refused(prefix, run):
    with pytest.raises(UnreadableInput, match="no such object"):
        run(prefix, image=str(prefix / "b.png"))


# Jobs that are killed: processes of their own.


@pytest.fixture(scope="module")
def server(s3_server, tmp_path_factory) -> Iterator[JobServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))  # where a killed job leaves its folder
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        with job_server(JOB) as server:
            yield server


def arguments(folder: Path, out: Prefix) -> list[str]:
    options = ["--mask", str(folder / "m.png"), "--scale", "2", "--model", model_of(folder)]
    return ["restore", str(folder / "a.png"), *options, "--out", str(out)]


def recorded(s3: Prefix) -> set[str]:
    found = (key.partition("/ledger/")[2] for key in s3.keys() if "/ledger/" in key)  # noqa: SIM118
    return {name.removesuffix(".json") for name in found}


FAILPOINTS = [
    ("put", 2),  # in the lay-out
    *(("create", n) for n in (1, 4, 12)),
    *(("record", n) for n in (2, 9, 20)),
    *(("upload", n) for n in (1, 2)),
    *(("publish", n) for n in (1, 2)),
]


@pytest.mark.parametrize(("name", "occurrence"), FAILPOINTS, ids=[f"{name}-{n}" for name, n in FAILPOINTS])
def test_a_killed_job_resumes_to_the_same_bytes(s3, prefix, server, folder, local, tmp_path, name, occurrence):
    notes = tmp_path / "notes"
    job = [arguments(folder, prefix), str(notes)]
    assert server.run(*job, failpoint=f"{name}:{occurrence}:kill") == KILLED
    before = notes.read_text().split() if notes.exists() else []
    finished = recorded(prefix)
    if prefix.get("a.json") is not None:  # only the kill behind the publication leaves a pointer, and to what is there
        assert (name, occurrence) == ("publish", 2)
        assert published(prefix) == local
    assert server.run(*job) == 0, Path(f"{notes}.log").read_text()
    again = notes.read_text().split()[len(before) :]
    assert set(again).isdisjoint(finished)
    assert len(again) == len(set(again))
    assert published(prefix) == local
    assert in_parts(prefix) == sorted(
        str(place).removeprefix(f"{prefix}/").rpartition("/")[0]
        if fmt != "ome-zarr"
        else str(place).removeprefix(f"{prefix}/")
        for fmt, place in remote.places(prefix, read_pointer(prefix, "a").receipt).items()
    )


def test_two_jobs_at_once_publish_the_same(s3, prefix, server, folder, local, tmp_path):
    ends: list[int] = []
    with job_server(JOB) as other:

        def start(which: JobServer, name: str) -> None:
            ends.append(which.run(arguments(folder, prefix), str(tmp_path / name)))

        jobs = [threading.Thread(target=start, args=pair) for pair in ((server, "one"), (other, "two"))]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert ends == [0, 0]
    assert published(prefix) == local
    assert [verdict.intact for verdict in verify_outputs([prefix])] == [True]


def test_a_store_that_stays_away_fails_the_picture_alone(s3, prefix, run, monkeypatch, local):
    monkeypatch.setattr(objects, "MAX_RETRIES", 1)
    objects._client.cache_clear()
    fault = s3.fail("busy", "PUT", "ledger", skip=5, times=1000)
    with pytest.raises(StorageError, match=r"ledger/.*1 retries within 180 s"):
        run(prefix)
    assert prefix.get("a.json") is None
    s3.faults.remove(fault)
    receipt = run(prefix)
    assert receipt.shards_reused == 5
    assert published(prefix) == local
