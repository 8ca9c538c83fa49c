"""What the servers that fork processes share: how they are started, and how whole messages are read."""

import os
import socket
import sys


def python(program: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment in which a program of this package runs, with one thread.

    Safe path: what lies in the working folder is not the program's. One thread: a fork would lose the others.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-P", "-c", program], environment


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes. Raises ConnectionError where the other end hangs up before."""
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("the other end has hung up")
        parts += part
    return bytes(parts)
