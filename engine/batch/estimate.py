"""What the restoration of many pictures would take, from their headers: nothing is decoded, nothing is written."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from engine.batch.inputs import Item
from engine.errors import (
    EXIT_FAILED,
    EXIT_REFUSED,
    EngineError,
    MaskMismatch,
    NotEnoughDisk,
    PlanError,
    printable,
)
from engine.image import ImageInfo
from engine.isolate import probe_many_in_child
from engine.models.card import Card
from engine.planning import halo_cost, kept_bytes, make_plan, network_operations
from engine.receipt import Job
from engine.request import Request
from engine.restoration import Restorer
from engine.store import free_bytes
from engine.tiling.export import check_format
from engine.tiling.plan import DISK_RESERVE_BYTES, check_memory

PICTURES_AT_ONCE = 32
"""Whose headers are read by one process: more would only add to what a file that kills it costs."""

NAMES_SHOWN = 3


@dataclass(slots=True)
class Refused:
    """Pictures that a run would refuse for the same reason."""

    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """Names of the first few."""
    as_planned: bool = False
    """The request is refused, not the picture."""


@dataclass(slots=True)
class Estimate:
    """Sums over the pictures that can be restored."""

    num_pictures: int = 0
    """Refused ones too."""
    refused: dict[str, Refused] = field(default_factory=dict[str, Refused])
    """By reason code."""
    input_pixels: int = 0
    output_pixels: int = 0
    num_shards: int = 0
    kept_bytes: int = 0
    """Of all outputs, uncompressed."""
    passing_bytes: int = 0
    """The most that one picture needs besides, while it is made."""
    ram_bytes: int = 0
    """The most that one process needs."""
    operations: float = 0.0
    """Multiply-adds of the network, halos included."""
    kept_operations: float = 0.0
    """Without what is spent on halos."""

    def disk_bytes(self, num_workers: int) -> int:
        """Upper bound, with one picture in the making for each worker."""
        return self.kept_bytes + self.passing_bytes * max(1, min(num_workers, self.num_pictures))

    @property
    def exit_code(self) -> int:
        """That of a run whose other pictures are restored."""
        if not self.refused:
            return 0
        return EXIT_REFUSED if all(refused.as_planned for refused in self.refused.values()) else EXIT_FAILED


def estimate(
    items: Iterable[Item],
    request: Request,
    card: Card,
    *,
    out: Path,
    formats: tuple[str, ...],
    max_pixels: int,
    detect: bool = False,
) -> Estimate:
    """Adds up what `restore` would plan for each item; a mask is looked at for its size only.

    detect: damage is to be found; everything counts as if there were some.
    """
    total = Estimate()
    for item, probed in _probed(iter(items), max_pixels):
        total.num_pictures += 1
        try:
            job = item.job(out, formats, max_pixels=max_pixels, detect=detect)
            for found in probed:
                if isinstance(found, EngineError):
                    raise found
            _add(total, job, [found for found in probed if isinstance(found, ImageInfo)], request, card)
        except EngineError as error:
            refused = total.refused.setdefault(error.code, Refused())
            refused.count += 1
            refused.first += [item.name] if len(refused.first) < NAMES_SHOWN else []
            refused.as_planned = isinstance(error, PlanError)
    return total


def _probed(items: Iterator[Item], max_pixels: int) -> Iterator[tuple[Item, list[ImageInfo | EngineError]]]:
    """Each item with what the headers of its picture and its mask say."""
    while bunch := list(islice(items, PICTURES_AT_ONCE)):
        paths = [[Path(path) for path in (item.image, item.mask) if path is not None] for item in bunch]
        found = iter(probe_many_in_child([path for own in paths for path in own], max_pixels=max_pixels))
        yield from ((item, list(islice(found, len(own)))) for item, own in zip(bunch, paths, strict=True))


def _add(total: Estimate, job: Job, probed: Sequence[ImageInfo], request: Request, card: Card) -> None:
    info, *masks = probed
    for mask in masks:
        if mask.size != info.size:
            raise MaskMismatch(f"{mask.path}: the mask is {mask.size} px, the picture is {info.size} px.")
    has_mask = job.mask is not None or job.detect
    mask_sha256 = "unread" if has_mask else "none"
    plan, tiling = make_plan(
        request, info, card, name=job.name, input_sha256="unread", mask_sha256=mask_sha256, formats=job.formats
    )
    for fmt in job.formats:
        check_format(fmt, size=plan.size, channels=plan.channels, dtype=plan.dtype, metadata=info.metadata)
    check_memory(plan, request.max_memory_bytes)
    kept = kept_bytes(info, plan.grid, has_mask=has_mask, formats=job.formats)
    scale = int(plan.parameters["scale"])
    draws = has_mask or scale > 1  # else every pixel is copied
    operations = network_operations(card, tiling, plan.size, scale) if draws else 0.0
    total.input_pixels += info.size.num_pixels
    total.output_pixels += plan.size.num_pixels
    total.num_shards += plan.grid.num_shards
    total.kept_bytes += kept
    total.passing_bytes = max(total.passing_bytes, plan.projected_disk_bytes - kept)
    total.ram_bytes = max(total.ram_bytes, plan.projected_ram_bytes)
    total.operations += operations
    total.kept_operations += operations / (1 + halo_cost(card, tiling, scale))


def check_disk(total: Estimate, out: Path, *, num_workers: int) -> None:
    """Raises NotEnoughDisk where the outputs cannot all be stored."""
    needed, free = total.disk_bytes(num_workers) + DISK_RESERVE_BYTES, free_bytes(out)
    if needed > free:
        raise NotEnoughDisk(
            f"{out}: {total.num_pictures:,} pictures need up to {needed:,} bytes of disk, {free:,} are free; "
            "free some space, choose another --out, fewer formats or a lower scale"
        )


def to_text(
    total: Estimate, *, out: Path, here_per_s: float, core_per_s: float, num_workers: int | None, speed: float
) -> str:
    """A table in words. `here_per_s`, `core_per_s`: multiply-adds per second, of this machine and of one core of it."""
    num_good = total.num_pictures - sum(refused.count for refused in total.refused.values())
    halo = total.operations / total.kept_operations - 1 if total.kept_operations else 0.0
    disk = total.disk_bytes(num_workers or 1)
    rows = [("pictures", f"{total.num_pictures:,}, of which {num_good:,} can be restored")]
    for code, refused in sorted(total.refused.items()):
        names = ", ".join(refused.first) + (", ..." if refused.count > len(refused.first) else "")
        rows.append(("refused", f"{refused.count:,} {code}: {names}"))
    rows += [
        ("input", f"{total.input_pixels / 1e6:,.1f} megapixels"),
        ("output", f"{total.output_pixels / 1e6:,.1f} megapixels"),
        ("shards", f"{total.num_shards:,}"),
        ("disk", f"{disk / 2**30:,.2f} GiB at most, {free_bytes(out) / 2**30:,.2f} GiB are free"),
        ("memory", f"{total.ram_bytes / 2**30:.2f} GiB at most for one process"),
        ("halo", f"{100 * halo:.0f} % more work than the pixels alone"),
        ("expected", f"{_hours(total.operations / here_per_s)} of network time on this machine"),
    ]
    if num_workers is not None:
        seconds = total.operations / (core_per_s * speed * num_workers)
        each = f"{num_workers:,} workers, each {speed:g} x as fast as one core here"
        rows.append(("cluster", f"{_hours(seconds)} of network time with {each}"))
    return "\n".join(f"{name:9} {printable(text)}" for name, text in rows)


def core_rate(restorer: Restorer) -> float:
    """Multiply-adds per second of the network on one core here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return restorer.measured_rate()
    finally:
        torch.set_num_threads(threads)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 36 else f"{seconds:.1f} s"
