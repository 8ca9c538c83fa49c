"""Errors as a client of the endpoint sees them: RFC 9457 problem details, with the same codes as everywhere."""

from collections.abc import Mapping
from math import ceil

from fastapi import Request
from fastapi.responses import JSONResponse

from engine import errors
from engine.errors import Busy, EngineError, Unauthorized
from engine.serve.queue import Failure

MEDIA_TYPE = "application/problem+json"

STATUS: Mapping[str, int] = {
    kind.code: status
    for kind, status in (
        (errors.BadRequest, 400),
        (errors.Unauthorized, 401),
        (errors.NotFound, 404),
        (errors.SlowClient, 408),
        (errors.NotReady, 409),
        (errors.Conflict, 409),
        (errors.BodyTooLarge, 413),
        (errors.TooManyPixels, 413),
        (errors.OutputTooLarge, 413),
        (errors.UnsupportedInput, 415),
        (errors.DisguisedInput, 415),
        (errors.TooManyRequests, 429),
        (errors.QueueFull, 503),
        (errors.StorageError, 503),
        (errors.StorageReadOnly, 503),
        (errors.DecoderUnavailable, 503),
        (errors.StoreFull, 507),
        (errors.StorageFull, 507),
        (errors.NotEnoughDisk, 507),
    )
} | {"forbidden": 403, "method-not-allowed": 405, "internal": 500, "not-offered": 501}
"""What is not listed lies with the picture or what is asked of it: 422."""
_PASSING = (429, 503, 507)
FULL_S = 60.0
"""When it is worth to ask again where a disk is full or fails: it is swept as often."""


def problem(code: str, detail: str) -> dict[str, object]:
    """The body of an answer that tells of an error. `code` is stable: programs may match it."""
    return {
        "type": f"urn:cra-srgan-engine:problem:{code}",
        "title": code.replace("-", " "),
        "status": STATUS.get(code, 422),
        "code": code,
        "detail": detail,
    }


def problem_of(failure: Failure) -> dict[str, object]:
    return problem(failure.code, failure.detail)


def response(code: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    body = problem(code, detail)
    return JSONResponse(body, STATUS.get(code, 422), headers=dict(headers or {}), media_type=MEDIA_TYPE)


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """For FastAPI: any EngineError. Where the store lies is nobody's business."""
    assert isinstance(error, EngineError)
    root = request.app.state.desk.archive.root
    text = str(error).replace(f"{root}/", "").replace(str(root), "the store")
    headers: dict[str, str] = {}
    if STATUS.get(error.code, 422) in _PASSING:
        after_s = error.retry_after_s if isinstance(error, Busy) else FULL_S
        headers["Retry-After"] = str(max(1, ceil(after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return response(error.code, text, headers)
