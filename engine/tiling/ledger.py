"""Which shards are finished: one small file per shard, written after the shard itself is safe on the disk."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.failpoints import hit
from engine.store import create_only, remove_durably, storage_errors
from engine.tiling.grid import ShardKey


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard: its place, and the digest and length in bytes of the object that holds it."""

    key: ShardKey
    sha256: str
    num_bytes: int


class Ledger:
    """The records in one folder, as ``<level>/<row>.<column>.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, record: Record) -> bool:
        """Says durably that a shard is finished; False when it has a record already, which stays as it is."""
        data = {"key": record.key.name, "sha256": record.sha256, "num_bytes": record.num_bytes}
        path = self._path(record.key)
        with storage_errors(path):
            hit("record")
            created = create_only(path, json.dumps(data).encode())
            hit("record")
        return created

    def get(self, key: ShardKey) -> Record | None:
        """The record of a shard; one that cannot be understood is deleted and counts as none."""
        try:
            text = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        record = _parse(text, key)
        if record is None:
            self.strike(key)
        return record

    def strike(self, key: ShardKey) -> None:
        """Takes back that a shard is finished, so that the next run makes it again."""
        remove_durably(self._path(key))

    def records(self) -> Iterator[Record]:
        """All records, by level, row and column."""
        for key in sorted(self._keys()):
            record = self.get(key)
            if record is not None:
                yield record

    def _keys(self) -> Iterator[ShardKey]:
        for path in self._folder.glob("*/*.json"):
            with suppress(ValueError):  # a file that is no record of ours
                iy, ix = path.stem.split(".")
                yield ShardKey(int(path.parent.name), int(iy), int(ix))

    def _path(self, key: ShardKey) -> Path:
        return self._folder / f"{key.name}.json"


def _parse(text: bytes, key: ShardKey) -> Record | None:
    try:
        data = json.loads(text)
        record = Record(key, data["sha256"], data["num_bytes"])
        well_formed = data["key"] == key.name and len(record.sha256) == 64 and record.num_bytes > 0
    except (ValueError, KeyError, TypeError):
        return None
    return record if well_formed else None
