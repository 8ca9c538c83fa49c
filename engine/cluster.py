# pyright: reportUnknownMemberType=false
"""The one way to Ray: a cluster of this process alone, or one that is there."""

import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager

import ray

from engine.errors import NoCluster

ANSWER_S = 10.0


@contextmanager
def ray_cluster(address: str | None, **local: object) -> Generator[None]:
    """A connection to the cluster at `address`, or to one that is started with the options `local` of `ray.init`.

    It ends with the block, and so does the cluster that was started. Raises NoCluster.
    """
    options = {"address": address} if address else {"address": "local", "include_dashboard": False, **local}
    try:
        if address:
            _check_answers(address)
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)  # pyright: ignore[reportArgumentType]
    except Exception as error:  # of many kinds, the last resort `Exception` itself
        where = address or "this machine"
        raise NoCluster(f"{where}: 0 clusters answer ({error}); look at its load, memory and address") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray would ask for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():  # "auto" is looked for on this machine
        socket.create_connection((host, int(port)), ANSWER_S).close()
