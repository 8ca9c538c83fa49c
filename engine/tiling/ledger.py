"""Which shards are finished: one small object per shard, created after the shard itself is safely stored."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import StorageError
from engine.failpoints import hit
from engine.objects import Place, objects_at
from engine.store import storage_errors
from engine.tiling.grid import ShardKey
from engine.tiling.seal import seal, unseal


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard: its place, and the digest and length in bytes of the object that holds it."""

    key: ShardKey
    sha256: str
    num_bytes: int


class Ledger:
    """The records of one plan in a folder or prefix, as ``<level>/<row>.<column>.json``. Another plan's are torn.

    A record is sealed, so a flipped bit in it is as good as no record.
    """

    def __init__(self, folder: Place, *, plan_id: str) -> None:
        self._folder = folder
        self._objects = objects_at(folder)
        self._plan_id = plan_id

    def add(self, record: Record) -> bool:
        """Says durably that a shard is finished; False when it has a record already, which stays as it is."""
        data = {
            "key": record.key.name,
            "plan_id": self._plan_id,
            "sha256": record.sha256,
            "num_bytes": record.num_bytes,
        }
        with storage_errors(Path(str(self.path(record.key)))):
            hit("record")
            created = self._objects.create(_name(record.key), seal(data))
            hit("record")
        return created

    def get(self, key: ShardKey) -> Record | None:
        """The record of a shard; one that cannot be understood is deleted and counts as none."""
        text = self._text(key)
        if text is None:  # and stays alone: another writer may be creating it now
            return None
        record = self._parse(text, key)
        if record is None:
            self.strike(key)
        return record

    def peek(self, key: ShardKey) -> Record | None:
        """As `get`, but nothing is deleted."""
        text = self._text(key)
        return None if text is None else self._parse(text, key)

    def strike(self, key: ShardKey) -> None:
        """Takes back that a shard is finished, so that the next run makes it again."""
        self._objects.delete(_name(key))

    def records(self) -> Iterator[Record]:
        """All records that can be understood, by level, row and column."""
        for key in sorted(self.keys()):
            record = self.get(key)
            if record is not None:
                yield record

    def keys(self) -> Iterator[ShardKey]:
        """The shards that have a record of any kind, in no order."""
        return keys_in(self._folder)

    def path(self, key: ShardKey) -> Place:
        """The place of a shard's record, which need not exist."""
        return self._folder / _name(key)

    def _text(self, key: ShardKey) -> bytes | None:
        with storage_errors(Path(str(self.path(key)))):
            hit("read")
        return self._objects.get(_name(key))

    def _parse(self, text: bytes, key: ShardKey) -> Record | None:
        data = unseal(text)
        if data is None or data.get("key") != key.name or data.get("plan_id") != self._plan_id:
            return None
        try:
            record = Record(key, data["sha256"], data["num_bytes"])
            return record if len(record.sha256) == 64 and record.num_bytes > 0 else None
        except (KeyError, TypeError):
            return None


def keys_in(folder: Place) -> Iterator[ShardKey]:
    """The shards that have a record of any kind in a ledger's folder."""
    for name in objects_at(folder).keys():  # noqa: SIM118  no mapping
        with suppress(ValueError):  # an object that is no record of ours
            level, place = name.split("/")
            iy, ix, suffix = place.split(".")
            if suffix == "json":
                yield ShardKey(int(level), int(iy), int(ix))


def plan_id_recorded(folder: Place) -> str | None:
    """The plan whose shards a ledger's folder records, told by the first record that is intact; None without one."""
    for key in sorted(keys_in(folder)):
        with suppress(StorageError):
            data = unseal(objects_at(folder).get(_name(key)) or b"")
            if data is not None and data.get("key") == key.name:
                return data.get("plan_id")
    return None


def _name(key: ShardKey) -> str:
    return f"{key.name}.json"
