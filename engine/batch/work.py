"""What is asked for all pictures of a batch, and what became of one."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.batch.inputs import Item
from engine.detection import DamageDetector
from engine.errors import EngineError, InputError, PlanError
from engine.failpoints import hit
from engine.isolate import probe_in_child
from engine.objects import Prefix
from engine.planning import PIXEL_VERSION
from engine.receipt import Job, read_receipt, receipt_path
from engine.request import Request
from engine.restoration import Progress, Restorer

log = logging.getLogger(__name__)
_T = TypeVar("_T")

DONE, REFUSED, FAILED = "done", "refused", "failed"
"""REFUSED: this picture cannot be restored as asked. FAILED: the machine or the disk stood in the way, or the picture
killed the processes that tried."""


@dataclass(frozen=True, slots=True)
class Order:
    """The same for every picture."""

    out: Path
    request: Request = field(default_factory=Request)
    formats: tuple[str, ...] = ("ome-zarr", "png")
    model: str | None = None
    degradation: str = "clean"
    fidelity: float | None = None
    tiff_compression: str = "deflate"
    max_pixels: int = 1 << 30
    replace: bool = False
    remote: Prefix | None = None
    """Where the outputs go instead, on an object store: then `out` is for temporary files only."""
    detect: bool = False
    """Whether the damage of each picture is to be found."""

    def restorer(self, *, threads: int | None = None) -> Restorer:
        return Restorer(
            model=self.model,
            degradation=self.degradation,
            fidelity=self.fidelity,
            precision=self.request.precision,
            device=self.request.device,
            threads=threads,
        )

    def job(self, item: Item) -> Job:
        """Raises MaskUnavailable where no mask was found."""
        return item.job(
            self.out,
            self.formats,
            replace=self.replace,
            max_pixels=self.max_pixels,
            tiff_compression=self.tiff_compression,
            remote=self.remote,
            detect=self.detect,
        )

    def request_id(self, model_sha256: str) -> str:
        """A hash of all that decides about the outputs of a given input: a finished picture is finished for this."""
        asked = dataclasses.asdict(self)
        for name in ("out", "model", "fidelity", "replace", "max_pixels", "remote"):  # of the model, its digest
            del asked[name]
        asked |= {"model_sha256": model_sha256, "pixel_version": PIXEL_VERSION}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes of a batch on a Ray cluster."""

    count: int
    """Pairs: one restores small pictures, the other draws parts of large ones."""
    address: str | None = None
    """Of a cluster; None: one of this machine alone, for this batch."""
    stall_s: float = 600.0
    """A process that is at one picture for longer is ended."""
    gpu_share: float = 0.0
    """Of one GPU, for each process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one picture ended; plain values, for it travels between processes."""

    item: Item
    status: str
    reason: str | None = None
    message: str | None = None
    plan_id: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    shards_total: int = 0
    shards_done: int = 0
    shards_reused: int = 0
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    looked_up: bool = False
    """Whether it had ended before this run."""


Drawn = Callable[[str, int, int], None]
"""Is told how many shards of a large picture are drawn: its name, how many, of how many."""


def restore_item(restorer: Restorer, item: Item, order: Order, progress: Progress | None = None) -> Outcome:
    """One picture from its file to its receipt; never raises an EngineError."""

    def restored() -> Outcome:
        hit(f"restore {item.name}")
        with item.local() as local:
            receipt = restorer.restore(order.job(local), order.request, progress)
        return Outcome(
            item,
            DONE,
            plan_id=receipt.plan_id,
            seconds=receipt.seconds,
            shards_total=receipt.shards_total,
            shards_done=receipt.shards_done,
            shards_reused=receipt.shards_reused,
            outputs=tuple(str(path) for path in receipt.outputs),
            notes=receipt.notes,
        )

    return guarded(item, restored)


def find_damage_of(item: Item, order: Order, detector: DamageDetector) -> Outcome:
    """The mask that a picture would be restored with; never raises an EngineError."""

    def found() -> Outcome:
        started = time.monotonic()
        with item.local() as local:
            job = order.job(local)
            info = probe_in_child(job.image, max_pixels=job.max_pixels, page=order.request.page)
            mask = detector.mask_of(info, job.out, job.name, replace=job.replace)
        notes = () if mask.share is None else (f"{mask.share:.2%} of it is damaged",)
        return Outcome(item, DONE, seconds=time.monotonic() - started, outputs=(str(mask.path),), notes=notes)

    return guarded(item, found)


def guarded(item: Item, act: Callable[[], _T]) -> _T | Outcome:
    """What `act` says, or the error that it ended with: no picture takes others along, even by an error of ours."""
    try:
        return act()
    except EngineError as error:
        status = REFUSED if isinstance(error, InputError | PlanError) else FAILED
        return Outcome(item, status, error.code, str(error))
    except Exception as error:
        log.exception("%s", item.name)
        return Outcome(item, FAILED, "internal", f"{item.image}: an error of this program ({error!r}); report it")


def stored_receipt(order: Order, item: Item) -> dict[str, Any] | None:
    """What is on the disk about a finished picture."""
    path = order.out / item.name
    return read_receipt(receipt_path(path.parent, path.name))
