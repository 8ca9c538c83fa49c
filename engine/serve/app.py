"""The endpoint's interface: which addresses there are, and what they answer. See the generated `/openapi.json`."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from engine import __version__
from engine.errors import BadRequest, EngineError, NotFound, NotReady
from engine.serve import problems
from engine.serve.archive import Job
from engine.serve.asker import Asker, AtDesk, OwnJob, ShownJob
from engine.serve.desk import Desk
from engine.serve.envelope import Envelope
from engine.serve.gallery import exported
from engine.serve.keys import Keys
from engine.serve.metrics import CONTENT_TYPE, Metrics
from engine.serve.pictures import Drawing, pictures
from engine.serve.queue import State
from engine.serve.schema import OptionsIn, Restoration, parse_options
from engine.serve.told import REFUSED, RESULTS, described

MOST_WAIT_S = 60.0
EVENT_S = 0.25
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG, TIFF, WebP, JP2."},
                        "mask": {"type": "string", "format": "binary", "description": "Non-zero pixels are missing."},
                        "options": OptionsIn.model_json_schema(),
                    },
                },
                "encoding": {"options": {"contentType": "application/json"}},
            }
        },
    }
}
Export = Callable[[Path, str, str], Awaitable[Path]]
"""The file of a finished picture (its folder, its name) in a format."""


def make_app(desk: Desk, keys: Keys, export: Export, *, hosts: tuple[str, ...] = ()) -> FastAPI:
    """The application. `hosts`: the only names that it answers to; any, where it has none."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(work) for work in (desk.follow(), desk.keep_clean())]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(
        title="CRA-SRGAN engine",
        version=__version__,
        description="Restores damaged pictures: fills holes, raises detail.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            EngineError: problems.on_error,
            RequestValidationError: _on_bad_parameter,
            HTTPException: _on_http_error,
        },
    )
    app.add_middleware(Envelope, metrics=metrics, hosts=hosts)
    app.state.desk, app.state.keys, app.state.export, app.state.metrics = desk, keys, export, metrics
    app.state.drawing = Drawing()
    app.include_router(pictures)  # first: of the most requests
    app.include_router(public)
    app.include_router(restorations)
    folder = Path(str(files("engine.serve"))) / "viewer"
    app.mount("/viewer", StaticFiles(directory=folder), name="viewer")
    return app


async def _on_bad_parameter(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return problems.response("bad-request", f"{'.'.join(str(part)[:40] for part in first['loc'])}: {first['msg']}")


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "bad-request")
    body = problems.problem(code, str(error.detail)) | {"status": error.status_code}
    return JSONResponse(body, error.status_code, headers=error.headers, media_type=problems.MEDIA_TYPE)


# What is open to all.

public = APIRouter()


@public.get("/", response_class=HTMLResponse, include_in_schema=False)
def page() -> HTMLResponse:
    """The viewer."""
    return HTMLResponse(files("engine.serve").joinpath("viewer/index.html").read_text(encoding="utf-8"))


@public.get("/livez", response_class=PlainTextResponse)
def live() -> str:
    """Whether the process answers at all."""
    return "ok"


@public.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Not ready."}})
async def ready(desk: AtDesk) -> PlainTextResponse:
    """Whether new work would be done now."""
    good = await asyncio.to_thread(lambda: desk.is_ready)
    return PlainTextResponse("ok" if good else "not ready", 200 if good else 503)


# Jobs.

restorations = APIRouter(responses=REFUSED)


@restorations.get("/metrics", response_class=PlainTextResponse)
def metrics_text(request: Request, desk: AtDesk, _: Asker) -> Response:
    """For Prometheus."""
    found: Metrics = request.app.state.metrics
    return Response(found.text(desk), media_type=CONTENT_TYPE)


@restorations.post("/v1/restorations", status_code=202, response_model=Restoration, openapi_extra=_FORM)
async def submit(
    request: Request,
    response: Response,
    owner: Asker,
    desk: AtDesk,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    prefer: Annotated[str | None, Header(max_length=255)] = None,
) -> Restoration:
    """Takes a picture: it will be restored, whatever happens to the service, until it is deleted.

    `Prefer: wait=N` answers when it has ended, after N seconds at most; who leaves before that, cancels.
    """
    length = request.headers.get("content-length", "")
    job, is_new = await desk.submit(
        owner,
        request.stream(),
        content_type=request.headers.get("content-type"),
        content_length=int(length) if length.isdecimal() and length.isascii() else None,
        idempotency_key=idempotency_key,
        parse_options=parse_options,
    )
    until = time.monotonic() + _wait_s(prefer)
    while time.monotonic() < until and desk.progress(job.picture)[0].state not in (State.DONE, State.FAILED):
        if await request.is_disconnected():
            if is_new:
                await desk.leave(job)
            break
        await asyncio.sleep(EVENT_S)
    found = described(desk, job)
    response.headers["Location"] = found.links.self
    response.status_code = 200 if found.state in (State.DONE, State.FAILED) else 202
    return found


@restorations.get("/v1/restorations")
def listed(desk: AtDesk, owner: Asker) -> list[Restoration]:
    """The jobs of this key, the newest first; at most 100."""
    own = [job for job in list(desk.archive.jobs.values()) if job.owner == owner.name]
    newest = sorted(own, key=lambda job: -job.created)[:100]
    found: list[Restoration] = []
    for job in newest:
        with suppress(NotFound):  # deleted meanwhile
            found.append(described(desk, job))
    return found


@restorations.get("/v1/restorations/{job_id}")
def state(desk: AtDesk, job: ShownJob) -> Restoration:
    """How far a job is."""
    return described(desk, job)


async def watched(desk: AtDesk, job: ShownJob) -> AsyncIterator[Job]:
    with desk.watching(job):
        yield job


@restorations.get("/v1/restorations/{job_id}/events", response_class=EventSourceResponse)
async def events(desk: AtDesk, job: Annotated[Job, Depends(watched)]) -> AsyncIterator[ServerSentEvent]:
    """The same as it changes, until the job has ended."""
    before = None
    while job.id in desk.archive.jobs:
        now = described(desk, job)
        if now != before:
            before = now
            yield ServerSentEvent(data=now)
        if now.state in (State.DONE, State.FAILED):
            return
        await asyncio.sleep(EVENT_S)


@restorations.get("/v1/restorations/{job_id}/result", response_class=FileResponse)
async def result(
    request: Request, desk: AtDesk, job: ShownJob, format: Annotated[str, Query(max_length=16)] = "tiff"
) -> FileResponse:
    """The restored picture as a file: tiff, png, jpeg or ome-zarr (zipped). Ranges are answered."""
    if format not in RESULTS:
        raise BadRequest(f"format: {format!r} is none of {', '.join(RESULTS)}")
    found, failure = desk.progress(job.picture)
    if failure is not None:
        raise NotFound(f"0 files will be there, the picture has failed ({failure.code}): {failure.detail}")
    if found.state is not State.DONE:
        raise NotReady(f"the picture is {found.state}, {100 * found.share:.0f} % are done; ask again when it is done")
    path = exported(desk.folder(job), format)
    if not path.exists():
        export: Export = request.app.state.export
        async with desk.exporting(job, request.app.state.keys.named(job.owner)):
            path = await export(desk.folder(job), job.picture, format)
            await asyncio.to_thread(desk.archive.measure, job.picture)
    try:
        status = await asyncio.to_thread(path.stat)
    except FileNotFoundError:
        raise NotFound("the job was deleted") from None
    suffix, media_type = RESULTS[format]
    name = "".join(char for char in Path(job.name).stem if char.isalnum() or char in " ._-")[:80] or "picture"
    return FileResponse(path, media_type=media_type, filename=f"{name}-restored{suffix}", stat_result=status)


@restorations.delete("/v1/restorations/{job_id}", status_code=204)
async def delete(desk: AtDesk, job: OwnJob) -> None:
    """Ends a job and removes its picture, unless another job of this key is of the same."""
    await desk.delete(job)


def _wait_s(prefer: str | None) -> float:
    for part in (prefer or "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "wait":
            return min(MOST_WAIT_S, float(value)) if value.isdecimal() and value.isascii() else MOST_WAIT_S
    return 0.0
