"""Residual aggregation out of core equals the same sum in memory, whatever its working set."""

import errno
import os

import numpy as np
import pytest
import torch

import engine.guide
import engine.residual
from engine.errors import StorageFull
from engine.geometry import Box
from engine.guide import Guide, make_guide, reflect, sample
from engine.image import ArrayPicture
from engine.mask import array_mask
from engine.models.cra_srgan.attention import CELL_PX
from engine.models.cra_srgan.handover import aggregate as aggregate_in_memory
from engine.models.cra_srgan.handover import detail_gain
from engine.models.runner import TorchRunner
from engine.residual import aggregate, detail_bytes
from tests.networks import TINY, random_model

SIZES = [(96, 96), (101, 67), (40, 130)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> TorchRunner:
    return TorchRunner(random_model(tmp_path_factory.mktemp("model"), TINY), precision="fp32", threads=1)


@pytest.fixture(autouse=True)
def _small_guide(monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 24)


def damaged(h: int, w: int) -> tuple[ArrayPicture, np.ndarray]:
    rng = np.random.default_rng(h * w)
    missing = np.zeros((h, w), bool)
    missing[h // 4 : h // 2, w // 3 : w // 2] = True
    missing[h - 5 :, w - 9 :] = True
    missing |= rng.random((h, w)) < 0.001
    return ArrayPicture(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)), missing


def guide_of(source: ArrayPicture, missing: np.ndarray, runner: TorchRunner) -> Guide:
    guide = make_guide(source, array_mask(missing), runner)
    assert guide is not None
    return guide


def dense(source: ArrayPicture, missing: np.ndarray, guide: Guide) -> np.ndarray:
    """(h, w, 3) by the function that training uses, on the whole picture mirrored up to whole cells."""
    cell, size = CELL_PX * guide.factor, source.size
    h, w = guide.cells.h * cell, guide.cells.w * cell
    ys, xs = reflect(0, h, size.h), reflect(0, w, size.w)
    pixels = source.pixels[np.ix_(ys, xs)].astype(np.float32) / 255
    residual = (pixels - sample(guide.known_mean, guide.factor, ys, xs)) * ~missing[np.ix_(ys, xs)][..., None]
    tensor = torch.from_numpy(residual).permute(2, 0, 1)[None]
    gathered = aggregate_in_memory(tensor, [guide.rows], guide.factor)[0].permute(1, 2, 0).numpy()
    return detail_gain(guide.factor) * gathered[: size.h, : size.w]


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_out_of_core_equals_in_memory(h, w, runner, tmp_path):
    source, missing = damaged(h, w)
    guide = guide_of(source, missing, runner)
    assert guide.factor > 1
    wanted = dense(source, missing, guide)
    assert np.abs(wanted).max() > 0.05
    detail = aggregate(source, array_mask(missing), guide, tmp_path)
    assert np.abs(detail.read(Box.of(source.size)) - wanted).max() < 2e-3  # kept in float16


@pytest.mark.parametrize("working_set", [1, 40_000, 1 << 30])
def test_the_working_set_changes_no_byte(working_set, runner, tmp_path, monkeypatch):
    source, missing = damaged(210, 140)
    guide = guide_of(source, missing, runner)
    assert CELL_PX * guide.factor > 8  # or there would be one block whatever the working set
    usual = aggregate(source, array_mask(missing), guide, tmp_path).path.read_bytes()
    monkeypatch.setattr(engine.residual, "WORKING_SET_BYTES", working_set)
    assert aggregate(source, array_mask(missing), guide, tmp_path).path.read_bytes() == usual


def test_parts_are_cut_from_the_whole(runner, tmp_path):
    source, missing = damaged(101, 67)
    detail = aggregate(source, array_mask(missing), guide_of(source, missing, runner), tmp_path)
    whole = detail.read(Box.of(source.size))
    for box in (Box(0, 0, 1, 1), Box(20, 13, 61, 47), Box(95, 50, 101, 67), Box(31, 23, 32, 24)):
        assert np.array_equal(detail.read(box), whole[box.slices])


def test_cells_without_damage_get_nothing(runner, tmp_path):
    source, missing = damaged(96, 96)
    guide = guide_of(source, missing, runner)
    detail = aggregate(source, array_mask(missing), guide, tmp_path)
    cell = CELL_PX * guide.factor
    rows = (missing.reshape(96 // cell, cell, 96 // cell, cell).any((1, 3))).repeat(cell, 0).repeat(cell, 1)
    assert rows.any()
    assert not rows.all()
    assert not detail.read(Box.of(source.size))[~rows].any()
    assert detail.path.stat().st_size == detail_bytes(detail.num_cells, guide.factor)


def test_a_guide_of_the_pictures_own_size_leaves_no_residual(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.guide, "GUIDE_PX", 512)
    source, missing = damaged(96, 96)
    detail = aggregate(source, array_mask(missing), guide_of(source, missing, runner), tmp_path)
    assert not detail.read(Box.of(source.size)).any()
    assert not detail.path.exists()


def test_what_lies_under_the_mask_is_never_borrowed(runner, tmp_path):
    source, missing = damaged(101, 67)
    other = source.pixels.copy()
    other[missing] = 255 - other[missing]
    found = [
        aggregate(picture, array_mask(missing), guide_of(picture, missing, runner), tmp_path).path.read_bytes()
        for picture in (source, ArrayPicture(other))
    ]
    assert found[0] == found[1]


def test_a_full_disk_is_an_error_and_not_a_fault(runner, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    source, missing = damaged(101, 67)
    guide = guide_of(source, missing, runner)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageFull):
        aggregate(source, array_mask(missing), guide, tmp_path)
