"""Which shards are finished: one small file per shard, written after the shard itself is safe on the disk."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.failpoints import hit
from engine.store import create_only, remove_durably, storage_errors
from engine.tiling.grid import ShardKey
from engine.tiling.seal import seal, unseal


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard: its place, and the digest and length in bytes of the object that holds it."""

    key: ShardKey
    sha256: str
    num_bytes: int


class Ledger:
    """The records of one plan in one folder, as ``<level>/<row>.<column>.json``. Another plan's records count as torn.

    A record is sealed, so a flipped bit in it is as good as no record.
    """

    def __init__(self, folder: Path, *, plan_id: str) -> None:
        self._folder = folder
        self._plan_id = plan_id

    def add(self, record: Record) -> bool:
        """Says durably that a shard is finished; False when it has a record already, which stays as it is."""
        data = {
            "key": record.key.name,
            "plan_id": self._plan_id,
            "sha256": record.sha256,
            "num_bytes": record.num_bytes,
        }
        path = self.path(record.key)
        with storage_errors(path):
            hit("record")
            created = create_only(path, seal(data))
            hit("record")
        return created

    def get(self, key: ShardKey) -> Record | None:
        """The record of a shard; one that cannot be understood is deleted and counts as none."""
        record = self.peek(key)
        if record is None:
            self.strike(key)
        return record

    def peek(self, key: ShardKey) -> Record | None:
        """As `get`, but nothing is deleted."""
        path = self.path(key)
        with storage_errors(path):
            hit("read")
            try:
                text = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                return None
        return self._parse(text, key)

    def strike(self, key: ShardKey) -> None:
        """Takes back that a shard is finished, so that the next run makes it again."""
        remove_durably(self.path(key))

    def records(self) -> Iterator[Record]:
        """All records that can be understood, by level, row and column."""
        for key in sorted(self.keys()):
            record = self.get(key)
            if record is not None:
                yield record

    def keys(self) -> Iterator[ShardKey]:
        """The shards that have a record of any kind, in no order."""
        return keys_in(self._folder)

    def path(self, key: ShardKey) -> Path:
        """The file of a shard's record, which need not exist."""
        return self._folder / f"{key.name}.json"

    def _parse(self, text: bytes, key: ShardKey) -> Record | None:
        data = unseal(text)
        if data is None or data.get("key") != key.name or data.get("plan_id") != self._plan_id:
            return None
        try:
            record = Record(key, data["sha256"], data["num_bytes"])
            return record if len(record.sha256) == 64 and record.num_bytes > 0 else None
        except (KeyError, TypeError):
            return None


def keys_in(folder: Path) -> Iterator[ShardKey]:
    """The shards that have a record of any kind in a ledger's folder."""
    for path in folder.glob("*/*.json"):
        with suppress(ValueError):  # a file that is no record of ours
            iy, ix = path.stem.split(".")
            yield ShardKey(int(path.parent.name), int(iy), int(ix))


def plan_id_recorded(folder: Path) -> str | None:
    """The plan whose shards a ledger's folder records, told by the first record that is intact; None without one."""
    for key in sorted(keys_in(folder)):
        with suppress(OSError):
            data = unseal((folder / f"{key.name}.json").read_bytes())
            if data is not None and data.get("key") == key.name:
                return data.get("plan_id")
    return None
