"""A batch from its pictures to its catalog: what is finished is looked up, the rest restored, here or on a cluster."""

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from engine.batch.attempts import Attempts
from engine.batch.inputs import Item
from engine.batch.work import DONE, Drawn, Order, Outcome, Workers, restore_item, stored_receipt
from engine.errors import InputError, OutputBusy, PlanError, ProcessDied, codes
from engine.outputs import BATCH, batch_lock
from engine.restoration import Progress, Restorer
from engine.store import FileLock, make_folders, storage_errors, write_atomic

if TYPE_CHECKING:
    from engine.batch.catalog import Row

RAY_ABOVE = 64
"""Pictures; for fewer, starting Ray costs more than it gains."""
_OF_THE_PICTURE = codes(InputError) | {ProcessDied.code}
"""Reasons that stay while a picture does. All others lay around it then: a full disk, a file in its place."""


def restore_all(
    items: Sequence[Item],
    order: Order,
    restorer: Restorer,
    *,
    workers: Workers | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
    drawn: Drawn | None = None,
) -> Iterator[Outcome]:
    """Restores every item and yields how it ended, in no order; what has ended before is looked up and yielded too.

    Without workers it restores here with `restorer`, one after another, and tells `progress` of each shard; workers
    tell `drawn`. One picture without workers leaves no catalog, and neither do outputs on an object store, where each
    picture's pointer says what is finished.
    Raises OutputBusy while another batch is at work on the same output, PlanError for workers with such outputs.
    """
    if workers is not None and order.remote is not None:
        raise PlanError(
            f"{order.remote}: {workers.count} workers share 1 folder of outputs, and this is an object store; leave "
            "out --workers and --address, or give a folder"
        )
    if order.remote is not None or (len(items) == 1 and workers is None):
        for item in items:
            yield restore_item(restorer, item, order, progress)
        return
    from engine.batch.catalog import CatalogWriter, read_catalog  # pyarrow is slow to load

    request_id = order.request_id(restorer.checkpoint.card.sha256)
    folder = order.out / BATCH
    with ExitStack() as stack:
        with storage_errors(folder):
            make_folders(folder)
        lock = FileLock.try_take(batch_lock(order.out))
        if lock is None:
            raise OutputBusy(f"{order.out}: another batch is at work on it; wait for it, or end it")
        stack.callback(lock.release)
        cluster = stack.enter_context(ExitStack())  # ends when the catalog is complete
        Attempts(order.out).forget()
        write_atomic(folder / "job.json", json.dumps({"total": len(items), "request_id": request_id}).encode())
        known = read_catalog(order.out)
        looked_up: deque[Outcome] = deque()
        facts: dict[str, _Facts] = {}

        def pending() -> Iterator[Item]:
            for item in items:
                fact = _Facts.of(item)
                row = known.get(item.name)
                if row is not None and _holds(row, fact, request_id, order, item, retry_failed=retry_failed):
                    looked_up.append(_outcome(row, item, order.out))
                else:
                    facts[item.name] = fact
                    yield item

        catalog = stack.enter_context(CatalogWriter(order.out))
        for outcome in _restored(cluster, pending(), order, restorer, workers, progress, drawn):
            catalog.add(_row(outcome, facts.pop(outcome.item.name), request_id, order, known.get(outcome.item.name)))
            yield from _drained(looked_up)
            yield outcome
        yield from _drained(looked_up)


def _restored(
    cluster: ExitStack,
    items: Iterator[Item],
    order: Order,
    restorer: Restorer,
    workers: Workers | None,
    progress: Progress | None,
    drawn: Drawn | None,
) -> Iterator[Outcome]:
    if workers is None:
        for item in items:
            yield restore_item(restorer, item, order, progress)
        return
    first = next(items, None)
    if first is None:  # all is done: no cluster is started
        return
    from engine.batch.cluster import connected
    from engine.batch.pipeline import Pipeline, booked_bytes

    cluster.enter_context(redirect_stdout(sys.stderr))  # Ray tells of lost processes and nodes, on either
    cluster.enter_context(connected(workers, booked_bytes=booked_bytes(workers)))
    yield from Pipeline(order, workers, drawn).run(chain([first], items))


def _drained(outcomes: deque[Outcome]) -> Iterator[Outcome]:
    while outcomes:
        yield outcomes.popleft()


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """By what a picture and its mask are known again without reading them."""

    image_bytes: int
    image_mtime_ns: int
    mask_bytes: int
    mask_mtime_ns: int

    @classmethod
    def of(cls, item: Item) -> "_Facts":
        return cls(*_stat(item.image), *_stat(item.mask))


def _stat(path: str | None) -> tuple[int, int]:
    if path is None:
        return 0, 0
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _holds(row: "Row", facts: _Facts, request_id: str, order: Order, item: Item, *, retry_failed: bool) -> bool:
    """Whether what became of a picture still stands: nothing has changed, and its outputs are there and not struck."""
    if item.is_remote:  # its facts are not known without reading it
        return False
    told = _Facts(row.image_bytes, row.image_mtime_ns, row.mask_bytes, row.mask_mtime_ns)
    if told != facts or row.request_id != request_id:
        return False
    if row.status == DONE:
        receipt = stored_receipt(order, item)
        if receipt is None or receipt["plan_id"] != row.plan_id:
            return False
        folder = (order.out / row.name).parent
        return all(made["sha256"] and (folder / made["name"]).exists() for made in receipt["outputs"].values())
    return not retry_failed and row.reason in _OF_THE_PICTURE


def _row(outcome: Outcome, facts: _Facts, request_id: str, order: Order, before: "Row | None") -> "Row":
    from engine.batch.catalog import Row
    from engine.batch.rebuild import outputs_of

    receipt = stored_receipt(order, outcome.item) if outcome.status == DONE else None
    h, w = (0, 0) if receipt is None else receipt["plan"]["size_px"]
    return Row(
        name=outcome.item.name,
        image=outcome.item.image,
        image_bytes=facts.image_bytes,
        image_mtime_ns=facts.image_mtime_ns,
        mask=outcome.item.mask,
        mask_bytes=facts.mask_bytes,
        mask_mtime_ns=facts.mask_mtime_ns,
        request_id=request_id,
        status=outcome.status,
        reason=outcome.reason,
        message=outcome.message,
        plan_id=outcome.plan_id,
        image_sha256=None if receipt is None else receipt["input"]["sha256"],
        outputs=() if receipt is None else outputs_of(receipt),
        megapixels=h * w / 1e6,
        generated_share=0.0 if receipt is None else receipt["generated"]["share"],
        seconds=outcome.seconds,
        attempts=outcome.attempts,
        finished=datetime.now(UTC),
        review="pending" if before is None or before.plan_id != outcome.plan_id else before.review,
    )


def _outcome(row: "Row", item: Item, out: Path) -> Outcome:
    """What the catalog tells of a picture that has ended before."""
    folder = (out / row.name).parent
    return Outcome(
        item,
        row.status,
        row.reason,
        row.message,
        row.plan_id,
        seconds=0.0,
        attempts=row.attempts,
        outputs=tuple(str(folder / output.name) for output in row.outputs),
        looked_up=True,
    )
