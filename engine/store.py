"""Whole objects on a file system: each one is there completely and durably, or not at all.

An object is written to ``<name>.<random>.partial`` beside its place, flushed to the disk, moved into place in one step,
and the folder's entry is flushed too, so that neither a killed process nor a power cut leaves half an object under its
real name. There is no way to change part of an object, on purpose.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self
from uuid import uuid4

from engine.errors import OutputExists, StorageError, StorageFull, StorageReadOnly
from engine.failpoints import hit

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class Digest:
    """What was stored: sha256 in lower-case hexadecimal, and the length in bytes."""

    sha256: str
    num_bytes: int


def storage_error(error: OSError, path: Path, *, needed_bytes: int | None = None) -> StorageError:
    """The typed error for what the operating system said about `path` (`needed_bytes` to be written, where known)."""
    if error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in path.parts)
        most = [os.pathconf(nearest_folder(path), name) for name in ("PC_NAME_MAX", "PC_PATH_MAX")]
        return StorageError(
            f"{path}: a name of {longest} bytes in a path of {len(os.fsencode(path))}, this disk takes {most[0]} and "
            f"{most[1]}; choose a shorter one"
        )
    if error.errno in _FULL:
        wanted = "more" if needed_bytes is None else f"{needed_bytes:,} bytes"
        return StorageFull(
            f"{path}: no space left: {wanted} needed, {free_bytes(path):,} bytes free; "
            "free some space or choose another output folder, then run the same command again: finished parts are kept"
        )
    if error.errno in _READ_ONLY:
        return StorageReadOnly(
            f"{path}: cannot be written ({error.strerror}); choose an output folder that this user may write to"
        )
    return StorageError(f"{path}: {error.strerror or error}; check the disk, then run the same command again")


@contextmanager
def storage_errors(path: Path, *, needed_bytes: int | None = None) -> Generator[None]:
    """Turns every OSError of its block into the typed error about `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, needed_bytes=needed_bytes) from error


def nearest_folder(path: Path) -> Path:
    """`path`, or the closest of its parents that exists."""
    path = path.absolute()
    # os.path.exists also answers where this user may not even look
    return next((folder for folder in (path, *path.parents) if os.path.exists(folder)), Path("/"))


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system which holds, or would hold, `path`."""
    return shutil.disk_usage(nearest_folder(path)).free


def refuse_existing(path: Path, *, replace: bool) -> None:
    """Raises OutputExists for an output that is there, and is not to be replaced."""
    if not replace and os.path.lexists(path):
        raise OutputExists(f"{path}: exists already; choose another --out, or give --replace")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Stores `data` under `path`, replacing what was there; when it returns, the object survives a power cut."""
    with storage_errors(path, needed_bytes=len(data)), _temporary(path, data) as temporary:
        hit("rename")
        os.replace(temporary, path)
        hit("rename")
        fsync_folder(path.parent)


def create_only(path: Path, data: bytes | memoryview) -> bool:
    """As `write_atomic`, but an object that is already there stays: then False."""
    with storage_errors(path, needed_bytes=len(data)), _temporary(path, data) as temporary:
        hit("link")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        hit("link")
        temporary.unlink()
        fsync_folder(path.parent)
        return True


@contextmanager
def _temporary(path: Path, data: bytes | memoryview) -> Generator[Path]:
    """A durable file beside `path` that holds `data`; gone at the end, unless it was moved."""
    make_folders(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        hit("open")
        with temporary.open("xb") as stream:
            hit("temp-write")
            stream.write(data)
            stream.flush()
            hit("temp-write")
            hit("fsync")
            os.fsync(stream.fileno())
        yield temporary
    finally:
        with suppress(OSError):  # the first error is the one worth telling
            temporary.unlink(missing_ok=True)


def make_folders(folder: Path) -> None:
    """Creates `folder` and its parents durably: each new one is flushed into the folder that holds it."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    hit("mkdir")
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(folder)) from None
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Flushes the entries of a folder: a rename or an unlink in it survives a power cut."""
    hit("fsync-folder")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a few network file systems have nothing to flush here, and say so
            raise
    finally:
        os.close(descriptor)


def remove_durably(path: Path) -> None:
    """Deletes one file, if it is there."""
    with storage_errors(path):
        if path.exists():
            path.unlink(missing_ok=True)
            fsync_folder(path.parent)


def remove_partials(root: Path) -> int:
    """Deletes the temporary files that killed writers left below `root`; how many they were."""
    leftovers = [path for path in root.rglob("*.partial") if path.is_file()]
    for path in leftovers:
        with storage_errors(path):
            path.unlink(missing_ok=True)
    return len(leftovers)


def remove_replaced(final: Path) -> None:
    """Deletes what was renamed aside (``<name>.<random>.replaced``) for `final`, now or by a run that was killed."""
    ours = re.compile(re.escape(final.name) + r"\.[0-9a-f]{32}\.replaced")
    for old in final.parent.glob("*.replaced"):
        if ours.fullmatch(old.name):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()


def open_regular(path: Path) -> BufferedReader:
    """Opens a plain file to read. Raises OSError for all else: a folder, a device, a pipe, which is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return open(descriptor, "rb")


def digest_of(path: Path) -> Digest:
    """Reads a stored object again, in pieces, and tells its digest. Raises StorageError, also for what is no file."""
    with storage_errors(path):
        hit("read")
        with open_regular(path) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            return Digest(sha256, stream.tell())


class FileLock:
    """Exclusive right over a folder: an advisory lock on one file in it, which ends with the process that holds it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def try_take(cls, path: Path) -> Self | None:
        """The lock on `path` (created where missing, with its folders), or None while another holds it."""
        with storage_errors(path):
            while True:
                make_folders(path.parent)
                descriptor = _open_lock(path)
                if descriptor is None:
                    continue
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return None
                if _is_still(path, descriptor):
                    return cls(descriptor)
                os.close(descriptor)  # the last holder moved or deleted the folder between our open and our lock

    def release(self) -> None:
        """Gives the right back; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on `path`. Nothing is written, and no file there is no lock."""
    with storage_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def _open_lock(path: Path) -> int | None:
    hit("open")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None  # the folder was renamed away since it was made: make it again


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
