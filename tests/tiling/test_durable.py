"""The Zarr store that writes whole objects."""

import asyncio
import hashlib

import pytest
from zarr.core.buffer import default_buffer_prototype

from engine.tiling import durable
from engine.tiling.durable import DurableStore


def test_zarr_store_writes_whole_objects_and_remembers_digests(tmp_path, monkeypatch):
    written = []
    real = durable.write_atomic
    monkeypatch.setattr(durable, "write_atomic", lambda path, data: (written.append(path), real(path, data)))
    zarr_store = DurableStore(tmp_path / "store")
    value = default_buffer_prototype().buffer.from_bytes(b"bytes of a shard")
    asyncio.run(zarr_store.set("0/c/0/0/0", value))
    path = tmp_path / "store" / "0" / "c" / "0" / "0" / "0"
    assert written == [path]
    digest = zarr_store.take_digest("0/c/0/0/0")
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest.num_bytes == path.stat().st_size
    with pytest.raises(KeyError):
        zarr_store.take_digest("0/c/0/0/0")


def test_read_only_store_refuses(tmp_path):
    (tmp_path / "store").mkdir()
    zarr_store = DurableStore(tmp_path / "store", read_only=True)
    value = default_buffer_prototype().buffer.from_bytes(b"bytes")
    with pytest.raises(ValueError, match="read-only"):
        asyncio.run(zarr_store.set("key", value))
    assert list((tmp_path / "store").iterdir()) == []
