"""IIIF: the Image API 3.0 of each layer of a picture, and a Presentation 3.0 manifest of all of them."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from engine.errors import BadRequest, NotFound, NotReady, StorageError, TooManyRequests
from engine.geometry import Size
from engine.serve import iiif, problems, view
from engine.serve.archive import Job
from engine.serve.asker import desk_of, identified
from engine.serve.gallery import DIFFERENCE, RESTORED
from engine.serve.manifest import manifest
from engine.serve.told import REFUSED, described

_YEAR_S, _SOON_S = 31_536_000, 60
DRAWN_AT_ONCE = 4
"""Each may hold `engine.serve.view.MOST_READ_PX` pixels."""
MOST_ASKED = 256
"""Of each owner, waiting or drawn."""
P = ParamSpec("P")
T = TypeVar("T")


class Drawing:
    """The few threads that draw answers: removals and uploads, which wait for the disk, have others."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(DRAWN_AT_ONCE, thread_name_prefix="drawing")
        self._turn = asyncio.Semaphore(DRAWN_AT_ONCE)
        self._asked: Counter[str] = Counter()

    async def run(self, request: Request, owner: str, call: Callable[[], T]) -> T:
        """What a call for an owner's picture returns. Raises TooManyRequests, and BadRequest where nobody waits."""
        if self._asked[owner] >= MOST_ASKED:
            raise TooManyRequests(
                f"{self._asked[owner]} answers for pictures of this key are to be drawn, the most at once; wait",
                retry_after_s=1.0,
            )
        self._asked[owner] += 1
        try:
            async with self._turn:
                if await request.is_disconnected():
                    raise BadRequest("the client has left")
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self._asked[owner] -= 1


pictures = APIRouter(prefix="/iiif", responses=REFUSED)
_JSON_LD = 'application/ld+json;profile="http://iiif.io/api/image/3/context.json"'
_LEVEL = '<http://iiif.io/api/image/3/level2.json>;rel="profile"'


@pictures.head("/manifest/{identifier}", include_in_schema=False)
@pictures.get("/manifest/{identifier}")
def presented(request: Request, identifier: str) -> JSONResponse:
    """The Presentation API 3.0 manifest."""
    job, _ = identified(request, identifier, 0)
    found = described(desk_of(request), job)
    base = _base(request)
    body = manifest(
        f"{base}/iiif/manifest/{identifier}",
        name=job.name,
        size=Size(found.height, found.width),
        layers=list(found.links.iiif),
        image=lambda layer: base + found.links.iiif[layer],
    )
    kind = 'application/ld+json;profile="http://iiif.io/api/presentation/3/context.json"'
    return JSONResponse(body, media_type=kind)


@pictures.head("/3/{identifier}", include_in_schema=False)
@pictures.get("/3/{identifier}")
def base_address(request: Request, identifier: str) -> RedirectResponse:
    """To info.json."""
    identified(request, identifier, 1)
    return RedirectResponse(f"/iiif/3/{identifier}/info.json", 303)


@pictures.head("/3/{identifier}/info.json", include_in_schema=False)
@pictures.get("/3/{identifier}/info.json")
async def information(request: Request, identifier: str) -> JSONResponse:
    """What a viewer must know of a picture."""
    job, (layer,) = identified(request, identifier, 1)
    found = await _view(request, job, layer)
    address = f"{_base(request)}/iiif/3/{identifier}"
    body = iiif.image_information(address, found.level_sizes[0], found.level_sizes)
    plain = "application/json" in request.headers.get("accept", "")
    kind = "application/json" if plain else _JSON_LD
    return JSONResponse(body, headers={"Link": _LEVEL, "Vary": "Accept"}, media_type=kind)


@pictures.head("/3/{identifier}/{region}/{size}/{rotation}/{quality_format}", include_in_schema=False)
@pictures.get("/3/{identifier}/{region}/{size}/{rotation}/{quality_format}", response_class=Response)
async def image(
    request: Request, identifier: str, region: str, size: str, rotation: str, quality_format: str
) -> Response:
    """A part of a picture. What is not restored yet is shown as far as it is known, and not to be kept."""
    job, (layer,) = identified(request, identifier, 1)
    path = f"{region}/{size}/{rotation}/{quality_format}"
    try:
        found = await _view(request, job, layer)
    except NotReady:  # not begun: what will be drawn first
        if layer in (RESTORED, DIFFERENCE):
            picture = desk_of(request).archive.pictures.get(job.picture)
            if picture is None:
                raise NotFound("the picture was dropped") from None
            with suppress(iiif.BadRequestError, iiif.NotOfferedError):
                desk_of(request).look(job, iiif.parse(path, picture.output).region, level=0)
        raise
    full = found.level_sizes[0]
    try:
        asked = iiif.parse(path, full)
    except iiif.BadRequestError as error:
        raise BadRequest(str(error)) from None
    except iiif.NotOfferedError as error:
        return problems.response("not-offered", str(error))
    canonical = iiif.canonical(asked, full)
    tag = f'"{hashlib.sha256(f"{job.picture} {layer} {canonical}".encode()).hexdigest()[:32]}"'
    address = f"{_base(request)}/iiif/3/{identifier}/{canonical}"
    headers = {"Link": f'{_LEVEL}, <{address}>;rel="canonical"'}
    for_good = {"ETag": tag, "Cache-Control": f"private, max-age={_YEAR_S}, immutable"}
    known = (one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(","))
    if view.is_for_good(found) and {tag, "*"}.intersection(known):
        return Response(status_code=304, headers=headers | for_good)
    archive, gallery, folder = desk_of(request).archive, desk_of(request).gallery, desk_of(request).folder(job)
    data, final = gallery.answer(folder, tag), True
    if data is None:
        try:
            data, final = await _drawing(request, job, drawn, found, asked)
        except StorageError:  # published, or dropped, since it was opened
            gallery.forget(folder)
            found = await _view(request, job, layer)
            data, final = await _drawing(request, job, drawn, found, asked)
        if view.is_for_good(found) and job.picture in archive.pictures:  # not dropped meanwhile
            gallery.keep_answer(folder, tag, data)
    if view.is_for_good(found):
        headers |= for_good
    elif final:
        headers["Cache-Control"] = f"private, max-age={_SOON_S}"
    else:
        headers["Cache-Control"] = "no-store"
        if layer in (RESTORED, DIFFERENCE):
            desk_of(request).look(job, asked.region, level=0)
    return Response(data, headers=headers, media_type=iiif.FORMATS[asked.fmt])


@pictures.api_route("/{path:path}", methods=["GET", "HEAD", "OPTIONS"], include_in_schema=False)
def preflight(request: Request) -> Response:
    """What a page of another site may ask; there is nothing else here. Raises NotFound."""
    if request.method != "OPTIONS":
        raise NotFound("0 pictures have this address")
    allowed = {"Access-Control-Allow-Methods": "GET, HEAD", "Access-Control-Allow-Headers": "*"}
    return Response(status_code=204, headers=allowed)


def drawn(found: view.View, asked: iiif.ImageRequest) -> tuple[bytes, bool]:
    """The file that answers a request, and whether it is final."""
    pixels, final = view.shown(found, asked)
    return view.encode(pixels, asked), final


def _base(request: Request) -> str:
    """The address of the service, as the client calls it."""
    return str(request.base_url).rstrip("/")


async def _view(request: Request, job: Job, layer: str) -> view.View:
    """Raises NotReady for what is to come, NotFound for what will never be there."""
    desk = desk_of(request)
    folder = desk.folder(job)
    found = desk.gallery.opened(folder, layer)
    if isinstance(found, view.Stored):
        return found
    try:
        return await _drawing(request, job, desk.gallery.view, folder, layer)
    except NotReady:
        if layer not in described(desk, job).links.iiif or desk.progress(job.picture)[1] is not None:
            raise NotFound(f"0 pixels of {layer!r} will be there: it was not sent, or the picture has failed") from None
        raise


async def _drawing(request: Request, job: Job, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    drawing: Drawing = request.app.state.drawing
    return await drawing.run(request, job.owner, partial(function, *arguments, **named))
