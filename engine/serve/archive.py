"""What a service has accepted, on the disk: it survives the service.

    STORE/
      lock                  one service at a time
      incoming/<random>/    uploads on their way
      pictures/<picture>/   image, mask, picture.json, out/ (canvases, exports), overview.npy, end.json
      jobs/<id>.json        who asked for which picture, and when

Equal work of one key is one picture, whoever of its users asked for it; the digests of all that decides about its
pixels and its owner tell. One that is sent again after it was removed is another picture: nothing that was still under
way for the first can meet it. A job's record is stored last, so what has a job is there whole.
"""

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any, Self

from engine.errors import OutputBusy, StorageError
from engine.geometry import Size
from engine.serve.queue import LEAST_MEGAPIXELS, Failure, Whose
from engine.store import FileLock, fsync_folder, make_folders, storage_errors, write_atomic
from engine.tiling.seal import seal, unseal

ID_BYTES = 16
_END, _PICTURE = "end.json", "picture.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What a job asks for, as `engine.request.Request` has it."""

    scale: int = 1
    long_side_px: int | None = None
    page: int | None = None
    strip_metadata: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """One piece of work."""

    id: str
    """Random."""
    work: str
    """What `work_of` says."""
    owner: str
    image: str
    """The name of the file in the picture's folder; its suffix is that of the upload. None of a canvas alone: empty."""
    mask: str | None
    options: Options
    size: Size
    """Of the input."""
    output: Size
    projected_bytes: int
    """At most, with its outputs."""

    @property
    def megapixels(self) -> float:
        """Of the output, or of a larger input, and half a one at least, as the queue counts: beginning and finishing
        take as long as that."""
        return max(LEAST_MEGAPIXELS, self.output.num_pixels / 1e6, self.size.num_pixels / 1e6)


@dataclass(frozen=True, slots=True)
class Job:
    """One request for a picture."""

    id: str
    owner: str
    picture: str
    name: str
    """Of the uploaded file, for people."""
    created: float
    """Unix time."""
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """How a picture ended."""

    ended: float
    """Unix time."""
    failure: Failure | None = None
    stored_bytes: int = 0


def new_id() -> str:
    """Nobody guesses it."""
    return secrets.token_hex(ID_BYTES)


def work_of(owner: str, image_sha256: str, mask_sha256: str | None, options: Options, *, model_sha256: str) -> str:
    """The same for equal work of one owner by one model."""
    told = json.dumps([owner, image_sha256, mask_sha256, asdict(options), model_sha256])
    return hashlib.sha256(told.encode()).hexdigest()[: 2 * ID_BYTES]


@dataclass
class Archive:
    """The store of one service, which alone may write to it. All is known in memory, too.

    Threads may change it at the same time; who reads it takes a copy first, as `list(...)` does in one step.
    """

    root: Path
    lock: FileLock
    pictures: dict[str, Picture] = field(default_factory=dict[str, Picture])
    jobs: dict[str, Job] = field(default_factory=dict[str, Job])
    ends: dict[str, End] = field(default_factory=dict[str, End])
    _changing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, root: Path) -> Self:
        """Reads what is there, and removes what was cut short. Raises OutputBusy where another service runs on it."""
        with storage_errors(root):
            for name in ("incoming", "pictures", "jobs"):
                make_folders(root / name)
        lock = FileLock.try_take(root / "lock")
        if lock is None:
            raise OutputBusy(f"{root}: another service runs on this store; end it, or give another --store")
        archive = cls(root, lock)
        with storage_errors(root):
            shutil.rmtree(root / "incoming")
            make_folders(root / "incoming")
            for path in (root / "pictures").iterdir():
                archive._read_picture(path)
            for path in (root / "jobs").glob("*.json"):
                archive._read_job(path)
            used = {job.picture for job in archive.jobs.values()}
            for name in archive.pictures.keys() - used:
                shutil.rmtree(archive._set_aside(name), ignore_errors=True)
        return archive

    def close(self) -> None:
        self.lock.release()

    def incoming(self) -> Path:
        """A new folder for an upload."""
        folder = self.root / "incoming" / new_id()
        with storage_errors(folder):
            folder.mkdir()
        return folder

    def folder(self, picture: str) -> Path:
        return self.root / "pictures" / picture

    def accept(self, upload: Path, picture: Picture, job: Job) -> Job:
        """Makes an upload, a folder of `incoming`, a picture, and stores who asked for it: the job, as it is stored.

        Where equal work is there, the job is of that picture. One that had failed, and not for what it is, is to be
        done again.
        """
        with self._changing, storage_errors(self.root):
            known = self._equal(picture.work)
            is_new = known is None
            picture = known or picture
            folder, job = self.folder(picture.id), replace(job, picture=picture.id)
            if is_new:
                write_atomic(upload / _PICTURE, seal(asdict(picture)))
                fsync_folder(upload)
                upload.rename(folder)
                fsync_folder(folder.parent)
                self.pictures[picture.id] = picture
            else:
                shutil.rmtree(upload)
            try:
                write_atomic(self._job_path(job.id), seal(asdict(job)))
            except BaseException:
                if is_new:
                    shutil.rmtree(self._set_aside(picture.id), ignore_errors=True)
                raise
            self.jobs[job.id] = job
            if self._is_worth_trying_again(picture.id):
                (folder / _END).unlink(missing_ok=True)
                fsync_folder(folder)
                del self.ends[picture.id]
        return job

    def needs_work(self, work: str) -> bool:
        """Whether `accept` of it is to be followed by anything that is not under way."""
        known = self._equal(work)
        return known is None or self._is_worth_trying_again(known.id)

    def num_jobs(self, work: str) -> int:
        """Of equal work."""
        known = self._equal(work)
        return 0 if known is None else sum(job.picture == known.id for job in list(self.jobs.values()))

    def _equal(self, work: str) -> Picture | None:
        return next((one for one in list(self.pictures.values()) if one.work == work), None)

    def _is_worth_trying_again(self, picture: str) -> bool:
        end = self.ends.get(picture)
        return end is not None and end.failure is not None and end.failure.whose is not Whose.PICTURE

    def end(self, picture: str, end: End) -> None:
        """Stores how a picture ended."""
        with self._changing:
            if picture not in self.pictures:
                return
            write_atomic(self.folder(picture) / _END, seal(asdict(end)))
            self.ends[picture] = end

    def drop(self, job: str) -> tuple[str, Path] | None:
        """Removes a job, and its picture where no other job is of it: its name, and the folder to be removed."""
        with self._changing, storage_errors(self.root):
            found = self.jobs.pop(job, None)
            if found is None:  # by another request
                return None
            self._job_path(job).unlink(missing_ok=True)
            if any(other.picture == found.picture for other in list(self.jobs.values())):
                return None
            return found.picture, self._set_aside(found.picture)

    def tidy(self) -> None:
        """Removes what workers wrote for pictures that had been dropped."""
        for path in (self.root / "pictures").iterdir():
            with self._changing:
                if path.name in self.pictures:
                    continue
                aside = self._aside(path)
            shutil.rmtree(aside, ignore_errors=True)

    def unfinished(self) -> list[Picture]:
        """What a service that starts has to go on with, in the order in which it was accepted."""
        first: dict[str, float] = {}
        for job in list(self.jobs.values()):
            first[job.picture] = min(job.created, first.get(job.picture, job.created))
        left = [one for one in list(self.pictures.values()) if one.id in first and one.id not in self.ends]
        return sorted(left, key=lambda picture: first[picture.id])

    def measure(self, picture: str) -> None:
        """Counts what an ended picture takes anew: files were added."""
        end = self.ends.get(picture)
        if end is not None:
            self.end(picture, replace(end, stored_bytes=stored_bytes(self.folder(picture))))

    def bytes_of(self, owner: str) -> int:
        """What an owner's pictures take, or will take at most."""
        return sum(self._bytes(picture) for picture in list(self.pictures.values()) if picture.owner == owner)

    def expired(self, before: float) -> Sequence[Job]:
        """Jobs that were made, and whose pictures ended, before a moment (Unix time)."""
        old = [job for job in list(self.jobs.values()) if job.created < before]
        return [job for job in old if (end := self.ends.get(job.picture)) and end.ended < before]

    def find_job(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that this key of its client's choice was used for."""
        wanted = owner, idempotency_key
        return next((job for job in list(self.jobs.values()) if (job.owner, job.idempotency_key) == wanted), None)

    def _bytes(self, picture: Picture) -> int:
        end = self.ends.get(picture.id)
        return picture.projected_bytes if end is None else end.stored_bytes

    def _job_path(self, job: str) -> Path:
        return self.root / "jobs" / f"{job}.json"

    def _set_aside(self, picture: str) -> Path:
        del self.pictures[picture]
        self.ends.pop(picture, None)
        return self._aside(self.folder(picture))

    def _aside(self, folder: Path) -> Path:
        """Where a folder lies that is to be removed: at once, half a removal is none."""
        aside = self.root / "incoming" / new_id()
        folder.rename(aside)
        return aside

    def _read_picture(self, folder: Path) -> None:
        try:
            picture = read_picture(folder)
        except StorageError:
            shutil.rmtree(folder)
            return
        for cut_short in (*folder.glob("*.partial"), *folder.glob("out/*.partial")):
            cut_short.unlink()
        self.pictures[picture.id] = picture
        end = _read(folder / _END)
        if end is not None:
            failure = end.pop("failure")
            self.ends[picture.id] = End(failure=None if failure is None else Failure(**failure), **end)

    def _read_job(self, path: Path) -> None:
        found = _read(path)
        if found is None or found["picture"] not in self.pictures:
            path.unlink()
        else:
            self.jobs[found["id"]] = Job(**found)


def read_picture(folder: Path) -> Picture:
    """What is to be done with the files in a picture's folder. Raises StorageError where it is gone, or damaged."""
    found = _read(folder / _PICTURE)
    if found is None:
        raise StorageError(f"{folder}: 0 pictures are here; it was dropped, or its record is damaged")
    sizes = {name: Size(**found.pop(name)) for name in ("size", "output")}
    return Picture(options=Options(**found.pop("options")), **sizes, **found)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None


def stored_bytes(folder: Path) -> int:
    """Of all files below a folder, while others may come and go."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found += status.st_size if S_ISREG(status.st_mode) else 0
    return found
