"""How far a batch is: counts, rate, time left, failures; what `engine status` shows."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any, cast

from engine.batch.catalog import REVIEWS, STATUSES, Catalog, Row, load_catalog
from engine.errors import UnreadableInput, printable
from engine.outputs import BATCH, batch_lock
from engine.store import is_locked

RATE_OVER = timedelta(minutes=5)
"""The rate is that of so much time before now, or before the last picture of a batch that has ended."""
MOST_SPANS = 60
"""Of the series of throughput."""

_MOST_NAMED = 10  # failures in the text
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Span:
    """What was finished in a stretch of time."""

    begin: datetime
    seconds: int
    done: int
    not_done: int


@dataclass(frozen=True, slots=True)
class Status:
    """A batch at one moment. Pictures that an earlier run finished are in the counts, not in the rate."""

    at: datetime
    running: bool
    """Whether a driver holds the lock of the batch."""
    total: int | None
    """Pictures asked for; None where that is not known."""
    counts: dict[str, int]
    """done, refused, failed"""
    reasons: dict[str, int]
    """Code of the error → pictures, the most frequent first."""
    reviews: dict[str, int]
    """Of pictures that are done: pending, accepted, rejected."""
    megapixels: float
    """Of all outputs."""
    rate: float
    """Pictures finished a second, whatever became of them."""
    megapixel_rate: float
    """Megapixels of output a second."""
    left_s: float | None
    """Seconds until all are finished at this rate; None where nobody can tell."""
    failures: tuple[Row, ...]
    """The newest first."""
    series: tuple[Span, ...]
    """Throughput from the first to the last picture, without gaps."""
    damaged: tuple[Path, ...]
    """Parts of the catalog that could not be read."""

    @property
    def finished(self) -> int:
        """Pictures that are done, refused or failed."""
        return sum(self.counts.values())


def status(out: Path, total: int | None = None) -> Status:
    """What the catalog of the batch in the folder `out` says. Raises UnreadableInput where there is no batch.

    total: pictures asked for; by default what the driver has noted.
    """
    return summarize(out, load_catalog(out), total=total)


def summarize(out: Path, found: Catalog, *, total: int | None = None, now: datetime | None = None) -> Status:
    """As `status`, of a catalog that was read before."""
    if not (out / BATCH).is_dir():
        raise UnreadableInput(f"{out}: holds no batch; give the --out of one, or --rebuild for a lost catalog")
    rows, job = found.rows.values(), _read_job(out)
    now, running = now or datetime.now(UTC), is_locked(batch_lock(out))
    total = job.total if total is None else total
    newest = sorted((row for row in rows if row.status != "done"), key=lambda row: row.finished, reverse=True)
    reviews = Counter(row.review for row in rows if row.status == "done")
    last = max((row.finished for row in rows), default=now)
    rate, megapixel_rate = _rates(rows, now if running else last, job.started)
    finished = sum(job.request_id in (None, row.request_id) for row in rows)
    left_s = max(0, total - finished) / rate if running and rate > 0 and total is not None else None
    return Status(
        at=now,
        running=running,
        total=total,
        counts={name: 0 for name in STATUSES} | Counter(row.status for row in rows),
        reasons=dict(Counter(row.reason or "unknown" for row in newest).most_common()),
        reviews={name: reviews[name] for name in REVIEWS},
        megapixels=sum(row.megapixels for row in rows if row.status == "done"),
        rate=rate,
        megapixel_rate=megapixel_rate,
        left_s=left_s,
        failures=tuple(newest),
        series=_series(rows),
        damaged=found.damaged,
    )


def to_json(found: Status) -> dict[str, object]:
    """Plain values for `json.dumps`; of the failures what a program needs to act on them."""
    return {
        "running": found.running,
        "total": found.total,
        "counts": found.counts,
        "reasons": found.reasons,
        "reviews": found.reviews,
        "megapixels": round(found.megapixels, 3),
        "pictures_per_s": round(found.rate, 4),
        "megapixels_per_s": round(found.megapixel_rate, 4),
        "left_s": None if found.left_s is None else round(found.left_s, 1),
        "failures": [
            {"name": row.name, "image": row.image, "status": row.status, "reason": row.reason, "message": row.message}
            for row in found.failures
        ],
        "damaged_parts": [str(path) for path in found.damaged],
    }


def to_text(found: Status) -> str:
    """A few lines for a terminal; what names hold beside letters is shown escaped."""
    of = "" if found.total is None else f" of {found.total:,}"
    left = "" if found.left_s is None else f", {duration(found.left_s)} left"
    lines = [
        f"{'running' if found.running else 'not running'}: {found.finished:,}{of} pictures finished, "
        f"{found.rate:.2f} pictures/s, {found.megapixel_rate:.1f} megapixels/s{left}"
    ]
    reviews = ", ".join(f"{count:,} {name}" for name, count in found.reviews.items() if count)
    notes = {"done": f"{found.megapixels:,.1f} megapixels" + (f"; reviews: {reviews}" if reviews else "")}
    lines += [f"  {name:8} {count:>9,}  {notes.get(name, '')}".rstrip() for name, count in found.counts.items()]
    lines += [f"    {reason:22} {count:>7,}" for reason, count in found.reasons.items()]
    if found.failures:
        lines.append(f"newest of {len(found.failures):,} pictures that were not restored:")
    for row in found.failures[:_MOST_NAMED]:
        lines.append(printable(f"  {row.name}: {row.status}, {row.reason}: {row.message}"))
    if found.damaged:
        names = ", ".join(printable(path.name) for path in found.damaged)
        lines.append(f"damaged parts of the catalog, not read: {names}; --rebuild makes up for them")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `4 d 6 h`."""
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds / 86400
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if days < 2 else f"{hours // 24} d {hours % 24} h"


@dataclass(frozen=True, slots=True)
class _Job:
    """What the driver notes when it starts."""

    total: int | None = None
    request_id: str | None = None
    started: datetime | None = None


def _read_job(out: Path) -> _Job:
    path = out / BATCH / "job.json"
    try:
        noted = cast("dict[str, Any]", json.loads(path.read_bytes()))
        return _Job(int(noted["total"]), str(noted["request_id"]), datetime.fromtimestamp(path.stat().st_mtime, UTC))
    except (OSError, ValueError, TypeError, KeyError):
        return _Job()


def _rates(rows: Iterable[Row], end: datetime, started: datetime | None) -> tuple[float, float]:
    """Pictures, and megapixels of output, a second, in the last minutes before `end`."""
    begin = end - RATE_OVER
    if started is not None and started < end:
        begin = max(begin, started)
    recent = [row for row in rows if begin <= row.finished <= end]
    if started is None and recent:
        begin = min(row.finished for row in recent)
    seconds = max(1.0, (end - begin).total_seconds())
    return len(recent) / seconds, sum(row.megapixels for row in recent) / seconds


def _series(rows: Iterable[Row]) -> tuple[Span, ...]:
    moments = [(row.finished.timestamp(), row.status == "done") for row in rows]
    if not moments:
        return ()
    first, last = min(moments)[0], max(moments)[0]
    most = max(10, min(MOST_SPANS, len(moments) // 5))  # few pictures tell little of a short time
    seconds = next((step for step in _STEPS_S if (last // step) - (first // step) < most), None)
    if seconds is None:  # months
        seconds = 86400 * ceil((last - first) / 86400 / (most - 1))
    counts = Counter((int(moment // seconds), done) for moment, done in moments)
    numbers = range(int(first // seconds), int(last // seconds) + 1)
    return tuple(
        Span(datetime.fromtimestamp(number * seconds, UTC), seconds, counts[number, True], counts[number, False])
        for number in numbers
    )
