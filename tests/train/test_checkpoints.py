"""States of a run: there whole or not at all, and never mixed."""

import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch

from engine import failpoints
from engine.errors import OutputBusy, StorageFull, TrainingError
from engine.train.checkpoints import STOP, State, load_state, owned, save_state


def state(step: int) -> State:
    return State(step, 1, 2, 3.5, {"network.a": torch.full((3,), float(step)), "average.a": torch.arange(4)})


def test_the_newest_is_loaded_and_older_ones_are_removed(tmp_path):
    for step in (1, 5, 40):
        save_state(tmp_path, "joint", state(step), of="x")
    save_state(tmp_path, "coarse", state(7), of="x")
    found = load_state(tmp_path, "joint", of="x")
    assert found is not None
    assert (found.step, found.skipped, found.bad, found.seconds) == (40, 1, 2, 3.5)
    assert torch.equal(found.tensors["network.a"], torch.full((3,), 40.0))
    assert found.tensors["average.a"].dtype == torch.int64
    assert len(list(tmp_path.glob("joint-*.state"))) == 2
    assert load_state(tmp_path, "inpainting", of="x") is None


@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_state_is_never_chosen(tmp_path, harm):
    save_state(tmp_path, "joint", state(1), of="x")
    newest = save_state(tmp_path, "joint", state(2), of="x")
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[:-3], "changed": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[harm])
    found = load_state(tmp_path, "joint", of="x")
    assert found is not None
    assert found.step == 1


def test_damaged_states_drive_out_no_good_ones(tmp_path):
    save_state(tmp_path, "joint", state(10), of="x")
    damaged = save_state(tmp_path, "joint", state(20), of="x")
    damaged.write_bytes(b"cut off")
    for step in (15, 18):  # the run goes on from 10
        save_state(tmp_path, "joint", state(step), of="x")
        assert load_state(tmp_path, "joint", of="x").step == step  # type: ignore[union-attr]
    assert sorted(path.name.split("-")[1] for path in tmp_path.glob("*.state")) == ["00000015", "00000018"]


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, "joint", state(step), of="x").write_bytes(b"")
    with pytest.raises(TrainingError, match="0 of 2 states"):
        load_state(tmp_path, "joint", of="x")


def test_a_state_of_another_run_is_refused(tmp_path):
    save_state(tmp_path, "joint", state(1), of="x")
    with pytest.raises(TrainingError, match="of another recipe"):
        load_state(tmp_path, "joint", of="y")


FULL = 3


def save_in_child(folder: Path, failpoint: str) -> int:
    """How the child has ended: 0, FULL, or killed."""
    child = os.fork()
    if child == 0:
        os.environ["ENGINE_FAILPOINT"] = failpoint
        failpoints._counts.clear()
        try:
            save_state(folder, "joint", state(2), of="x")
        except StorageFull:
            os._exit(FULL)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("action", "end"), [("kill", -signal.SIGKILL), ("enospc", FULL)])
@pytest.mark.parametrize(
    ("name", "times"), [("open", 1), ("temp-write", 2), ("fsync", 1), ("rename", 2), ("fsync-folder", 1)]
)
def test_interrupted_anywhere_an_older_one_is_there(tmp_path, name, times, action, end):
    for occurrence in count(1):
        folder = tmp_path / str(occurrence)
        folder.mkdir()
        save_state(folder, "joint", state(1), of="x")
        ended = save_in_child(folder, f"{name}:{occurrence}:{action}")
        found = load_state(folder, "joint", of="x")
        assert found is not None
        if ended == 0:  # there are no more places
            assert found.step == 2
            break
        assert ended == end
        assert found.step in (1, 2)
    assert occurrence > times


def test_a_folder_is_for_one_run_at_a_time_and_loses_what_was_begun(tmp_path):
    (tmp_path / "joint.safetensors.1234.partial").write_bytes(b"half")
    (tmp_path / STOP).touch()
    with owned(tmp_path):
        assert not list(tmp_path.glob("*.partial"))
        assert not (tmp_path / STOP).exists()
        with pytest.raises(OutputBusy, match="1 run is at work"), owned(tmp_path):
            pass
    with owned(tmp_path):
        pass


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_FAILPOINT", "temp-write:1:enospc")
    failpoints._counts.clear()
    with pytest.raises(StorageFull):
        save_state(tmp_path, "joint", state(1), of="x")
    assert load_state(tmp_path, "joint", of="x") is None
