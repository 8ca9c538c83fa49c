"""What became of every picture of a batch: a row each, in the Parquet parts of `OUT/_batch/catalog/`.

Of one name the row in the newest part counts. A part is deleted only when another one holds all of it, so a kill at any
step leaves rows twice at worst. One process, the driver, adds rows; others may add reviews and merge at any time.
"""

import gc
import logging
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import starmap
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import pyarrow

from engine.batch.parts import (
    REVIEWED,
    ROWS,
    Kind,
    Output,
    Part,
    Parts,
    list_parts,
    read_parts,
    records,
    remove_parts,
    table_of,
    to_table,
    values,
    write_part,
)
from engine.errors import StorageError
from engine.outputs import BATCH

STATUSES = ("done", "refused", "failed")
REVIEWS = ("pending", "accepted", "rejected")
EVERY_ROWS = 1000
"""Rows of a full part."""
EVERY_S = 10.0
"""A row is on the disk at the latest after this time."""

# pyarrow ships no types.
_pa: Any = cast("Any", pyarrow)
_MOST_NAMED = 5  # files that a warning lists
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """How one picture ended, and what it was made from."""

    name: str
    """Outputs are `OUT/<name>.<suffix>`."""
    image: str
    image_bytes: int
    image_mtime_ns: int
    """With `image_bytes`, by what an unchanged input is known again; 0: not known."""
    mask: str | None
    mask_bytes: int
    mask_mtime_ns: int
    request_id: str
    """A hash of everything asked for, formats included; empty: not known."""
    status: str
    """done | refused (the picture) | failed (the machine, or it ended its process)"""
    reason: str | None
    """`code` of the error."""
    message: str | None
    plan_id: str | None
    image_sha256: str | None
    outputs: tuple[Output, ...]
    megapixels: float
    """Of the output."""
    generated_share: float
    """Of the input's pixels that were missing, in [0, 1]."""
    seconds: float
    attempts: int
    finished: datetime
    """UTC, microseconds."""
    review: str = "pending"
    """pending | accepted | rejected"""
    note: str | None = None
    """What the curator wrote."""


class Review(NamedTuple):
    """What a curator said of the output that `plan_id` made."""

    name: str
    plan_id: str | None
    review: str
    note: str | None


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that could be read."""

    rows: dict[str, Row]
    damaged: tuple[Path, ...]
    """Files among the parts that are torn, changed, unreadable or not ours."""


class CatalogWriter:
    """Collects rows, and stores them by itself: every 1,000 rows, 10 s after the last part, and at the end.

    A part of fewer rows is superseded by the next one, so there are few. What goes wrong on the way is raised by the
    next `add`, or at the end; the rows stay, and the next part holds them.
    """

    def __init__(self, out: Path, *, every_rows: int = EVERY_ROWS, every_s: float = EVERY_S) -> None:
        self._folder = catalog_folder(out)
        self._every_rows, self._every_s = every_rows, every_s
        self._number = _last_number(self._folder, ROWS)
        self._rows: list[Row] = []
        self._stored = 0
        """How many of the rows are in `_part`."""
        self._part: Part | None = None
        self._error: StorageError | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._store_in_time, name="catalog", daemon=True)

    def add(self, row: Row) -> None:
        """Raises StorageError where rows could not be stored."""
        with self._lock:
            self._rows.append(row)
            error, self._error = self._error, None
            if error is not None:
                raise error
            if len(self._rows) >= self._every_rows:
                self._store()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._store()

    def _store_in_time(self) -> None:
        while not self._ended.wait(self._every_s):
            with self._lock:
                try:
                    self._store()
                except StorageError as error:
                    self._error = error

    def _store(self) -> None:
        if self._stored == len(self._rows):
            return
        part = write_part(self._folder, ROWS, to_table(self._rows, ROWS), number=self._number + 1)
        superseded = [] if self._part is None else [self._part]
        self._part, self._number, self._stored = part, part.number, len(self._rows)
        if self._stored >= self._every_rows:
            self._rows, self._stored, self._part = [], 0, None
        remove_parts(superseded)


def catalog_folder(out: Path) -> Path:
    """Where the parts are."""
    return out / BATCH / "catalog"


def read_catalog(out: Path) -> dict[str, Row]:
    """The newest row of each name. Damaged and foreign parts are named in the log; `rebuild` makes up for them."""
    found = load_catalog(out)
    if found.damaged:
        names = ", ".join(path.name for path in found.damaged[:_MOST_NAMED])
        more = f" and {len(found.damaged) - _MOST_NAMED} more" if len(found.damaged) > _MOST_NAMED else ""
        _log.warning("%s: damaged or no parts of a catalog, and not read: %s%s", catalog_folder(out), names, more)
    return found.rows


def load_catalog(out: Path) -> Catalog:
    """As `read_catalog`, with the damaged parts. Raises StorageError where the folder cannot be read."""
    folder = catalog_folder(out)
    parts, reviews = read_parts(folder, ROWS), read_parts(folder, REVIEWED)
    rows: dict[str, Row] = {}
    with _no_collections():
        for data in parts.files.values():
            rows |= {row.name: row for row in starmap(Row, records(data))}
    for (name, plan_id), (review, note) in _reviews(reviews).items():
        row = rows.get(name)
        if row is not None and row.plan_id == plan_id:
            rows[name] = replace(row, review=review, note=note)
    return Catalog(rows, tuple(sorted({*parts.damaged, *reviews.damaged})))


def merge(out: Path) -> Path:
    """One part in place of all that can be read, with the reviews in their rows; gives its path.

    Safe at any time, killed at any step, and beside a running writer, whose next part stays the newer one.
    """
    folder = catalog_folder(out)
    parts = read_parts(folder, ROWS)
    table = _pa.concat_tables([ROWS.schema.empty_table(), *map(table_of, parts.files.values())])
    newest = {name: index for index, name in enumerate(table["name"].to_pylist())}
    table = table.take(_pa.array(sorted(newest.values()), _pa.int64()))
    table = _reviewed(table, _reviews(read_parts(folder, REVIEWED)))
    last = max(parts.files, default=None)
    if last is not None and len(parts.files) == 1 and table.equals(table_of(parts.files[last])):
        return last.path
    number, generation = (0, 0) if last is None else (last.number, last.generation)
    merged = write_part(folder, ROWS, table, number=number, generation=generation + 1)
    remove_parts(parts.files)
    return merged.path


def add_reviews(out: Path, reviews: Mapping[str, tuple[str, str | None]]) -> None:
    """Stores what curators said of pictures in the catalog: name → pending, accepted or rejected, and a note.

    It holds for the output that there is now: made anew by another plan, a picture is pending again.
    """
    rows, folder = load_catalog(out).rows, catalog_folder(out)
    said = [Review(name, rows[name].plan_id, review, note) for name, (review, note) in reviews.items()]
    write_part(folder, REVIEWED, to_table(said, REVIEWED), number=_last_number(folder, REVIEWED) + 1)


@contextmanager
def _no_collections() -> Generator[None]:
    """For making many objects that stay: looking for garbage among them took a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _last_number(folder: Path, kind: Kind) -> int:
    return max((part.number for part in list_parts(folder, kind)), default=0)


def _reviews(parts: Parts) -> dict[tuple[str, str | None], tuple[str, str | None]]:
    """Name and plan → the newest review and note."""
    said = (Review(*values) for data in parts.files.values() for values in records(data))
    return {(review.name, review.plan_id): (review.review, review.note) for review in said}


def _reviewed(table: Any, reviews: Mapping[tuple[str, str | None], tuple[str, str | None]]) -> Any:  # noqa: ANN401
    """The rows with what was said of them."""
    if not reviews:
        return table
    names, plans, review, note = (values(table[name].combine_chunks()) for name in Review._fields)
    for index, key in enumerate(zip(names, plans, strict=True)):
        if key in reviews:
            review[index], note[index] = reviews[key]
    for name, column in (("review", review), ("note", note)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), _pa.array(column, _pa.string()))
    return table
