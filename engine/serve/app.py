"""The endpoint's interface: which addresses there are, and what they answer. See the generated `/openapi.json`."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from engine import __version__
from engine.errors import BadRequest, EngineError, NotFound, NotReady, StorageError
from engine.serve import iiif, problems, view
from engine.serve.archive import Job
from engine.serve.desk import Desk
from engine.serve.envelope import Envelope
from engine.serve.gallery import DIFFERENCE, LAYERS, MASK, RESTORED
from engine.serve.keys import Keys, Owner
from engine.serve.manifest import manifest
from engine.serve.metrics import CONTENT_TYPE, Metrics
from engine.serve.queue import State
from engine.serve.schema import OptionsIn, Problem, Restoration, parse_options

DRAWN_AT_ONCE = 4
"""Answers to IIIF requests: each may hold `engine.serve.view.MOST_READ_PX` pixels."""
MOST_WAIT_S = 60.0
EVENT_S = 0.25
RESULTS: Mapping[str, tuple[str, str]] = {
    "tiff": (".tif", "image/tiff"),
    "png": (".png", "image/png"),
    "jpeg": (".jpg", "image/jpeg"),
    "ome-zarr": (".ozx", "application/zip"),
}
_YEAR_S = 31_536_000
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
_REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "Refused; `code` says why.", "content": {problems.MEDIA_TYPE: {}}},
    "5XX": {"model": Problem, "description": "Not now; `code` says why.", "content": {problems.MEDIA_TYPE: {}}},
}

Export = Callable[[Path, str, str], Awaitable[Path]]
"""The file of a finished picture (its folder, its name) in a format."""


def make_app(desk: Desk, keys: Keys, export: Export, *, hosts: tuple[str, ...] = ()) -> FastAPI:
    """The application. `hosts`: the only names that it answers to; any, where it has none."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        following = asyncio.create_task(desk.follow())
        yield
        following.cancel()

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
            Exception: _on_bug,
        },
    )
    app.add_middleware(Envelope, metrics=metrics, hosts=hosts)
    app.state.desk, app.state.keys, app.state.export, app.state.metrics = desk, keys, export, metrics
    app.state.drawing = asyncio.Semaphore(DRAWN_AT_ONCE)
    app.include_router(public)
    app.include_router(restorations)
    app.include_router(pictures)
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


async def _on_bug(_: Request, __: Exception) -> JSONResponse:
    body = problems.problem("internal", "an error of this program; report it with the request id") | {"status": 500}
    return JSONResponse(body, 500, media_type=problems.MEDIA_TYPE)


# Who asks.


def desk_of(request: Request) -> Desk:
    return request.app.state.desk


def owner_of(request: Request) -> Owner:
    """Whose key a request carries. Raises Unauthorized, before a byte of the body is read."""
    keys: Keys = request.app.state.keys
    return keys.owner(request.headers.get("authorization"))


AtDesk = Annotated[Desk, Depends(desk_of)]
Asker = Annotated[Owner, Depends(owner_of)]


def own_job(job_id: str, desk: AtDesk, owner: Asker) -> Job:
    return desk.job(job_id, owner)


def shown_job(request: Request, job_id: str, desk: AtDesk, token: Annotated[str, Query(max_length=64)] = "") -> Job:
    """A job that the caller may look at: with its key, or with the token that is in its addresses."""
    if token and desk.is_token(job_id, token):
        return desk.job(job_id, None)
    return desk.job(job_id, owner_of(request))


OwnJob = Annotated[Job, Depends(own_job)]
ShownJob = Annotated[Job, Depends(shown_job)]

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

restorations = APIRouter(responses=_REFUSED)


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
                await desk.delete(job)
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
    return [described(desk, job) for job in sorted(own, key=lambda job: -job.created)[:100]]


@restorations.get("/v1/restorations/{job_id}")
def state(desk: AtDesk, job: ShownJob) -> Restoration:
    """How far a job is."""
    return described(desk, job)


@restorations.get("/v1/restorations/{job_id}/events", response_class=EventSourceResponse)
async def events(desk: AtDesk, job: ShownJob) -> AsyncIterator[ServerSentEvent]:
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
    found, _ = desk.progress(job.picture)
    if found.state is not State.DONE:
        raise NotReady(f"the picture is {found.state}, {100 * found.share:.0f} % are done; ask again when it is done")
    export: Export = request.app.state.export
    path = await export(desk.folder(job), job.picture, format)
    suffix, media_type = RESULTS[format]
    name = "".join(char for char in Path(job.name).stem if char.isalnum() or char in " ._-")[:80] or "picture"
    return FileResponse(path, media_type=media_type, filename=f"{name}-restored{suffix}")


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


def described(desk: Desk, job: Job) -> Restoration:
    """A job as clients see it."""
    found, failure = desk.progress(job.picture)
    picture = desk.archive.pictures.get(job.picture)
    if picture is None:
        raise NotFound("the job was deleted")
    token = desk.token(job.id)
    layers = [layer for layer in LAYERS if layer != MASK or picture.mask is not None]
    here = f"/v1/restorations/{job.id}"
    return Restoration.model_validate(
        {
            "id": job.id,
            "name": job.name,
            "state": found.state.value,
            "progress": round(found.share, 4),
            "megapixels": round(picture.megapixels, 3),
            "queue_position": found.position,
            "seconds_left": None if found.seconds_left is None else round(found.seconds_left, 1),
            "width": picture.output.w,
            "height": picture.output.h,
            "created": datetime.fromtimestamp(job.created, UTC).isoformat(timespec="seconds"),
            "problem": None if failure is None else problems.problem_of(failure),
            "links": {
                "self": here,
                "events": f"{here}/events?token={token}",
                "view": f"/#{job.id}.{token}",
                "manifest": f"/iiif/manifest/{job.id}~{token}",
                "iiif": {layer: f"/iiif/3/{job.id}~{layer}~{token}" for layer in layers},
                "result": {name: f"{here}/result?format={name}&token={token}" for name in RESULTS},
            },
        }
    )


# IIIF.

pictures = APIRouter(prefix="/iiif", responses=_REFUSED)
_CORS = {"Access-Control-Allow-Origin": "*"}
_JSON_LD = 'application/ld+json;profile="http://iiif.io/api/image/3/context.json"'
_LEVEL = '<http://iiif.io/api/image/3/level2.json>;rel="profile"'


def _identified(request: Request, identifier: str, parts: int) -> tuple[Job, list[str]]:
    """The job of `id~...~token` or `id~...`, and what is between. Raises Unauthorized and NotFound."""
    desk = desk_of(request)
    job_id, *rest = identifier.split("~")
    if len(rest) == parts + 1 and desk.is_token(job_id, rest[-1]):
        return desk.job(job_id, None), rest[:-1]
    owner = owner_of(request)
    if len(rest) != parts:
        raise NotFound("0 pictures of this key have this identifier")
    return desk.job(job_id, owner), rest


@pictures.get("/manifest/{identifier}")
def presented(request: Request, identifier: str) -> JSONResponse:
    """The Presentation API 3.0 manifest."""
    job, _ = _identified(request, identifier, 0)
    found = described(desk_of(request), job)
    base = str(request.base_url).rstrip("/")
    body = manifest(
        f"{base}/iiif/manifest/{identifier}",
        name=job.name,
        size=desk_of(request).archive.pictures[job.picture].output,
        layers=list(found.links.iiif),
        image=lambda layer: base + found.links.iiif[layer],
    )
    kind = 'application/ld+json;profile="http://iiif.io/api/presentation/3/context.json"'
    return JSONResponse(body, headers=_CORS, media_type=kind)


@pictures.get("/3/{identifier}")
def base_address(request: Request, identifier: str) -> RedirectResponse:
    """To info.json."""
    _identified(request, identifier, 1)
    return RedirectResponse(f"/iiif/3/{identifier}/info.json", 303, headers=_CORS)


@pictures.get("/3/{identifier}/info.json")
async def information(request: Request, identifier: str) -> JSONResponse:
    """What a viewer must know of a picture."""
    job, (layer,) = _identified(request, identifier, 1)
    found = await _view(request, job, layer)
    address = f"{str(request.base_url).rstrip('/')}/iiif/3/{identifier}"
    body = iiif.image_information(address, found.level_sizes[0], found.level_sizes)
    plain = "application/json" in request.headers.get("accept", "")
    kind = "application/json" if plain else _JSON_LD
    return JSONResponse(body, headers={**_CORS, "Link": _LEVEL, "Vary": "Accept"}, media_type=kind)


@pictures.get("/3/{identifier}/{region}/{size}/{rotation}/{quality_format}", response_class=Response)
async def image(
    request: Request, identifier: str, region: str, size: str, rotation: str, quality_format: str
) -> Response:
    """A part of a picture. What is not restored yet is shown as far as it is known, and not to be kept."""
    job, (layer,) = _identified(request, identifier, 1)
    found = await _view(request, job, layer)
    full = found.level_sizes[0]
    try:
        asked = iiif.parse(f"{region}/{size}/{rotation}/{quality_format}", full)
    except iiif.BadRequestError as error:
        raise BadRequest(str(error)) from None
    except iiif.NotOfferedError as error:
        body = problems.problem("not-offered", str(error)) | {"status": 501}
        return JSONResponse(body, 501, headers=_CORS, media_type=problems.MEDIA_TYPE)
    canonical = iiif.canonical(asked, full)
    tag = f'"{hashlib.sha256(f"{job.picture} {layer} {canonical}".encode()).hexdigest()[:32]}"'
    address = f"{str(request.base_url).rstrip('/')}/iiif/3/{identifier}/{canonical}"
    headers = {**_CORS, "Link": f'{_LEVEL}, <{address}>;rel="canonical"'}
    if isinstance(found, view.Stored) and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**headers, "ETag": tag})
    async with request.app.state.drawing:
        try:
            data, final = await asyncio.to_thread(drawn, found, asked)
        except StorageError:  # published, or dropped, since it was opened
            desk_of(request).gallery.forget(desk_of(request).folder(job))
            data, final = await asyncio.to_thread(drawn, await _view(request, job, layer), asked)
    if final:
        headers |= {"ETag": tag, "Cache-Control": f"private, max-age={_YEAR_S}, immutable"}
    else:
        headers["Cache-Control"] = "no-store"
        if layer in (RESTORED, DIFFERENCE):
            desk_of(request).look(job, asked.region, level=0)
    return Response(data, headers=headers, media_type=iiif.FORMATS[asked.fmt])


def drawn(found: view.View, asked: iiif.ImageRequest) -> tuple[bytes, bool]:
    """The file that answers a request, and whether it is final."""
    pixels, final = view.shown(found, asked)
    return view.encode(pixels, asked), final


async def _view(request: Request, job: Job, layer: str) -> view.View:
    desk = desk_of(request)
    return await asyncio.to_thread(desk.gallery.view, desk.folder(job), layer)
