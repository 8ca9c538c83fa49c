"""Tables in files that are written once: Parquet, each known by a number and by the digest of its bytes.

    part-<number>.<generation>-<digest>.parquet      rows: what became of pictures
    review-<number>.<generation>-<digest>.parquet    what curators said of them

A file with a higher number holds what is newer; one of a later generation holds all that was in those before it. One
that was changed, cut off, or made by others is known by its name, before anything parses it. Texts are stored as UTF-8;
a byte that is none, as file names may hold, is stored as NUL and two hexadecimal digits.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from engine.errors import PlanError
from engine.store import fsync_folder, storage_errors, write_atomic

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as missing:
    raise PlanError("a catalog needs the package pyarrow; pip install 'cra-srgan-engine[cluster]'") from missing

# pyarrow ships no types.
_pa: Any = cast("Any", pyarrow)
_parquet: Any = cast("Any", pyarrow.parquet)

_DIGITS = 16
_NAME = re.compile(rf"(part|review)-(\d{{8,}})\.(\d+)-([0-9a-f]{{{_DIGITS}}})\.parquet")
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile("\0([89a-f][0-9a-f])")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_RETRIES = 100
_BATCH_ROWS = 4096  # decoded at a time

_text: Any = _pa.string()
_whole: Any = _pa.int64()
_real: Any = _pa.float64()


class Output(NamedTuple):
    """A file or folder beside the receipt of its picture."""

    format: str
    name: str
    sha256: str | None
    """None: `verify` found it damaged, and the next run makes it again."""
    num_bytes: int | None


@dataclass(frozen=True, slots=True)
class Kind:
    """What files of one prefix hold."""

    prefix: str
    schema: Any
    """pyarrow.Schema"""


ROWS = Kind(
    "part",
    _pa.schema(
        [
            ("name", _text),
            ("image", _text),
            ("image_bytes", _whole),
            ("image_mtime_ns", _whole),
            ("mask", _text),
            ("mask_bytes", _whole),
            ("mask_mtime_ns", _whole),
            ("request_id", _text),
            ("status", _text),
            ("reason", _text),
            ("message", _text),
            ("plan_id", _text),
            ("image_sha256", _text),
            (
                "outputs",
                _pa.list_(
                    _pa.field(
                        "element", _pa.struct(list(zip(Output._fields, (_text, _text, _text, _whole), strict=True)))
                    )
                ),
            ),
            ("megapixels", _real),
            ("generated_share", _real),
            ("seconds", _real),
            ("attempts", _whole),
            ("finished", _pa.timestamp("us", "UTC")),
            ("review", _text),
            ("note", _text),
        ],
        metadata={"schema": "cra-srgan-engine/catalog/1"},
    ),
)
"""The fields of `engine.batch.catalog.Row`, in their order."""
REVIEWED = Kind(
    "review",
    _pa.schema(
        [(name, _text) for name in ("name", "plan_id", "review", "note")],
        metadata={"schema": "cra-srgan-engine/review/1"},
    ),
)


class Part(NamedTuple):
    """One file; parts sort from the oldest to the newest."""

    number: int
    generation: int
    path: Path


@dataclass(frozen=True, slots=True)
class Parts:
    """What could be read, and what not."""

    files: dict[Part, bytes] = field(default_factory=dict[Part, bytes])
    """Their bytes, from the oldest to the newest."""
    damaged: tuple[Path, ...] = ()
    """Torn, changed, unreadable, or not ours."""


def list_parts(folder: Path, kind: Kind) -> list[Part]:
    """From the oldest to the newest; none where the folder is missing."""
    return sorted(_listed(folder, kind)[0])


def read_parts(folder: Path, kind: Kind) -> Parts:
    """Every part, while others may be replacing some of them: what is deleted meanwhile is found in its successor."""
    for _ in range(_MOST_RETRIES):
        before = _listed(folder, kind)[0]
        listed, foreign = _listed(folder, kind)
        if not before <= listed:
            continue  # what was deleted during a scan may have a successor that the scan has missed
        found = Parts()
        damaged = list(foreign)
        try:
            for part in sorted(listed):
                data = _read(part.path, kind)
                if data is None:
                    damaged.append(part.path)
                else:
                    found.files[part] = data
        except FileNotFoundError:
            continue
        return Parts(found.files, tuple(sorted(damaged)))
    raise AssertionError(f"{folder}: its parts were replaced {_MOST_RETRIES} times while they were read")


def write_part(folder: Path, kind: Kind, table: Any, *, number: int, generation: int = 0) -> Part:  # noqa: ANN401
    """Stores a table durably, or raises StorageError."""
    stream = _pa.BufferOutputStream()
    _parquet.write_table(table, stream, compression="zstd", row_group_size=_BATCH_ROWS)
    data = memoryview(stream.getvalue())
    name = f"{kind.prefix}-{number:08d}.{generation}-{_digest(data)}.parquet"
    write_atomic(folder / name, data)
    return Part(number, generation, folder / name)


def remove_parts(parts: Iterable[Part]) -> None:
    """Deletes what another part supersedes; one that is gone already is no error."""
    for part in parts:
        with storage_errors(part.path):
            part.path.unlink(missing_ok=True)
            fsync_folder(part.path.parent)


def to_table(records: Sequence[Any], kind: Kind) -> Any:  # noqa: ANN401
    """Records with the fields of the schema, as a pyarrow.Table."""
    columns = ([_plain(getattr(record, name)) for record in records] for name in kind.schema.names)
    return _pa.table(list(columns), schema=kind.schema)


def table_of(data: bytes) -> Any:  # noqa: ANN401
    """A part as a pyarrow.Table."""
    return _parquet.read_table(_pa.BufferReader(data))


def records(data: bytes) -> Iterator[tuple[Any, ...]]:
    """The rows of a part, fields in their order, a few thousand at a time."""
    for batch in _parquet.ParquetFile(_pa.BufferReader(data)).iter_batches(_BATCH_ROWS, use_threads=False):
        yield from zip(*map(values, batch.columns), strict=True)


def values(column: Any) -> list[Any]:  # noqa: ANN401
    """A pyarrow.Array in Python; of equal texts there is one object."""
    if column.type == _text:
        coded = column.dictionary_encode()
        words = [None if word is None else _original(word) for word in coded.dictionary.to_pylist()]
        return [None if index is None else words[index] for index in coded.indices.to_pylist()]
    if _pa.types.is_timestamp(column.type):
        return [_EPOCH + timedelta(microseconds=moment) for moment in column.cast(_whole).to_pylist()]
    if _pa.types.is_list(column.type):
        flat = list(map(Output, *(values(child) for child in column.flatten().flatten())))
        ends = column.offsets.to_pylist()
        first = ends[0]
        return [tuple(flat[start - first : end - first]) for start, end in pairwise(ends)]
    return column.to_pylist()


def _listed(folder: Path, kind: Kind) -> tuple[set[Part], list[Path]]:
    """The parts of a kind, and the files that are of no kind."""
    with storage_errors(folder):
        try:
            paths = list(folder.iterdir())
        except FileNotFoundError:
            return set(), []
    parts: set[Part] = set()
    foreign: list[Path] = []
    for path in paths:
        named = _NAME.fullmatch(path.name)
        if named is None and path.suffix != ".partial":
            foreign.append(path)
        elif named is not None and named[1] == kind.prefix:
            parts.add(Part(int(named[2]), int(named[3]), path))
    return parts, foreign


def _read(path: Path, kind: Kind) -> bytes | None:
    """The bytes of a part, None where they are not as they were written. Raises FileNotFoundError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError:
        return None
    if not path.stem.endswith(f"-{_digest(data)}"):
        return None
    schema = _parquet.read_schema(_pa.BufferReader(data))
    return data if schema.equals(kind.schema, check_metadata=True) else None


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A value of a record as pyarrow takes it."""
    if isinstance(value, str):
        return value if value.isascii() else _NO_UTF8.sub(lambda found: f"\0{ord(found[0]) - 0xDC00:02x}", value)
    if isinstance(value, tuple):
        outputs = cast("tuple[Output, ...]", value)
        return [{name: _plain(part) for name, part in output._asdict().items()} for output in outputs]
    return value


def _original(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)), text) if "\0" in text else text
