"""What holds for every request: an id, a line in the log, a measurement, and who may ask at all."""

import json
import logging
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.metrics import Metrics
from engine.serve.problems import MEDIA_TYPE, STATUS, problem

log = logging.getLogger("engine.serve")

_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": _POLICY,
}


class Envelope:
    """Middleware around all routes."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, hosts: tuple[str, ...]) -> None:
        self._app, self._metrics, self._hosts = app, metrics, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, started, status = uuid4().hex, time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = name
                headers["Server-Timing"] = f"app;dur={1000 * (time.perf_counter() - started):.1f}"  # to the first byte
                for key, value in _ALWAYS.items():
                    headers[key] = value
                if scope["path"].startswith("/iiif/"):  # errors, too: a viewer on another site may say what is wrong
                    headers["Access-Control-Allow-Origin"] = "*"
            await send(message)

        try:
            if (why := self._refusal(scope)) is not None:
                await _refuse("forbidden", why, sending)
            else:
                await self._app(scope, receive, sending)
        except Exception:
            log.exception("%s %s", name, getattr(scope.get("route"), "path", "unknown"))  # paths have tokens
            if status:  # half of the answer is on its way: the connection is cut
                raise
            await _refuse("internal", "an error of this program; report it with the request id", sending)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - started
            self._metrics.answered(route, status, seconds)
            log.info("%s %s %s %d %.1f ms", name, scope["method"], route, status, 1000 * seconds)

    def _refusal(self, scope: Scope) -> str | None:
        """Why a request that a foreign page has made a browser send is not answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            return "this service answers to 127.0.0.1 and localhost only; start it with --keys for other names"
        origin = headers.get("origin")
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin is not None and origin.partition("://")[2] != host:
            return "a page of another site may not change anything here"
        return None


async def _refuse(code: str, why: str, send: Send) -> None:
    body = json.dumps(problem(code, why)).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": STATUS[code], "headers": headers})
    await send({"type": "http.response.body", "body": body})
