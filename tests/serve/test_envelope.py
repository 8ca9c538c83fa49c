"""What holds for every request, around an application that does what it should not."""

import asyncio
import json
import socket
import threading
import time
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from engine.serve import server
from engine.serve.envelope import Envelope
from engine.serve.metrics import Metrics


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


@pytest.fixture
def refusing(monkeypatch):
    """A server that answers before it has read a body."""

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(server, "LINGERING_S", 1.0)
    config = uvicorn.Config(refuses, port=0, http=server.PatientProtocol, lifespan="off", log_level="critical")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


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
