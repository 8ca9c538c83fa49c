"""The output of one picture: a pyramid of Zarr arrays in which each shard is written once, whole, and recorded.

See DESIGN.md in this folder for why. Deliberately absent: writing part of a shard, and reading one that is not there
(Zarr would answer with black).
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias, TypeVar, cast
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store

from engine.errors import EngineError, OutputBusy, OutputExists, StorageError
from engine.failpoints import hit
from engine.geometry import Box
from engine.metadata import Metadata
from engine.objects import Place, Prefix, objects_at
from engine.store import (
    Digest,
    FileLock,
    digest_of,
    fsync_folder,
    make_folders,
    refuse_existing,
    remove_durably,
    remove_partials,
    remove_replaced,
    storage_error,
    storage_errors,
    write_atomic,
)
from engine.tiling.durable import DurableStore
from engine.tiling.grid import Grid, ShardKey
from engine.tiling.layout import PlaneArray, lay_out, object_key, open_arrays
from engine.tiling.ledger import Ledger, Record
from engine.tiling.plan import Plan
from engine.tiling.seal import seal, unseal

Pixels: TypeAlias = NDArray[np.uint8 | np.uint16]
"""(h, w, c), the full range of the type."""

PLAN_KEY = "_engine/plan.json"

P = TypeVar("P", Path, Prefix, Place)

_MOST_NAMED = 5  # shards that an error message lists


class Right(Protocol):
    """To write to a canvas, until it is given back."""

    def release(self) -> None:
        """Gives it back; a second call does nothing."""
        ...


class AnyCanvas(ABC):
    """What is common to outputs in a folder and on an object store: their shards and the records of these."""

    def __init__(self, plan: Plan, root: Place, *, store: Store, lock: Right | None) -> None:
        self.plan = plan
        self._root = root
        self._objects = objects_at(root)
        self._lock = lock
        with storage_errors(Path(str(root))):
            self._arrays = open_arrays(store, plan, root=root)
        self._ledger = Ledger(ledger_folder(root), plan_id=plan.plan_id)

    @property
    def grid(self) -> Grid:
        return self.plan.grid

    @property
    @abstractmethod
    def scratch(self) -> Path:
        """A local folder for what is needed only until the output is published."""

    @abstractmethod
    def write(self, key: ShardKey, pixels: Pixels) -> None:
        """Stores a whole shard, (h, w, c) of exactly its clipped box, then its record. Other shards may be read."""

    @abstractmethod
    def discard(self) -> None:
        """Deletes the output in progress and closes it."""

    def array(self, level: int) -> PlaneArray:
        """The Zarr array (c, y, x) of a level, for readers that check with `is_done` and `damage_named`."""
        return self._arrays[level]

    def is_done(self, key: ShardKey) -> bool:
        """Whether the shard has a record and its object has the recorded length."""
        record = self._ledger.get(key)
        return record is not None and self._objects.size(_object_of(key)) == record.num_bytes

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """The pixels (h, w, c) of a box inside a level; StorageError where a shard of it is missing or damaged.

        One shard is decoded at a time, so the memory needed is the box and one shard.
        """
        if not Box.of(self.grid.level_size(level)).contains(box):
            raise ValueError(f"{box} is not inside level {level} of {self.grid.level_size(level)}")
        pixels = np.empty((box.size.h, box.size.w, self.plan.channels), self.plan.dtype)
        for key in self.grid.keys_in(box, level=level):
            part = self.grid.box(key).intersection(box)
            ys, xs = part.slices
            with self.damage_named([key]):
                planes = cast("Pixels", self._arrays[level][:, ys, xs])
            stored = np.stack(list(planes), axis=-1)
            if part == box:
                return stored
            pixels[part.shifted(-box.y0, -box.x0).slices] = stored
        return pixels

    @contextmanager
    def damage_named(self, keys: Iterable[ShardKey]) -> Generator[None]:
        """Around reading shards: refuses missing ones, and turns a decoder's complaint into the name of the bad one.

        One that has gone meanwhile, with the folder that another process gave its final name, is missing: it was read
        as zeros.
        """
        keys = list(keys)
        self._refuse_missing(keys)
        try:
            yield
        except EngineError:
            raise
        except OSError as error:
            self.verify(keys)  # names the one that cannot be read
            raise storage_error(error, Path(str(self._root / _object_of(keys[0])))) from error
        except (RuntimeError, ValueError):
            self.verify(keys)
            raise
        self._refuse_missing(keys)

    def _refuse_missing(self, keys: list[ShardKey]) -> None:
        missing = [key for key in keys if not self.is_done(key)]
        if missing:
            raise self._bad(missing)

    def verify(self, keys: Iterable[ShardKey]) -> None:
        """Reads the objects of the shards again; strikes the record of each that is not as recorded, and raises."""
        bad = [key for key in keys if not self._is_intact(key)]
        for key in bad:
            self._ledger.strike(key)
        if bad:
            raise self._bad(bad)

    def close(self) -> None:
        """Lets another process go on with this output; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def is_owned(self) -> bool:
        """Whether this process alone may write, publish and discard the output."""
        return False

    def _check_owned(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self._root}: is closed, or published and so read-only")

    def _check_shard(self, key: ShardKey, pixels: Pixels) -> None:
        box = self.grid.box(key)
        expected = (box.size.h, box.size.w, self.plan.channels)
        if pixels.shape != expected or pixels.dtype != self.plan.dtype:
            raise ValueError(f"shard {key.name} is {expected} {self.plan.dtype}, not {pixels.shape} {pixels.dtype}")

    def _is_intact(self, key: ShardKey) -> bool:
        record = self._ledger.get(key)
        if record is None or self._objects.size(_object_of(key)) != record.num_bytes:
            return False
        return self._objects.digest(_object_of(key)) == Digest(record.sha256, record.num_bytes)

    def _bad(self, keys: list[ShardKey]) -> StorageError:
        names = ", ".join(key.name for key in keys[:_MOST_NAMED])
        more = ", …" if len(keys) > _MOST_NAMED else ""
        return StorageError(
            f"{self._root}: {len(keys)} of {self.grid.num_shards} shards are missing or damaged ({names}{more}); "
            "run the same command again: it makes just these again"
        )


class Canvas(AnyCanvas):
    """One output in a folder, in progress (`open`) or published (`load`).

    One process writes it; `close` lets another one do so.
    """

    def __init__(
        self, plan: Plan, root: Path, *, store: DurableStore, lock: FileLock | None, joined: bool = False
    ) -> None:
        super().__init__(plan, root, store=store, lock=lock)
        self.root = root
        self._store = store
        self._joined = joined

    @classmethod
    def open(cls, plan: Plan, out: Path, *, metadata: Metadata | None = None) -> Self:
        """Starts the output of `plan` in the folder `out`, or goes on with it; OutputBusy while another process does.

        The lay-out is complete once its plan is stored, which is done last: a start that was cut short is made again,
        and so is one whose files are not as the plan's file recorded them.
        """
        root = plan.working_folder(out)
        lock = FileLock.try_take(root / "_engine" / "lock")
        if lock is None:
            raise OutputBusy(f"{root}: another process is writing this plan; wait for it, or end it")
        try:
            with storage_errors(root):
                remove_partials(root)
                store = DurableStore(root)
                found = stored_plan(root)
                if found is not None and found.plan_id != plan.plan_id:
                    raise OutputExists(f"{root}: holds another plan's work; delete the folder")
                if found is None or damaged_metadata(root):
                    lay_out(store, plan, metadata=metadata)
                    write_atomic(root / PLAN_KEY, sealed_plan(plan, _laid_out(root)))
                make_folders(root / "_engine" / "scratch")
            return cls(plan, root, store=store, lock=lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def join(cls, plan: Plan, out: Path) -> Self:
        """Opens an output in progress that `open` has laid out, to add shards to it beside other processes.

        There is no lock: of several writers of one shard the first record counts, and all write the same bytes. Raises
        StorageError where the output is not in progress (any more).
        """
        root = plan.working_folder(out)
        found = stored_plan(root)
        if found is None or found.plan_id != plan.plan_id:
            raise StorageError(f"{root}: is not in progress; run the same command again")
        return cls(plan, root, store=DurableStore(root), lock=None, joined=True)

    @classmethod
    def load(cls, final: Path) -> Self:
        """Opens a published output for reading. StorageError as `trusted_plan`."""
        return cls(trusted_plan(final), final, store=DurableStore(final, read_only=True), lock=None)

    @property
    def scratch(self) -> Path:
        return scratch_of(self.root)

    @property
    def is_owned(self) -> bool:
        return self._lock is not None

    def object_path(self, key: ShardKey) -> Path:
        """The file that holds a shard."""
        return self.root / _object_of(key)

    def write(self, key: ShardKey, pixels: Pixels) -> None:
        if self._joined:
            if self.is_done(key):  # another process was faster
                return
            if not (self.root / PLAN_KEY).exists():  # published while it slept: nothing is left
                raise StorageError(f"{self.root}: is not in progress any more; run the same command again")
        else:
            self._check_owned()
        self._check_shard(key, pixels)
        # Nothing of an earlier attempt may stay: neither its record, nor bytes that Zarr would read and merge.
        self._ledger.strike(key)
        remove_durably(self.object_path(key))
        ys, xs = self.grid.box(key).slices
        with storage_errors(self.object_path(key)):
            self._arrays[key.level][:, ys, xs] = pixels.transpose(2, 0, 1)
        digest = self._store.take_digest(_object_of(key))
        self._ledger.add(Record(key, digest.sha256, digest.num_bytes))

    def publish(self, final: Path, *, replace: bool) -> None:
        """Checks every shard against its record, then gives the output its name in one step; this canvas is closed.

        Raises OutputExists when `final` is taken and is not to be replaced; StorageError names missing or bad shards,
        which the next run makes again.
        """
        self._check_owned()
        refuse_existing(final, replace=replace)
        taken = os.path.lexists(final)
        self.verify(self.grid.all_keys())
        with storage_errors(final):
            shutil.rmtree(self.scratch, ignore_errors=False)
            remove_partials(self.root)
            fsync_folder(self.root / "_engine")
            if taken:
                os.rename(final, final.with_name(f"{final.name}.{uuid4().hex}.replaced"))
            hit("publish")
            os.rename(self.root, final)
            fsync_folder(self.root.parent)
            fsync_folder(final.parent)
            hit("publish")
            # Only now: an opener that found no lock before the rename would think the folder its own.
            (final / "_engine" / "lock").unlink()
            remove_replaced(final)
        self.close()

    def discard(self) -> None:
        self._check_owned()
        with storage_errors(self.root):
            (self.root / "_engine" / "plan.json").unlink(missing_ok=True)  # half a deletion is a lay-out to make again
            shutil.rmtree(self.root)
        self.close()


@contextmanager
def adding_to(final: Path) -> Generator[Canvas]:
    """A published output to which exports are added: opened as by `load`, but by one process at a time, with scratch.

    Raises OutputBusy while another process does. The scratch folder stays only where this is cut short.
    """
    canvas = Canvas.load(final)
    lock_path = final / "_engine" / "lock"
    lock = FileLock.try_take(lock_path)
    if lock is None:
        raise OutputBusy(f"{final}: another process is adding to this output; wait for it, or end it")
    try:
        with storage_errors(canvas.scratch):
            remove_partials(final / "_engine")
            make_folders(canvas.scratch)
        yield canvas
        shutil.rmtree(canvas.scratch, ignore_errors=True)
    finally:
        with suppress(OSError):  # what is in it tells the next run what this one has begun
            canvas.scratch.rmdir()
        lock_path.unlink(missing_ok=True)
        lock.release()


def trusted_plan(root: Place) -> Plan:
    """The plan of a published output. StorageError where what its Zarr metadata say is not to be believed."""
    plan = stored_plan(root)
    if plan is None:
        raise StorageError(f"{root}: is not an output of this program; give a folder that `restore` has published")
    if damaged := damaged_metadata(root):
        raise StorageError(
            f"{damaged[0]}: it and {len(damaged) - 1} more of the metadata files are not as they were stored; "
            "run `engine verify`, then the command that made the picture"
        )
    return plan


def stored_plan(root: Place) -> Plan | None:
    """The plan of the output at a place, published or in progress; None where there is none that is intact."""
    found = _stored(root)
    return None if found is None else found[0]


def damaged_metadata(root: P) -> list[P]:
    """The Zarr metadata of an output with an intact plan that are not as they were laid out, or are gone."""
    found = _stored(root)
    if found is None:
        raise ValueError(f"{root}: has no plan to tell its metadata by")
    return [root / name for name, sha256 in found[1].items() if _sha256(root, name) != sha256]


def scratch_of(root: Path) -> Path:
    """Where the output in a folder has what is needed only while it, or an export, is made."""
    return root / "_engine" / "scratch"


def ledger_folder(root: P) -> P:
    """Where the records of the output at a place are."""
    return root / "_engine" / "ledger"


def sealed_plan(plan: Plan, metadata: Mapping[str, str]) -> bytes:
    """What `plan.json` holds: the plan, and the sha256 of each metadata object that was just laid out, by its key."""
    return seal({"plan": plan.to_json(), "metadata": metadata})


def _stored(root: Place) -> tuple[Plan, dict[str, str]] | None:
    try:
        data = unseal(objects_at(root).get(PLAN_KEY) or b"")
        if data is None:
            return None
        plan, metadata = Plan.from_json(data["plan"]), data["metadata"]
        groups = (".", "_engine", *(str(level) for level in range(len(plan.grid.level_sizes))))
        # One from elsewhere may not lead out of its folder.
        return (plan, metadata) if metadata.keys() <= {str(Path(group, "zarr.json")) for group in groups} else None
    except StorageError:
        if isinstance(root, Path):
            return None
        raise  # a store that cannot be reached tells nothing
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(root: Place, key: str) -> str | None:
    try:
        return objects_at(root).digest(key).sha256
    except StorageError:
        return None  # gone, or no longer readable


def _laid_out(root: Path) -> dict[str, str]:
    """The sha256 of each metadata file of an output, by its key."""
    paths = sorted([root / "zarr.json", *root.glob("*/zarr.json")])
    return {str(path.relative_to(root)): digest_of(path).sha256 for path in paths}


def _object_of(key: ShardKey) -> str:
    return object_key(key.level, key.iy, key.ix)
