"""A canvas on an object store, which knows no rename and no lock.

Every plan has a prefix of its own, so nothing has to get another name: readers find it by a pointer that is stored when
all is there (`engine.remote`). Several processes may write one canvas. They make the same bytes, and what is there and
recorded is never touched again; where bytes differ after all, the first record stays.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, ObjectStore

from engine.metadata import Metadata
from engine.objects import Prefix
from engine.tiling.canvas import PLAN_KEY, AnyCanvas, Pixels, damaged_metadata, sealed_plan, stored_plan, trusted_plan
from engine.tiling.grid import ShardKey
from engine.tiling.layout import described, object_key, open_arrays
from engine.tiling.ledger import Record
from engine.tiling.plan import Plan


class RemoteCanvas(AnyCanvas):
    """One output on an object store, open for writing (`open`) or only for reading (`load`)."""

    def __init__(self, plan: Plan, root: Prefix, *, workspace: "Workspace | None") -> None:
        super().__init__(plan, root, store=_Reader(root), lock=workspace)
        self.root = root
        self._workspace = workspace
        # Zarr encodes a shard into this memory: it never sees, and so never merges, what an earlier attempt stored.
        self._encoded = described(plan)
        self._encoders = open_arrays(MemoryStore(self._encoded), plan, root=root)

    @classmethod
    def open(
        cls,
        plan: Plan,
        out: Prefix,
        *,
        metadata: Metadata | None = None,
        kept: bool = True,
        scratch_in: Path | None = None,
    ) -> Self:
        """Starts the output of `plan` below `out`, or goes on with it, beside any others that do.

        kept: whether it is to be an output itself, and not only a step. One that is to be discarded lies elsewhere, or
        a writer that needs no canvas would delete that of another which does. scratch_in: a local folder for temporary
        files; the system's own where it is not given.
        """
        root = canvas_prefix(out, plan.name, plan.plan_id, kept=kept)
        if stored_plan(root) is None or damaged_metadata(root):
            objects = {key: value.to_bytes() for key, value in described(plan, metadata).items()}
            for key in sorted(objects):
                root.put(key, objects[key])
            root.put(
                PLAN_KEY, sealed_plan(plan, {key: hashlib.sha256(objects[key]).hexdigest() for key in sorted(objects)})
            )
        return cls(plan, root, workspace=Workspace(scratch_in))

    @classmethod
    def load(cls, root: Prefix) -> Self:
        """Opens an output for reading. StorageError as `trusted_plan`."""
        return cls(trusted_plan(root), root, workspace=None)

    @property
    def scratch(self) -> Path:
        if self._workspace is None:
            raise ValueError(f"{self.root}: is open for reading only")
        return self._workspace.folder

    def write(self, key: ShardKey, pixels: Pixels) -> None:
        self._check_owned()
        self._check_shard(key, pixels)
        ys, xs = self.grid.box(key).slices
        self._encoders[key.level][:, ys, xs] = pixels.transpose(2, 0, 1)
        name = object_key(key.level, key.iy, key.ix)
        data = memoryview(self._encoded.pop(name).as_buffer_like()).cast("B")
        if not self._objects.create(name, data):
            if self._is_intact(key):  # another writer was first, and its bytes are others
                return
            self._ledger.strike(key)
            self._objects.put(name, data)
        record = Record(key, hashlib.sha256(data).hexdigest(), len(data))
        if not self._ledger.add(record) and not self._is_intact(key):
            self._ledger.strike(key)
            self._ledger.add(record)

    def discard(self) -> None:
        self._check_owned()
        self.root.delete(PLAN_KEY)  # half a deletion is a lay-out to make again
        for name in list(self.root.keys()):
            self.root.delete(name)
        self.close()


class Workspace:
    """A local temporary folder, gone when it is released."""

    def __init__(self, parent: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="engine-", dir=parent))

    def release(self) -> None:
        """Deletes the folder; a second call does nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)


def plan_prefix(out: Prefix, name: str, plan_id: str) -> Prefix:
    """Where all that one plan of a picture stores is."""
    return out / name / plan_id


def canvas_prefix(out: Prefix, name: str, plan_id: str, *, kept: bool = True) -> Prefix:
    """Where the canvas of a plan is, finished or not."""
    return plan_prefix(out, name, plan_id) / (f"{name}.zarr" if kept else f"{name}.inprogress.zarr")


class _Reader(ObjectStore[Any]):
    """Zarr's view of a prefix, for reading, whose errors are typed."""

    def __init__(self, root: Prefix) -> None:
        super().__init__(root.client, read_only=True)
        self._root = root

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with self._root.typed_errors(key, "read"):
            return await super().get(f"{self._root.path}/{key}", prototype, byte_range)
