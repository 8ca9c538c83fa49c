"""A batch in one process: what has ended is looked up, what has changed is made again, every end is written down."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.batch.catalog import read_catalog
from engine.batch.inputs import Item, find_inputs
from engine.batch.run import restore_all
from engine.batch.work import DONE, REFUSED, Order, Outcome
from engine.errors import OutputBusy
from engine.outputs import batch_lock
from engine.request import Request
from engine.restoration import Restorer
from engine.store import FileLock
from engine.tiling.canvas import Canvas
from engine.upkeep import verify_outputs
from tests.networks import TINY, random_checkpoint


class Scene:
    """Three pictures, one of them broken, and the batch that restores them."""

    def __init__(self, folder: Path, model: str, formats: tuple[str, ...] = ("png",)) -> None:
        self.source, self.out = folder / "in", folder / "out"
        (self.source / "1890").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in ("a", "1890/b"):
            cv2.imwrite(str(self.source / f"{name}.png"), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        (self.source / "broken.png").write_bytes(b"not a picture")
        self.order = Order(self.out, Request(), formats, model)
        self.restorer = self.order.restorer(threads=1)

    def items(self) -> list[Item]:
        return list(find_inputs([str(self.source)], out=str(self.out)))

    def run(self, order: Order | None = None, **options: bool) -> dict[str, Outcome]:
        told = list(restore_all(self.items(), order or self.order, self.restorer, **options))
        return {outcome.item.name: outcome for outcome in told}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture
def scene(tmp_path, model) -> Scene:
    return Scene(tmp_path, model)


def looked_up(found: dict[str, Outcome]) -> list[str]:
    return sorted(name for name, outcome in found.items() if outcome.looked_up)


def test_every_end_is_in_the_catalog(scene):
    found = scene.run()
    assert {name: outcome.status for name, outcome in found.items()} == {"a": DONE, "1890/b": DONE, "broken": REFUSED}
    rows = read_catalog(scene.out)
    assert rows.keys() == found.keys()
    assert (rows["broken"].reason, rows["broken"].outputs) == ("unreadable-input", ())
    assert (scene.out / "1890" / rows["1890/b"].outputs[0].name).is_file()
    assert rows["a"].megapixels == 600 / 1e6
    assert json.loads((scene.out / "_batch" / "job.json").read_text())["total"] == 3


def test_what_has_ended_costs_a_look(scene, monkeypatch):
    scene.run()
    monkeypatch.setattr(Restorer, "restore", None)  # nothing is restored, or even planned
    assert looked_up(scene.run()) == ["1890/b", "a", "broken"]


def test_a_changed_picture_is_made_again(scene):
    scene.run()
    os.utime(scene.source / "a.png", (1, 1))
    found = scene.run()
    assert looked_up(found) == ["1890/b", "broken"]
    assert found["a"].shards_reused == found["a"].shards_total  # the same bytes: found finished by their digest


def test_other_formats_are_another_request(scene):
    scene.run()
    order = Order(scene.out, Request(), ("png", "tiff"), scene.order.model)
    assert looked_up(scene.run(order)) == []
    assert (scene.out / "1890" / "b.tif").is_file()


def test_refused_pictures_are_tried_again_when_asked(scene):
    scene.run()
    cv2.imwrite(str(scene.source / "broken.png"), np.zeros((20, 30, 3), np.uint8))
    os.utime(scene.source / "broken.png", (1, 1))
    assert scene.run()["broken"].status == DONE
    (scene.source / "bad.png").write_bytes(b"")
    assert scene.run()["bad"].status == REFUSED
    assert "bad" in looked_up(scene.run())
    assert "bad" not in looked_up(scene.run(retry_failed=True))


@pytest.mark.parametrize("reason", ["output-busy", "output-exists", "not-enough-disk"])
def test_what_was_in_the_way_once_is_not_remembered(scene, reason):
    with pytest.MonkeyPatch.context() as patch:
        if reason == "output-busy":
            job = scene.order.job(next(item for item in scene.items() if item.name == "a"))
            canvas = Canvas.open(scene.restorer.plan(job, scene.order.request)[0], job.out)
        elif reason == "output-exists":
            scene.out.mkdir()
            (scene.out / "a.png").write_bytes(b"somebody's")
        else:
            patch.setattr("engine.tiling.plan.free_bytes", lambda _: 0)
        assert scene.run()["a"].reason == reason
    if reason == "output-busy":
        canvas.close()
    elif reason == "output-exists":
        (scene.out / "a.png").unlink()
    again = scene.run()
    assert again["a"].status == DONE
    assert "broken" in looked_up(again)


def test_what_verify_strikes_is_made_again(scene):
    scene.run()
    path = scene.out / "a.png"
    data = bytearray(intact := path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert [verdict.intact for verdict in verify_outputs([scene.out])] == [False, True]
    assert looked_up(scene.run()) == ["1890/b", "broken"]
    assert path.read_bytes() == intact


def test_a_lost_output_is_made_again(scene):
    scene.run()
    (scene.out / "1890" / "b.png").unlink()
    assert looked_up(scene.run()) == ["a", "broken"]
    assert (scene.out / "1890" / "b.png").is_file()


def test_a_second_batch_on_the_same_output_is_refused(scene):
    batch_lock(scene.out).parent.mkdir(parents=True)
    lock = FileLock.try_take(batch_lock(scene.out))
    assert lock is not None
    with pytest.raises(OutputBusy, match="another batch"):
        scene.run()
    lock.release()
    assert len(scene.run()) == 3


def test_one_picture_alone_leaves_no_catalog(scene):
    (found,) = restore_all(scene.items()[:1], scene.order, scene.restorer)
    assert found.status == DONE
    assert not (scene.out / "_batch").exists()
