"""An S3-compatible server on loopback, behind a proxy that loses answers, is busy or slow where it is told to."""

import http.client
import logging
import re
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "archive"
ACTIONS = ("lose-answer", "lose-request", "busy", "busy-but-done", "deny", "delay")


@dataclass
class Fault:
    """What happens to the requests of one kind, as often as `times` says.

    lose-answer: carried out, then the connection is cut. lose-request: cut before. busy: 503 SlowDown. busy-but-done:
    carried out, then 503. deny: 403. delay: carried out after `seconds`.
    """

    action: str
    method: str
    key: str
    """A regular expression that is searched for in the path of the request."""
    times: int = 1
    skip: int = 0
    """So many such requests are let through first."""
    seconds: float = 0.0
    met: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.key, path):
            return False
        self.met += 1
        return self.skip < self.met <= self.skip + self.times


@dataclass
class Request:
    """One that came, and what the server behind the proxy said; 0 where it was not asked."""

    method: str
    path: str
    status: int


class Proxy:
    """The server's address, what happened, and what shall go wrong."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.faults: list[Fault] = []
        self.requests: list[Request] = []

    def fail(self, action: str, method: str, key: str, **options: Any) -> Fault:
        assert action in ACTIONS
        self.faults.append(Fault(action, method, key, **options))
        return self.faults[-1]

    def count(self, method: str, key: str) -> int:
        return sum(request.method == method and bool(re.search(key, request.path)) for request in self.requests)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to speak to it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }


@contextmanager
def s3_proxy() -> Generator[Proxy]:
    """A server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, moto_port = moto.get_host_and_port()
    one_at_a_time = threading.Lock()  # moto looks and writes in two steps; a conditional request is one

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, or each answer waits for an acknowledgement
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with one_at_a_time:
                hit = [fault for fault in proxy.faults if fault.strikes(self.command, self.path)]
            actions = {fault.action for fault in hit}
            seen = Request(self.command, self.path, 0)
            proxy.requests.append(seen)
            if "lose-request" in actions:
                self.close_connection = True
                return
            if "busy" in actions or "deny" in actions:
                self._answer(503 if "busy" in actions else 403, [], b"<Error><Code>SlowDown</Code></Error>")
                return
            time.sleep(sum(fault.seconds for fault in hit))
            with one_at_a_time:
                upstream = http.client.HTTPConnection("127.0.0.1", moto_port)
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                answer = upstream.getresponse()
                text, headers = answer.read(), answer.getheaders()
                upstream.close()
            seen.status = answer.status
            if "lose-answer" in actions:
                self.close_connection = True
                return
            if "busy-but-done" in actions:
                self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                return
            self._answer(answer.status, headers, text)

        def _answer(self, status: int, headers: list[tuple[str, str]], text: bytes) -> None:
            self.send_response_only(status)
            length = str(len(text))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value  # that of a HEAD is of what is not sent
                elif name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/{BUCKET}", method="PUT")).close()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        moto.stop()
