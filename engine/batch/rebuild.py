"""A catalog that was lost, made again from the receipts."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.batch.catalog import CatalogWriter, Row, load_catalog
from engine.batch.parts import Output
from engine.errors import OutputBusy, UnreadableInput
from engine.outputs import batch_lock, output_folders
from engine.receipt import read_receipt
from engine.store import FileLock


def rebuild(out: Path) -> int:
    """Makes rows of the receipts below `out` that the catalog does not know, and tells how many these were.

    A receipt does not tell where its input lay, what else was asked for, or how long it took, and pictures that were
    refused have none. Raises OutputBusy while a batch is at work, UnreadableInput for no folder.
    """
    if not out.is_dir():
        raise UnreadableInput(f"{out}: is no folder; give what `restore` wrote to --out")
    lock = FileLock.try_take(batch_lock(out))
    if lock is None:
        raise OutputBusy(f"{out}: a batch is at work in it; wait for it, then rebuild its catalog")
    try:
        known = load_catalog(out).rows
        rows = (_row_of(out, path) for folder in output_folders(out) for path in sorted(folder.glob("*.json")))
        added = 0
        with CatalogWriter(out) as writer:
            for row in rows:
                if row is not None and not _is_known(row, known.get(row.name)):
                    writer.add(row)
                    added += 1
        return added
    finally:
        lock.release()


def outputs_of(receipt: Mapping[str, Any]) -> tuple[Output, ...]:
    """What a receipt names."""
    return tuple(Output(fmt, made["name"], made["sha256"], made["bytes"]) for fmt, made in receipt["outputs"].items())


def _row_of(out: Path, path: Path) -> Row | None:
    receipt = read_receipt(path)
    if receipt is None:
        return None
    source, mask, plan = receipt["input"], receipt["mask"], receipt["plan"]
    height, width = plan["size_px"]
    return Row(
        name=path.relative_to(out).with_suffix("").as_posix(),
        image=source["name"],
        image_bytes=source["bytes"],
        image_mtime_ns=0,
        mask=None if mask is None else mask["name"],
        mask_bytes=0 if mask is None else mask["bytes"],
        mask_mtime_ns=0,
        request_id="",
        status="done",
        reason=None,
        message=None,
        plan_id=receipt["plan_id"],
        image_sha256=source["sha256"],
        outputs=outputs_of(receipt),
        megapixels=height * width / 1e6,
        generated_share=receipt["generated"]["share"],
        seconds=0.0,
        attempts=0,
        finished=datetime.fromisoformat(receipt["finished"]),
    )


def _is_known(row: Row, known: Row | None) -> bool:
    return known is not None and (known.status, known.plan_id, known.outputs) == ("done", row.plan_id, row.outputs)
