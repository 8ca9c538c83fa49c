"""Whose death counts against a picture."""

import socket

import pytest

from engine.batch.attempts import Attempts


@pytest.fixture
def answering():
    """Where a node listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[:2]


def test_deaths_count_on_nodes_that_live_and_answer(tmp_path, answering):
    attempts = Attempts(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        lost = closed.getsockname()
    for node in ("here", "there", "lost a moment ago", "lost long ago"):
        attempts.begin("scan", node=node)
    living = {"here": lost, "there": answering, "lost a moment ago": lost}
    assert attempts.deaths("scan", node="here", living=living) == 2
    assert attempts.deaths("scan", node="there", living={}) == 1
    assert attempts.deaths("another", node="here", living=living) == 0
    attempts.end("scan")
    assert attempts.deaths("scan", node="here", living=living) == 0
    attempts.begin("scan", node="here")
    attempts.forget()  # another driver begins
    assert attempts.deaths("scan", node="here", living=living) == 0
