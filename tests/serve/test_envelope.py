"""What holds for every request, around an application that does what it should not."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from engine.errors import BadRequest, StoreFull, TooManyRequests
from engine.serve import server
from engine.serve.envelope import Envelope
from engine.serve.metrics import Metrics
from engine.serve.pictures import DRAWN_AT_ONCE, Drawing
from engine.serve.problems import on_error


class Counted(Metrics):
    def __init__(self) -> None:
        self.statuses: list[int] = []

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.statuses.append(status)


def answer(app: Any, path: str = "/") -> tuple[list[Message], list[int]]:
    """What is sent for a GET, and what was counted."""
    sent: list[Message] = []
    metrics = Counted()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    try:
        asyncio.run(Envelope(app, metrics=metrics, hosts=())(scope, receive, send))
    except RuntimeError:
        sent.append({"type": "cut"})
    return sent, metrics.statuses


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("/home/somebody/secret.py")


async def fails_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("late")


def test_an_error_of_ours_is_told_with_its_request_and_nothing_else():
    (start, body), statuses = answer(fails)
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert (start["status"], statuses) == (500, [500])
    assert headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    told = json.loads(body["body"])
    assert (told["code"], told["status"]) == ("internal", 500)
    assert "secret" not in body["body"].decode()


def test_an_answer_that_breaks_off_is_cut():
    sent, statuses = answer(fails_late)
    assert [message["type"] for message in sent] == ["http.response.start", "cut"]
    assert statuses == [200]


@pytest.mark.parametrize(("path", "allowed"), [("/iiif/3/x", True), ("/v1/restorations", False)])
def test_viewers_elsewhere_may_read_what_is_wrong_with_a_picture(path, allowed):
    (start, _), _ = answer(fails, path)
    assert ((b"access-control-allow-origin", b"*") in start["headers"]) == allowed


@contextmanager
def serving(app: Any) -> Generator[int]:
    """The port of a server."""
    config = uvicorn.Config(app, port=0, http=server.PatientProtocol, lifespan="off", log_level="critical")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


@pytest.fixture
def refusing(monkeypatch):
    """A server that answers before it has read a body."""

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(server, "LINGERING_S", 1.0)
    with serving(refuses) as port:
        yield port


@pytest.mark.parametrize("pause_s", [None, 0.0, 0.2])
def test_an_answer_that_nobody_reads_is_cut(monkeypatch, pause_s):
    """One that is read slowly is not: what is sent at once takes it longer than a stalled client may take."""

    async def much(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    size = 24 << 20
    monkeypatch.setattr(server, "STALLED_S", 0.5)
    with serving(much) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(5)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5 if pause_s is None else 0)
        received = 0
        with suppress(ConnectionError):
            while received < size and (data := client.recv(2 << 20)):
                received += len(data)
                time.sleep(pause_s or 0)
    assert (received >= size) is (pause_s is not None)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [(TooManyRequests("wait", retry_after_s=3.2), "4"), (StoreFull("no room"), "60"), (BadRequest("no"), None)],
)
def test_what_will_pass_says_when_to_come_again(error, seconds):
    state = SimpleNamespace(desk=SimpleNamespace(archive=SimpleNamespace(root=Path("/store"))))
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    assert asyncio.run(on_error(request, error)).headers.get("Retry-After") == seconds


class Client:
    """A request whose client may leave."""

    def __init__(self, *, left: bool = False) -> None:
        self.left = left

    async def is_disconnected(self) -> bool:
        return self.left


def test_answers_are_drawn_for_who_still_waits_and_for_each_key_so_many(monkeypatch):
    monkeypatch.setattr("engine.serve.pictures.MOST_ASKED", DRAWN_AT_ONCE + 1)
    drawn: list[str] = []
    go_on = threading.Event()

    def draw(name: str) -> Callable[[], None]:
        return lambda: (go_on.wait(5), drawn.append(name))[1]

    async def run() -> None:
        drawing = Drawing()

        def asked(name: str, owner: str = "a", client: Any = None) -> Awaitable[None]:
            return asyncio.ensure_future(drawing.run(client or Client(), owner, draw(name)))

        first = [asked(str(number)) for number in range(DRAWN_AT_ONCE)]
        leaving = Client()
        left = asked("left", client=leaving)
        await asyncio.sleep(0.05)
        with pytest.raises(TooManyRequests, match=f"{DRAWN_AT_ONCE + 1} answers"):
            await drawing.run(Client(), "a", draw("too many"))  # type: ignore[arg-type]
        other = asked("of another key", owner="b")
        leaving.left = True
        go_on.set()
        await asyncio.gather(*first, other)
        with pytest.raises(BadRequest, match="has left"):
            await left
        await asked("again")

    asyncio.run(run())
    assert sorted(drawn) == [*map(str, range(DRAWN_AT_ONCE)), "again", "of another key"]


def test_a_refused_client_that_goes_on_to_send_is_hung_up_on(refusing):
    with socket.create_connection(("127.0.0.1", refusing)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert b" 401 " in client.recv(1000)
        started = time.monotonic()
        client.settimeout(5)
        client.sendall(b"a")  # which alone would keep the connection
        assert client.recv(1000) == b""
        assert time.monotonic() - started < 4


def test_one_that_has_sent_all_may_ask_again(refusing):
    with socket.create_connection(("127.0.0.1", refusing)) as client:
        for _ in range(3):
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
            assert b" 401 " in client.recv(1000)
            client.sendall(b"abc")
            time.sleep(0.6)  # together more than it lingers
