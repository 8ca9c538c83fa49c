"""The same pictures, whether they lie in a folder, in a tar or in a bucket."""

import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.errors import TrainingError
from engine.train.dataset import Pictures, batch_of
from engine.train.recipes import lite
from engine.train.run import Run
from engine.train.sources import find
from tests.train.conftest import soft_noise

SIDE_PX = 256
NAMES = ["film_damage/hair/0.png", "photos/a.png", "photos/b.jpg", "scenes/c.webp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = soft_noise(SIDE_PX, SIDE_PX, seed=seed)
        cv2.imwrite(str(path), np.dstack([picture, picture[..., 0]]) if "film" in name else picture)
    (folder / "photos" / "notes.txt").write_text("no picture")
    return folder


def tarred(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in [*NAMES, "photos/notes.txt"]:
            tar.add(folder / name, name)
    return path


def read(found) -> dict[str, bytes]:
    return {one.name: one.read() for one in found}


def test_a_tar_is_a_folder(folder, tmp_path):
    tarred(folder, tmp_path / "all.tar")
    assert [one.name for one in find(tmp_path)] == NAMES
    assert read(find(tmp_path)) == read(find(folder)) == {name: (folder / name).read_bytes() for name in NAMES}


def test_a_bucket_is_a_folder(folder, prefix, tmp_path):
    for name in NAMES:
        prefix.put(f"data/{name}", (folder / name).read_bytes())
    assert read(find(prefix / "data")) == read(find(folder))
    prefix.put("tars/below/all.tar", tarred(folder, tmp_path / "all.tar").read_bytes())
    assert [one.name for one in find(prefix / "tars")] == [f"below/{name}" for name in NAMES]
    assert [one.read() for one in find(prefix / "tars")] == [one.read() for one in find(folder)]


def test_batches_are_the_same_from_everywhere(folder, prefix, tmp_path):
    tarred(folder, tmp_path / "tar" / "all.tar")
    for name in NAMES:
        prefix.put(name, (folder / name).read_bytes())
    for stage in lite().stages[2:4]:
        small = replace(stage, draws=tuple(replace(draw, batch=1, side_px=16) for draw in stage.draws))
        first, *others = (
            batch_of(Run(lite(), data, tmp_path, "CC0").pictures(small), small, seed=1, step=2)
            for data in (folder, tmp_path / "tar", prefix)
        )
        for other in others:
            given = ("low",) if stage.task == "super-resolution" else ("intact", "missing")
            assert all(torch.equal(getattr(first, name), getattr(other, name)) for name in given)


def test_photos_scenes_and_films_are_told_apart(folder, tmp_path):
    run, (*_, holes, enlarging, _) = Run(lite(), folder, tmp_path, "CC0"), lite().stages
    assert [len(run.pictures(stage)) for stage in (holes, enlarging)] == [3, 2]
    assert len(run.pictures(holes).overlays) == 1


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(TrainingError, match=r"bad\.tar"):
        find(tmp_path)
    (tmp_path / "bad.tar").unlink()
    with pytest.raises(TrainingError, match="0 training pictures"):
        Pictures(find(tmp_path))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"bad\.png: cannot be decoded"):
        Pictures(find(tmp_path))[0]
    found = find(tmp_path)
    (tmp_path / "bad.png").unlink()
    with pytest.raises(TrainingError, match=r"bad\.png: 1 training picture is gone"):
        found[0].read()


def test_pictures_leave_when_there_is_no_room(folder):
    pictures = Pictures(find(folder)[1:], most_bytes=2 * SIDE_PX * SIDE_PX * 3)
    first = pictures[0]
    assert pictures[0] is first
    _ = pictures[1], pictures[0], pictures[2]
    assert pictures[0] is first
    assert len(pictures._decoded) == 2
    assert np.array_equal(pictures[1], cv2.imread(str(folder / "photos" / "b.jpg"))[..., ::-1])
