"""One picture, end to end: open, plan, guide, shards, pyramid, publish.

Nothing is written before the plan holds, and nothing has its final name before every shard is checked.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine import remote
from engine.detection import DamageDetector
from engine.errors import InputError, OutputBusy, PlanError, StorageError, UnreadableInput
from engine.generated_map import GENERATED, Generated, restored_region, write_generated_map
from engine.geometry import Box, Size
from engine.guide import make_guide
from engine.image import ArrayPicture, ImageInfo, Pixels, Source, digest
from engine.isolate import decode_in_child, probe_in_child, read_mask_in_child
from engine.mask import DETECTED, Mask, array_mask, find_mask, no_mask
from engine.memory import return_freed_memory
from engine.metadata import Metadata
from engine.models.checkpoint import chosen
from engine.models.runner import TorchRunner
from engine.objects import Place, Prefix, local_copy, place
from engine.planning import drawing_order, make_plan, network_operations, resolved_precision
from engine.provenance import describe
from engine.receipt import (
    Job,
    Receipt,
    announce,
    is_finished,
    keeps_canvas,
    plan_id_of,
    published_canvas,
    record_export,
    refuse_taken,
    refuse_taken_files,
    tidy,
    write_receipt,
)
from engine.render import Renderer, Tiling
from engine.request import Request, drawn_box, output_region, output_size, render_scale
from engine.resample import resample_area
from engine.residual import aggregate
from engine.store import digest_of, make_folders, refuse_existing, storage_errors
from engine.tiling.canvas import AnyCanvas, Canvas, adding_to
from engine.tiling.execute import ShardEnd, run
from engine.tiling.export import check_format, export
from engine.tiling.grid import ShardKey
from engine.tiling.layout import stored_metadata
from engine.tiling.plan import Plan, canvas_bytes, validate
from engine.tiling.pyramid import HalveShard
from engine.tiling.remote_canvas import RemoteCanvas

MAX_DRAWN_PIXELS = 1 << 24
"""Drawn at once where the output is smaller than what it is drawn from."""

Progress = Callable[[ShardEnd, Plan], None]


class Restorer:
    """A loaded model that restores pictures one after another, in this process."""

    def __init__(
        self,
        *,
        model: str | None = None,
        degradation: str = "clean",
        fidelity: float | None = None,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.checkpoint = chosen(model, degradation, fidelity)
        self._precision, self._device = resolved_precision(precision), device
        self._threads = threads or len(os.sched_getaffinity(0))

    @cached_property
    def _runner(self) -> TorchRunner:
        if self._device == "cuda" and not torch.cuda.is_available():
            raise PlanError(
                "1 CUDA device is needed and torch sees 0; install a driver and its torch, or leave out --device"
            )
        return TorchRunner(self.checkpoint, precision=self._precision, threads=self._threads, device=self._device)

    def _check(self, request: Request) -> None:
        """Raises PlanError where a plan would tell of other sums than are done here."""
        asked = resolved_precision(request.precision), request.device
        if asked != (self._precision, self._device):
            raise PlanError(
                f"the request is for {' on '.join(asked)}, this restorer works in {self._precision} on {self._device}; "
                "give both the same precision and device"
            )

    @cached_property
    def _detector(self) -> DamageDetector:
        return DamageDetector()

    def ready(self) -> None:
        """Loads the network. To be called in the thread that will draw: torch keeps the number of threads by thread."""
        _ = self._runner

    def with_mask(self, job: Job, request: Request) -> Job:
        """The job with the mask that was found, where one is to be; it is looked for once. Raises OutputExists."""
        if not job.detect:
            return job
        info = probe_in_child(job.image, max_pixels=job.max_pixels, page=request.page)
        found = self._detector.mask_of(info, job.out, job.name, replace=job.replace)
        return replace(job, mask=found.path, detect=False)

    def plan(self, job: Job, request: Request) -> tuple[Plan, Tiling, ImageInfo]:
        """What would be done, from headers and digests; nothing is decoded or written.

        Where the mask is still to be found, the plan is one of the same size, and of no use otherwise.
        """
        info = probe_in_child(job.image, max_pixels=job.max_pixels, page=request.page)
        mask_sha256 = "unread" if job.detect else "none" if job.mask is None else digest_of(job.mask).sha256
        self._check(request)
        plan, tiling = make_plan(
            request,
            info,
            self.checkpoint.card,
            name=job.name,
            input_sha256=digest(info),
            mask_sha256=mask_sha256,
            formats=job.formats,
            shard_px=job.shard_px,
        )
        for name in job.formats:
            check_format(
                name,
                size=plan.size,
                channels=plan.channels,
                dtype=plan.dtype,
                metadata=carried(info, request),
                tiff_compression=job.tiff_compression,
            )
        return plan, tiling, info

    def restore(self, job: Job, request: Request, progress: Progress | None = None) -> Receipt:
        """Restore, or resume, or find finished; raises an EngineError that says what stood in the way."""
        started = time.monotonic()
        job = self.with_mask(job, request)
        plan, tiling, info = self.plan(job, request)
        if job.remote is not None:
            outputs, done, reused = self._make_remote(plan, job, job.remote, request, info, tiling, progress)
            seconds = time.monotonic() - started
            return Receipt(plan.plan_id, outputs, seconds, plan.grid.num_shards, done, reused, _notes(info, request))
        done = reused = plan.grid.num_shards
        if not is_finished(plan, job.targets, job):
            refuse_taken(plan, job.targets, job)
            published = published_canvas(job.out, job.name)
            if plan_id_of(published) == plan.plan_id:  # made earlier; another format is wanted now
                with adding_to(published) as canvas:
                    tidy(job, job.targets)
                    announce(canvas.scratch, job.targets)
                    self._finish(canvas, _Work(self, canvas, job, request, info, tiling, canvas.scratch))
            else:
                validate(plan, out=job.out, max_memory_bytes=request.max_memory_bytes)
                done, reused = self._make(plan, job, request, info, tiling, progress)
        seconds = time.monotonic() - started
        outputs = tuple(job.targets.values())
        return Receipt(plan.plan_id, outputs, seconds, plan.grid.num_shards, done, reused, _notes(info, request))

    def lay_out(self, job: Job, request: Request) -> bool:
        """Begins a picture, for `Part` to draw its shards; False where it is finished, or has its canvas already."""
        job = self.with_mask(job, request)
        plan, _, info = self.plan(job, request)
        if is_finished(plan, job.targets, job) or plan_id_of(published_canvas(job.out, job.name)) == plan.plan_id:
            return False
        refuse_taken(plan, job.targets, job)
        validate(plan, out=job.out, max_memory_bytes=request.max_memory_bytes)
        _opened(plan, job, info, request).close()
        return True

    def _make(
        self, plan: Plan, job: Job, request: Request, info: ImageInfo, tiling: Tiling, progress: Progress | None
    ) -> tuple[int, int]:
        """Shards, exports, receipt, final name, in this order; (shards done, of these reused)."""
        with _opened(plan, job, info, request) as canvas:
            tidy(job, job.targets)
            work = _Work(self, canvas, job, request, info, tiling, canvas.scratch)
            done, reused = work.run(progress)
            announce(canvas.scratch, job.targets)
            self._finish(canvas, work)
            if keeps_canvas(plan, job.targets, job):
                canvas.publish(published_canvas(job.out, job.name), replace=job.replace)
            else:
                canvas.discard()
        return done, reused

    def _make_remote(
        self,
        plan: Plan,
        job: Job,
        out: Prefix,
        request: Request,
        info: ImageInfo,
        tiling: Tiling,
        progress: Progress | None,
    ) -> tuple[tuple[Place, ...], int, int]:
        """As `_make` on an object store: shards there, exports here and then there, at last the pointer to all."""
        formats, total = tuple(job.targets), plan.grid.num_shards
        if not remote.is_finished(out, plan, formats, tiff_compression=job.tiff_compression):
            remote.refuse_taken(out, plan, replace=job.replace)
            here = plan.projected_disk_bytes - canvas_bytes(plan.grid, plan.channels, plan.dtype)
            validate(replace(plan, projected_disk_bytes=here), out=job.out, max_memory_bytes=request.max_memory_bytes)
            kept, metadata = remote.keeps_canvas(out, plan, formats), carried(info, request)
            with RemoteCanvas.open(plan, out, metadata=metadata, kept=kept, scratch_in=job.out) as canvas:
                local = replace(job, out=canvas.scratch / "outputs", remote=None)
                work = _Work(self, canvas, local, request, info, tiling, canvas.scratch)
                done, reused = work.run(progress)
                facts = self._export(canvas, work)
                files = {name: path for name, path in local.targets.items() if name != "ome-zarr"}
                made = remote.publish(
                    canvas,
                    out,
                    files,
                    facts,
                    keep_canvas=kept,
                    tiff_compression=job.tiff_compression,
                    replace=job.replace,
                )
            return tuple(made[name] for name in formats), done, reused
        pointer = remote.read_pointer(out, plan.name)
        if pointer is None or pointer.receipt is None:
            raise StorageError(f"{out}/{plan.name}.json: is gone since it was read; run the same command again")
        made = remote.places(out, pointer.receipt)
        return tuple(made[name] for name in formats), total, total

    def _finish(self, canvas: Canvas, work: "_Work") -> None:
        """All outputs but the canvas itself; then the receipt."""
        write_receipt(canvas.plan, work.job.targets, work.job, self._export(canvas, work))

    def _export(self, canvas: AnyCanvas, work: "_Work") -> dict[str, object]:
        """All outputs but the canvas itself, each written once and given its name when complete; the facts of them."""
        job, plan = work.job, canvas.plan
        generated = Generated(0, restored_region(plan).size.num_pixels)
        for name, path in job.targets.items():
            if name == GENERATED:
                generated = write_generated_map(work.mask, plan, path)
            elif name != "ome-zarr":
                return_freed_memory()  # the network's; an encoder may need as much
                export(
                    lambda level, box: canvas.read(box, level=level),
                    level_sizes=plan.grid.level_sizes,
                    channels=plan.channels,
                    dtype=plan.dtype,
                    fmt=name,
                    path=path,
                    metadata=carried(work.info, work.request),
                    tiff_compression=job.tiff_compression,
                )
        told = replace(work.info, metadata=carried(work.info, work.request))
        return describe(plan, self.checkpoint.card, told, mask=job.mask, generated=generated)

    def measured_rate(self) -> float:
        """Multiply-adds per second of the network here, from one small tile at x4."""
        card = self.checkpoint.card
        tiling = Tiling(128, 128, 1)
        source = ArrayPicture(np.zeros((128, 128, 3), np.uint8))
        renderer = Renderer(source, no_mask(source.size), None, None, self._runner, scale=4, tiling=tiling)
        best_s = float("inf")
        for _ in range(3):
            started = time.monotonic()
            renderer.forget()
            renderer.draw(Box.of(source.size))
            best_s = min(best_s, time.monotonic() - started)
        return network_operations(card, tiling, source.size.scaled(4), 4) / best_s

    def renderer(self, source: Source, mask: Mask, request: Request, tiling: Tiling, scratch: Path | None) -> Renderer:
        """The global pass and the residuals of one picture, ready to draw any region of it."""
        guide = make_guide(source, mask, self._runner)
        detail = None if guide is None or scratch is None else aggregate(source, mask, guide, scratch)
        scale = render_scale(request, source.size)
        return Renderer(source, mask, guide, detail, self._runner, scale=scale, tiling=tiling)

    def array(self, pixels: Pixels, mask: NDArray[np.bool_] | None, request: Request, *, scratch: Path) -> Pixels:
        """A picture in memory, restored in memory: the same tiles, without a canvas. `scratch` holds residuals."""
        source = ArrayPicture(pixels)
        missing = no_mask(source.size) if mask is None else array_mask(mask)
        self._check(request)
        plan, tiling = make_plan(
            request, source, self.checkpoint.card, name="array", input_sha256=source.sha256, mask_sha256=missing.sha256
        )
        renderer = self.renderer(source, missing, request, tiling, scratch)
        return _draw(renderer, plan, request, source.size, Box.of(plan.size))


class _Work:
    """Draws shards of one picture; decodes and looks at it only when the first one is asked for."""

    def __init__(
        self,
        restorer: Restorer,
        canvas: AnyCanvas,
        job: Job,
        request: Request,
        info: ImageInfo,
        tiling: Tiling,
        scratch: Path,
    ) -> None:
        self.job, self.request, self.info = job, request, info
        self._restorer, self._canvas, self._tiling, self._scratch = restorer, canvas, tiling, scratch
        self._halve = HalveShard(canvas)

    def run(self, progress: Progress | None) -> tuple[int, int]:
        """Makes all shards; (shards done, of these reused)."""
        plan = self._canvas.plan
        done = reused = 0
        for end in run(self._canvas, drawing_order(plan, self._tiling), self):
            done += 1
            reused += end.reused
            if progress is not None:
                progress(end, plan)
        return done, reused

    def __call__(self, key: ShardKey) -> Pixels:
        if key.level > 0:
            return self._halve(key)
        plan = self._canvas.plan
        return _draw(self._renderer, plan, self.request, self.info.size, plan.grid.box(key))

    def overview(self) -> Pixels:
        return self._renderer.overview()

    @cached_property
    def mask(self) -> Mask:
        """Decoded in a process of its own, as the picture is: a file that kills its decoder is one that is refused."""
        if self.job.mask is None:
            return no_mask(self.info.size)
        return read_mask_in_child(self.job.mask, size=self.info.size, scratch=self._scratch)

    @cached_property
    def _renderer(self) -> Renderer:
        try:
            source, mask = decode_in_child(self.info, self._scratch), self.mask
            planned = self._canvas.plan
            if (source.sha256, mask.sha256) != (planned.input_sha256, planned.mask_sha256):
                raise UnreadableInput(f"{self.info.path}: changed since it was planned, or its mask did. Run again.")
        except InputError:
            if self._canvas.is_owned and not any(self._canvas.is_done(key) for key in self._canvas.grid.all_keys()):
                self._canvas.discard()  # nothing was computed, nothing is to be resumed
            raise
        return self._restorer.renderer(source, mask, self.request, self._tiling, self._scratch)


class Part:
    """Draws shards of a picture that `Restorer.lay_out` has begun, beside other processes; decodes it once."""

    def __init__(self, restorer: Restorer, job: Job, request: Request, scratch: Path) -> None:
        """`scratch`: a folder of this process alone, for the decoded picture."""
        job = restorer.with_mask(job, request)
        self.plan, self.tiling, info = restorer.plan(job, request)
        self.canvas = Canvas.join(self.plan, job.out)
        self._work = _Work(restorer, self.canvas, job, request, info, self.tiling, scratch)

    def draw(self, keys: Iterable[ShardKey]) -> Iterator[ShardEnd]:
        """Shards whose sources, where they are of a smaller level, are stored."""
        yield from run(self.canvas, keys, self._work)

    def overview(self) -> Pixels:
        """(h, w, c) The input at guide size, with its holes filled."""
        return self._work.overview()


def _draw(renderer: Renderer, plan: Plan, request: Request, size: Size, box: Box) -> Pixels:
    """A box of the output, in output pixels."""
    region, scale = output_region(request, size), render_scale(request, size)
    drawn, have = drawn_box(plan.size, region, scale, box)
    enlarged = region.size.scaled(scale)
    if enlarged == plan.size:
        return renderer.draw(drawn)
    if have.size.num_pixels > MAX_DRAWN_PIXELS and box.size.num_pixels > 1:  # a reduction: many are drawn for one
        return np.concatenate(
            [_draw(renderer, plan, request, size, half) for half in box.halves()],
            axis=0 if box.size.h >= box.size.w else 1,
        )
    return resample_area(renderer.draw(drawn), have, box, source=enlarged, target=plan.size)


def _opened(plan: Plan, job: Job, info: ImageInfo, request: Request) -> Canvas:
    """The canvas of a picture that was not finished a moment ago. Raises OutputBusy, also where it is by now."""
    with storage_errors(job.out):
        make_folders(job.out)
    canvas = Canvas.open(plan, job.out, metadata=carried(info, request))
    published = published_canvas(job.out, job.name)
    if plan_id_of(published) == plan.plan_id:
        canvas.discard()
        raise OutputBusy(f"{published}: another process has just finished it; run the same command again")
    return canvas


def _notes(info: ImageInfo, request: Request) -> tuple[str, ...]:
    """What of the input is not in the outputs as it was."""
    left_out = tuple(f"left out: {what}" for what in carried(info, request).left_out)
    return left_out if info.converted is None else (f"converted: {info.converted}", *left_out)


def export_finished(
    canvas: Place, *, out: Path, formats: Sequence[str], tiff_compression: str = "deflate", replace: bool = False
) -> list[Path]:
    """Write a finished canvas in more formats, as `out/<its name><suffix>`; the canvas stays as it is.

    canvas: a folder, or the URL of the receipt on an object store that names it.
    Beside the canvas, its receipt then names them. Raises OutputExists for a file that is there already and is not to
    be replaced, or not known as an output of this canvas; StorageError for a damaged or renamed canvas; and what
    `export` raises.
    """
    if isinstance(canvas, Prefix):
        root: Place = remote.published_canvas(canvas)
        beside = False
        opened: AbstractContextManager[AnyCanvas] = RemoteCanvas.load(root)
    else:
        root = canvas.resolve()
        beside = out.resolve() == root.parent
        opened = adding_to(root) if beside else Canvas.load(root)
    with opened as source:
        plan = source.plan
        if root.name != published_canvas(out, plan.name).name:
            raise StorageError(f"{root}: is the canvas of {plan.name}; give it back the name {plan.name}.zarr")
        image = root if isinstance(root, Path) else out / root.name
        job = Job(image, None, out, plan.name, tuple(formats), tiff_compression=tiff_compression)
        metadata = stored_metadata(root)
        for name, path in job.targets.items():
            refuse_existing(path, replace=replace)
            check_format(
                name,
                size=plan.size,
                channels=plan.channels,
                dtype=plan.dtype,
                metadata=metadata,
                tiff_compression=tiff_compression,
            )
        refuse_taken_files(plan, job.targets, job)
        if beside:
            announce(source.scratch, job.targets)
        for name, path in job.targets.items():
            export(
                lambda level, box: source.read(box, level=level),
                level_sizes=source.grid.level_sizes,
                channels=plan.channels,
                dtype=plan.dtype,
                fmt=name,
                path=path,
                metadata=metadata,
                tiff_compression=tiff_compression,
            )
        if beside:
            record_export(plan, job)
    return list(job.targets.values())


def carried(info: ImageInfo, request: Request) -> Metadata:
    """What of the input's metadata goes into the outputs: an enlarged scan keeps its size in millimetres."""
    metadata = info.metadata.stripped() if request.strip_metadata else info.metadata
    region = output_region(request, info.size).size
    return metadata.enlarged(output_size(request, info.size).long_side / region.long_side)


def restore(
    image: Path | str,
    *,
    out: Path | str,
    mask: Path | str | None = None,
    scale: int = 1,
    long_side: int | None = None,
    box: tuple[int, int, int, int] | None = None,
    model: str | None = None,
    degradation: str = "clean",
    fidelity: float | None = None,
    precision: str = "auto",
    formats: Sequence[str] = ("ome-zarr", "png"),
    max_memory_bytes: int | None = None,
    replace: bool = False,
) -> Receipt:
    """Restore one picture into the folder, or below the ``s3://`` URL, `out`.

    image, mask: files or URLs; any non-zero mask pixel is missing; "auto" finds the damage. scale: 1, 2, 4,
    8 or 16; long_side: output pixels, in its place. box: (y, x, h, w) in input pixels. fidelity: 0 (most texture) to 1
    (fewest errors). Raises an EngineError with both numbers and the remedy.
    """
    region = None if box is None else Box(box[0], box[1], box[0] + box[2], box[1] + box[3])
    request = Request(
        scale=scale, long_side_px=long_side, box=region, precision=precision, max_memory_bytes=max_memory_bytes
    )
    restorer = Restorer(model=model, degradation=degradation, fidelity=fidelity, precision=precision)
    where = place(str(out))
    with tempfile.TemporaryDirectory(prefix="engine-") as fetched:
        path = local_copy(str(image), Path(fetched, "image"))
        detect = mask == DETECTED
        given = None if mask is None or detect else local_copy(str(mask), Path(fetched, "mask"))
        found = None if given is None else find_mask(given, image=path)
        if isinstance(where, Path):
            job = Job(path, found, where, path.stem, tuple(formats), replace, detect=detect)
        else:
            job = Job(path, found, Path(fetched), path.stem, tuple(formats), replace, remote=where, detect=detect)
        return restorer.restore(job, request)
