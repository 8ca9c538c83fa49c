"""A Zarr store whose objects are written as `engine.store` writes them: completely and durably, or not at all."""

import asyncio
import hashlib
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from engine.failpoints import hit
from engine.store import Digest, write_atomic


class DurableStore(LocalStore):
    """A Zarr store on a file system in which every object is written by `write_atomic`.

    It remembers the digest of what it stored last under each key, so that the bytes need not be read again.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._digests: dict[str, Digest] = {}

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """A stored object or a part of it; None where there is none.

        Read in the event loop: what is read is a chunk or an index, and a way through other threads takes longer.
        """
        hit("read")
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Stores one whole object under `key`."""
        if not self._is_open:
            await self._open()
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, for callers without an event loop."""
        self._check_writable()
        data = memoryview(value.as_buffer_like()).cast("B")
        write_atomic(self.root / key, data)
        self._digests[key] = Digest(hashlib.sha256(data).hexdigest(), len(data))

    def take_digest(self, key: str) -> Digest:
        """The digest of the object stored last under `key`, once; KeyError when this store has not stored one."""
        return self._digests.pop(key)
