"""Runs the endpoint: uvicorn in front, Ray Serve behind (see docs/decisions)."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import h11
import uvicorn
from ray.exceptions import RayActorError, RayTaskError
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import EngineError, NotReady, PlanError
from engine.memory import keep_freed_memory, return_freed_memory_for_ever, share_one_heap
from engine.models.card import find, for_degradation, read_card
from engine.serve.app import Export, make_app
from engine.serve.archive import Archive
from engine.serve.cluster import Service, running
from engine.serve.desk import Desk, Limits
from engine.serve.gallery import OVERVIEW
from engine.serve.keys import Keys

HEADERS_S = 10.0
"""A client may take so long to send the headers of a request."""
MOST_HEADER_BYTES = 32 << 10
LINGERING_S = 10.0
"""So long a refused client may go on to send what it is at; then it has read the answer."""
PAUSE_S = 0.01
"""Between the pieces of what it sends."""
STALLED_S = 30.0
"""A client may read nothing for so long; then its connection is cut."""
MOST_CONNECTIONS = 800
DRAINING_S = 20
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class PatientProtocol(H11Protocol):
    """Closes connections whose headers do not come to an end, whose bodies nobody waits for any more, or whose answers
    are not read."""

    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._lingering is not None:
            if self.conn.their_state is h11.SEND_BODY:  # thrown away, and no faster than others can be answered
                self.flow.pause_reading()
                self.loop.call_later(PAUSE_S, self.flow.resume_reading)
            else:
                self._lingering.cancel()
                self._lingering = None
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self._lingering is None:
            self._lingering = self.loop.call_later(LINGERING_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def _wait_for_reader(self, before: int | None = None) -> None:
        left = self.transport.get_write_buffer_size()
        if left == before:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(STALLED_S, self._wait_for_reader, left)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_on()

    def _read_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._read_on()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADERS_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        body = b"the headers took too long"
        self.transport.write(
            b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()


def serve(
    store: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys_file: Path | None = None,
    limits: Limits | None = None,
    replicas: tuple[int, int] = (1, 2),
    model: str | None = None,
    told: Callable[[str], None] = print,
) -> None:
    """Runs until it is told to end; `told` is given its address when it has started.

    Raises PlanError where others could reach it and it has no keys.
    """
    keys = Keys() if keys_file is None else Keys.read(keys_file)
    if host not in LOOPBACK and not keys.owners:
        raise PlanError(f"{host}: 0 keys protect a service that others reach; give --keys FILE, or leave out --host")
    card = read_card(find(model or for_degradation("clean")))
    keep_freed_memory()  # tiles are as large as each other
    share_one_heap()
    return_freed_memory_for_ever()
    archive = Archive.open(store.resolve())
    for picture in archive.unfinished():  # shown again once it is begun again: the model may be another one
        (archive.folder(picture.id) / OVERVIEW).unlink(missing_ok=True)
    try:
        with running(archive.root, replicas=replicas, model=model) as service:
            desk = Desk(archive, service.scheduler, limits or Limits(), model_sha256=card.sha256)
            app = make_app(desk, keys, exporter(service), hosts=() if keys.owners else LOOPBACK)
            config = uvicorn.Config(
                app,
                host=host,
                port=port,
                http=PatientProtocol,
                ws="none",
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=DRAINING_S,
                server_header=False,
                access_log=False,
                log_level="warning",
            )
            told(f"http://{host}:{port}/")
            uvicorn.Server(config).run()
    finally:
        archive.close()


def exporter(service: Service) -> Export:
    """Exports by one of the replicas."""

    async def export(folder: Path, picture: str, fmt: str) -> Path:
        try:
            return Path(cast("str", await service.replicas.export.remote(picture, fmt)))
        except RayActorError:  # not needed any more, or killed
            raise NotReady("1 process has ended while it made this file; ask again") from None
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, EngineError):
                raise type(cause)(str(cause).replace(f"{folder}/", "")) from None
            raise

    return export
