"""Whole objects: complete or absent, whatever fails on the way."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from engine import failpoints, store
from engine.errors import StorageError, StorageFull, StorageReadOnly
from engine.store import (
    FileLock,
    create_only,
    digest_of,
    is_locked,
    remove_partials,
    remove_replaced,
    storage_error,
    write_atomic,
)


@pytest.fixture
def failpoint(monkeypatch):
    """Sets a failpoint for the rest of the test, counting from now."""

    def arm(wanted: str) -> None:
        failpoints._counts.clear()
        monkeypatch.setenv("ENGINE_FAILPOINT", wanted)

    return arm


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own at `folder`; skips the test where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_write_replaces_the_whole_object(tmp_path):
    path = tmp_path / "new" / "deep" / "object"
    write_atomic(path, b"a long first version")
    write_atomic(path, memoryview(b"short"))
    assert path.read_bytes() == b"short"
    assert files(tmp_path) == ["new/deep/object"]


def test_create_only_keeps_what_is_there(tmp_path):
    assert create_only(tmp_path / "record", b"first")
    assert not create_only(tmp_path / "record", b"second")
    assert (tmp_path / "record").read_bytes() == b"first"
    assert files(tmp_path) == ["record"]


def test_file_and_folders_are_flushed(tmp_path, monkeypatch):
    """Neither the bytes, nor the name, nor a new folder's own name may be only in the cache."""
    flushed, moved = [], []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), len(moved)))
        real_fsync(descriptor)

    def replace(source, target):
        moved.append((str(source), str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "new" / "object", b"bytes")
    [(source, _)] = moved
    assert (str(tmp_path), 0) in flushed  # holds the name "new"
    assert (source, 0) in flushed  # the bytes, before the move
    assert (str(tmp_path / "new"), 1) in flushed  # the name, after it


@pytest.mark.parametrize("write", [write_atomic, create_only])
@pytest.mark.parametrize("place", ["open:1", "temp-write:1", "temp-write:2", "fsync:1"])
@pytest.mark.parametrize(("action", "kind"), [("enospc", StorageFull), ("eio", StorageError)])
def test_failed_write_leaves_nothing(tmp_path, failpoint, write, place, action, kind):
    failpoint(f"{place}:{action}")
    with pytest.raises(kind) as caught:
        write(tmp_path / "object", b"bytes")
    assert type(caught.value) is kind
    assert files(tmp_path) == []
    write(tmp_path / "object", b"bytes")  # the failpoint acts once
    assert (tmp_path / "object").read_bytes() == b"bytes"


@pytest.mark.parametrize(("write", "place"), [(write_atomic, "rename:1"), (create_only, "link:1")])
def test_failed_move_leaves_nothing(tmp_path, failpoint, write, place):
    failpoint(f"{place}:eio")
    with pytest.raises(StorageError, match="object"):
        write(tmp_path / "object", b"bytes")
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named_by_the_object(tmp_path, failpoint):
    failpoint("mkdir:2:enospc")
    with pytest.raises(StorageFull, match="new/deep/object"):
        write_atomic(tmp_path / "new" / "deep" / "object", b"bytes")
    assert files(tmp_path) == []


def test_asking_for_a_lock_changes_nothing(tmp_path):
    assert not is_locked(tmp_path / "folder" / "lock")
    assert not (tmp_path / "folder").exists()
    lock = FileLock.try_take(tmp_path / "folder" / "lock")
    assert lock is not None
    assert is_locked(tmp_path / "folder" / "lock")
    lock.release()
    assert not is_locked(tmp_path / "folder" / "lock")


def test_failed_overwrite_keeps_the_old_object(tmp_path, failpoint):
    write_atomic(tmp_path / "object", b"old")
    failpoint("fsync:1:enospc")
    with pytest.raises(StorageFull):
        write_atomic(tmp_path / "object", b"new")
    assert (tmp_path / "object").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageReadOnly),
        (errno.EACCES, StorageReadOnly),
        (errno.EPERM, StorageReadOnly),
        (errno.EIO, StorageError),
        (errno.EMFILE, StorageError),
    ],
)
def test_each_cause_has_its_error(tmp_path, number, kind):
    error = storage_error(OSError(number, os.strerror(number)), tmp_path / "object")
    assert type(error) is kind
    assert str(tmp_path / "object") in str(error)


def test_full_disk_tells_both_numbers(tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as folder:
        write_atomic(folder / "first", b"x" * 100_000)
        with pytest.raises(StorageFull, match=r"1,000,000 bytes needed, \d[\d,]* bytes free"):
            write_atomic(folder / "second", b"x" * 1_000_000)
        assert files(folder) == ["first"]


def test_read_only_file_system(tmp_path):
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro", "tmpfs") as folder, pytest.raises(StorageReadOnly):
        write_atomic(folder / "object", b"bytes")


def test_below_a_regular_file_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageReadOnly, match="file"):
        write_atomic(tmp_path / "file" / "object", b"bytes")


def test_partials_are_removed_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a" / "object", b"bytes")
    (tmp_path / "a" / "object.0123.partial").write_bytes(b"half")
    (tmp_path / "other.0123.partial").write_bytes(b"half")
    assert remove_partials(tmp_path) == 2
    assert files(tmp_path) == ["a/object"]


def test_what_was_renamed_aside_is_removed_and_nothing_that_is_merely_called_alike(tmp_path):
    final = tmp_path / "scan.zarr"
    ours = [tmp_path / f"scan.zarr.{uuid4().hex}.replaced" for _ in range(2)]
    theirs = [tmp_path / f"scan.zarr.{word}.replaced" for word in ("mine", "0123", f"old.{uuid4().hex}")]
    theirs += [tmp_path / f"scan-zarr.{uuid4().hex}.replaced"]
    for folder in (ours[0], theirs[0]):
        folder.mkdir()
        (folder / "object").touch()
    for file in (ours[1], *theirs[1:]):
        file.touch()
    remove_replaced(final)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (theirs[0] / "object").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_a_plain_file_has_a_digest(put, tmp_path):
    path = tmp_path / "object"
    put(path)
    with pytest.raises(StorageError, match=r"object: it is no plain file"):
        digest_of(path)


def test_lock_is_exclusive_until_released(tmp_path):
    first = FileLock.try_take(tmp_path / "folder" / "lock")
    assert first is not None
    assert FileLock.try_take(tmp_path / "folder" / "lock") is None
    first.release()
    first.release()
    second = FileLock.try_take(tmp_path / "folder" / "lock")
    assert second is not None
    second.release()


def test_lock_on_a_folder_that_was_moved_away_is_not_taken(tmp_path, monkeypatch):
    """The holder publishes (moves the folder) between another's open of the lock file and its flock."""
    path = tmp_path / "folder" / "lock"
    real_open, opened = store._open_lock, []

    def open_then_move(lock_path):
        descriptor = real_open(lock_path)
        if not opened:
            path.parent.rename(tmp_path / "published")
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(store, "_open_lock", open_then_move)
    lock = FileLock.try_take(path)
    assert lock is not None
    assert len(opened) == 2
    assert path.exists()
    lock.release()


def test_storage_imports_are_light():
    heavy = "[name for name in ('torch', 'ray', 'pandas', 'cv2') if name in sys.modules]"
    code = f"import sys, engine.store, engine.tiling.pyramid, engine.tiling.execute; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_whole_objects_need_no_array_library():
    code = "import sys, engine.store; print([name for name in ('zarr', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
