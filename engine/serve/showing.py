"""The page of the service for one finished output on this machine: nothing is accepted, nothing is restored."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from engine.errors import PlanError
from engine.image import probe
from engine.mask import find_mask
from engine.restoration import Restorer, export_finished
from engine.serve.app import Export, make_app
from engine.serve.archive import Archive, End, Job, Options, Picture, new_id, read_picture
from engine.serve.cluster import Snapshot
from engine.serve.desk import Desk, Limits
from engine.serve.gallery import MASK, ORIGINAL, RESTORED
from engine.serve.keys import ANYBODY, Keys
from engine.serve.server import LOOPBACK
from engine.serve.studio import Site, export
from engine.tiling.canvas import Canvas


def show(
    canvas: Path, told: Callable[[str], None], *, image: Path | None = None, mask: Path | None = None, port: int = 8000
) -> None:
    """Runs until it is told to end; `told` is given the address of the page.

    image, mask: what the output was made from, to be shown beside it.
    Raises StorageError where `canvas` is no finished output, PlanError for a mask alone, and what reading the others
    raises.
    """
    if mask is not None and image is None:
        raise PlanError("0 images are given beside 1 mask; give --image, what the output was made from")
    with tempfile.TemporaryDirectory(prefix="engine-view-") as name:
        desk, job = lay_out(Path(name), canvas, image=image, mask=mask)
        told(f"http://127.0.0.1:{port}/#{job.id}.{desk.token(job.id)}")
        app = make_app(desk, Keys(), exporter(canvas), hosts=LOOPBACK)
        uvicorn.run(app, host="127.0.0.1", port=port, ws="none", server_header=False, log_level="warning")
        desk.archive.close()


def lay_out(root: Path, canvas: Path, *, image: Path | None, mask: Path | None) -> tuple[Desk, Job]:
    """A store with this one picture in it, which has ended."""
    with Canvas.load(canvas.resolve()) as opened:
        plan = opened.plan
    archive = Archive.open(root)
    folder = archive.incoming()
    (folder / "out").mkdir()
    (folder / "out" / f"{RESTORED}.zarr").symlink_to(canvas.resolve())
    found = None if mask is None or image is None else find_mask(mask, image=image)
    picture = Picture(
        id=new_id(),
        work="",
        owner=ANYBODY.name,
        image="" if image is None else f"{ORIGINAL}{image.suffix}",
        mask=None if found is None else f"{MASK}{found.suffix}",
        options=Options(),
        size=plan.size if image is None else probe(image).size,
        output=plan.size,
        projected_bytes=0,
    )
    for source, name in ((image, picture.image), (found, picture.mask)):
        if source is not None and name:
            (folder / name).symlink_to(source.resolve())
    job = Job(new_id(), ANYBODY.name, picture.id, plan.name, time.time())
    archive.accept(folder, picture, job)
    restorer = Restorer()
    for layer, request in Site(archive.folder(picture.id), picture).layers():
        restorer.restore(layer, request)
    archive.end(picture.id, End(time.time()))
    return Desk(archive, _Nobody(), Limits(max_pixels=0)), job


def exporter(canvas: Path) -> Export:
    """Exports in this process, to the temporary store."""

    def made(folder: Path, fmt: str) -> Path:
        if fmt == "ome-zarr":
            return export(Site(folder, read_picture(folder)), fmt)
        return export_finished(canvas.resolve(), out=folder / "out", formats=(fmt,), replace=True)[0]

    async def export_one(folder: Path, _: str, fmt: str) -> Path:
        return await asyncio.to_thread(made, folder, fmt)

    return export_one


class _Nobody:
    """In place of a scheduler: knows of nothing, and is told of nothing."""

    def __getattr__(self, name: str) -> "_Nobody":
        return self

    async def remote(self, *_: object) -> Snapshot:
        return Snapshot("", {}, 0, (), 0.0, {}, None, 0, 0.0, 0, 0, 0.0)
