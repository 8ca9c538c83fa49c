"""A worker's part of a service: it does the tasks that the queue gives out. Nothing here knows Ray or HTTP."""

import shutil
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from uuid import uuid4
from zipfile import ZIP_STORED, ZipFile

import numpy as np

from engine.planning import MAX_TILE_PX
from engine.receipt import Job, published_canvas
from engine.request import Request, render_scale
from engine.restoration import Part, Restorer, export_finished
from engine.serve.archive import Picture
from engine.serve.gallery import MASK, ORIGINAL, OVERVIEW, RESTORED, exported
from engine.serve.queue import Began, Kind, Task
from engine.store import storage_errors, write_atomic
from engine.tiling.grid import ShardKey

SHARD_PX = 1024
"""A quarter of an archive's, and what a tile becomes: what is looked at is there sooner."""
_MOST_OPEN = 3
"""Pictures that a worker keeps decoded."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a picture of the service lies, and what is made of it."""

    folder: Path
    picture: Picture

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def scratch(self) -> Path:
        """For what workers have decoded."""
        return self.folder / "scratch"

    @property
    def request(self) -> Request:
        options = self.picture.options
        asked = Request(
            scale=options.scale,
            long_side_px=options.long_side_px,
            page=options.page,
            strip_metadata=options.strip_metadata,
        )
        return replace(asked, tile_px=min(MAX_TILE_PX, SHARD_PX // render_scale(asked, self.picture.size)))

    @property
    def job(self) -> Job:
        """The restoration."""
        mask = None if self.picture.mask is None else self.folder / self.picture.mask
        return self._job(self.folder / self.picture.image, mask, RESTORED)

    def layers(self) -> Iterator[tuple[Job, Request]]:
        """What is shown beside it, with a pyramid of its own: the same pixels, stored as the service stores all."""
        if self.picture.image:
            yield self._job(self.folder / self.picture.image, None, ORIGINAL), Request(page=self.picture.options.page)
        if self.picture.mask is not None:
            yield self._job(self.folder / self.picture.mask, None, MASK), Request()

    def _job(self, image: Path, mask: Path | None, name: str) -> Job:
        return Job(image, mask, self.out, name, ("ome-zarr",), replace=True, max_pixels=1 << 40, shard_px=SHARD_PX)


class Studio:
    """Begins, draws and finishes pictures in this thread, one task after another."""

    def __init__(self, *, model: str | None = None, threads: int | None = None) -> None:
        self._restorer = Restorer(model=model, threads=threads)
        self._restorer.ready()
        self._parts: OrderedDict[str, tuple[Part, Path]] = OrderedDict()

    def begin(self, site: Site) -> Began:
        """Lays the canvas out, and makes what is shown before it is drawn. Raises what `Restorer` raises."""
        with ThreadPoolExecutor(1) as beside:
            layers = beside.submit(self._make_layers, site)
            began = self._begin(site)
            layers.result()
        return began

    def _begin(self, site: Site) -> Began:
        if not self._restorer.lay_out(site.job, site.request):
            grid = self._restorer.plan(site.job, site.request)[0].grid
            return Began(grid, frozenset(grid.all_keys()))
        part = self._part(site)
        for other in site.out.glob(f"{RESTORED}.*.inprogress.zarr"):  # of another model, before a restart
            if other != part.canvas.root:
                shutil.rmtree(other, ignore_errors=True)
        path = site.folder / OVERVIEW
        if not path.exists():
            written = BytesIO()
            np.save(written, part.overview())
            write_atomic(path, written.getbuffer())
        grid = part.plan.grid
        return Began(grid, frozenset(key for key in grid.all_keys() if part.canvas.is_done(key)))

    def _make_layers(self, site: Site) -> None:
        for job, request in site.layers():
            self._restorer.restore(job, request)

    def draw(self, site: Site, keys: tuple[ShardKey, ...]) -> None:
        """Draws and stores shards."""
        for _ in self._part(site).draw(keys):
            pass

    def finish(self, site: Site) -> None:
        """Checks what is drawn, and gives it its final name."""
        self.forget(site.picture.id)
        self._restorer.restore(site.job, site.request)
        shutil.rmtree(site.scratch, ignore_errors=True)  # of workers that were killed

    def do(self, task: Task, site: Site) -> Began | None:
        """A task of any kind; what is known after the first. Raises an EngineError whose message names no path."""
        if task.kind is Kind.BEGIN:
            return self.begin(site)
        if task.kind is Kind.DRAW:
            self.draw(site, task.keys)
        else:
            self.finish(site)
        return None

    def forget(self, picture: str) -> None:
        """Drops what is kept of a picture."""
        found = self._parts.pop(picture, None)
        if found is not None:
            shutil.rmtree(found[1], ignore_errors=True)

    def close(self) -> None:
        for picture in list(self._parts):
            self.forget(picture)

    def _part(self, site: Site) -> Part:
        """The picture, decoded; of several, the last ones used stay so."""
        name = site.picture.id
        if name not in self._parts:
            while len(self._parts) >= _MOST_OPEN:
                self.forget(next(iter(self._parts)))
            scratch = site.scratch / uuid4().hex
            scratch.mkdir(parents=True)
            self._parts[name] = Part(self._restorer, site.job, site.request, scratch), scratch
        self._parts.move_to_end(name)
        return self._parts[name][0]


def export(site: Site, fmt: str) -> Path:
    """The finished picture as a file of another format, made where it is not there yet; `ome-zarr` is zipped."""
    canvas = published_canvas(site.out, RESTORED)
    target = exported(site.folder, fmt)
    if fmt != "ome-zarr":
        if not target.exists():
            export_finished(canvas, out=site.out, formats=(fmt,))
        return target
    if not target.exists():
        partial = target.with_name(f"{target.name}.{uuid4().hex}.partial")
        try:
            with storage_errors(target):
                with ZipFile(partial, "w", ZIP_STORED) as archive:
                    files = [one for one in sorted(canvas.rglob("*")) if one.is_file() and "_engine" not in one.parts]
                    for one in sorted(files, key=lambda one: one.name != "zarr.json"):  # RFC 9 of OME-Zarr
                        archive.write(one, one.relative_to(canvas).as_posix())
                partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
