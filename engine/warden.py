"""The other side of `engine.isolate`: a server that forks a warden for each call, and the worker that it watches."""

import gc
import os
import pickle
import re
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import pyvips

from engine.memory import process_memory
from engine.processes import receive

REQUEST = struct.Struct("<QdQ")
"""Length of the pickle that follows, in bytes; `Limits.timeout_s`; `Limits.memory_bytes`."""
TRAILER = struct.Struct("<iB")
"""The worker's exit status, negative for the signal that ended it, and 1 where it was ended for the time, else 0."""

_OWN_ALARM_S = 2.0
"""The worker ends itself this long behind its time, in case that it has lost its warden."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|insufficient memory|no space for|unable to allocate|unable to create thread", re.IGNORECASE
)
"""What libvips, libjpeg, libtiff and glib say."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use."""

    timeout_s: float = 30.0
    """Wall clock, until the process has ended."""
    memory_bytes: int = 1 << 30
    """Private memory beyond that of the idle worker: twice what `engine.header` lets a decoder hold at once.

    Mapped files and libraries do not count, unlike for RLIMIT_AS, of which libvips and torch take gigabytes unused.
    """


def keep_standard_descriptors() -> None:
    """Opens the null device as each of 0, 1 and 2 that is closed: a socket of that number would be written over."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def serve(descriptor: int) -> None:
    """Forks a warden for each connection that comes through the control socket, until that is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no wardens left behind as zombies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # or the first collection of each child would copy every page
    with socket.socket(fileno=descriptor) as control:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            with socket.socket(fileno=descriptors[0]) as connection, suppress(OSError):  # too many processes: no reply
                if os.fork() == 0:
                    control.close()
                    _watch(connection)


def _watch(connection: socket.socket) -> NoReturn:
    """The warden: one worker from its start to its end."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        length, timeout_s, memory_bytes = cast(
            "tuple[int, float, int]", REQUEST.unpack(receive(connection, REQUEST.size))
        )
        body = receive(connection, length)
        alive, held = os.pipe()  # `held` is closed when the worker ends, however it ends
        worker = os.fork()
        if worker == 0:
            os.close(alive)
            _work(connection, body, Limits(timeout_s, memory_bytes))
        os.close(held)
        ready, _, _ = select.select([alive, connection], [], [], timeout_s)  # the connection: the caller has hung up
        if alive not in ready:
            os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
        connection.sendall(TRAILER.pack(os.waitstatus_to_exitcode(status), not ready))
    finally:
        os._exit(0)


def _work(connection: socket.socket, body: bytes, limits: Limits) -> NoReturn:
    """The worker: computes under its limits, and pickles what became of it."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)  # a hostile file shall not write on the user's terminal
        os.dup2(quiet, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + _OWN_ALARM_S)
        _limit_memory(limits.memory_bytes)
        connection.sendall(_answer(body))
    except BaseException:  # the caller has hung up, or there is no memory left to say so
        os._exit(1)
    os._exit(0)


def _answer(body: bytes) -> bytes:
    """Pickled: whether it succeeded, and the result or the exception."""
    try:
        function, arguments, keywords = cast(
            "tuple[Callable[..., Any], tuple[Any], dict[str, Any]]", pickle.loads(body)
        )
        return pickle.dumps((True, function(*arguments, **keywords)))
    except Exception as error:
        if _is_out_of_memory(error):
            return pickle.dumps((False, MemoryError()))
        with suppress(Exception):  # one that cannot be pickled, or not be read back
            reply = pickle.dumps((False, error))
            pickle.loads(reply)
            return reply
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, pyvips.Error) and _OUT_OF_MEMORY.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limit_memory(limit_bytes: int) -> None:
    """Linux counts private writable memory for RLIMIT_DATA; elsewhere nothing does, and there is no limit."""
    used = process_memory("VmData")
    if used is not None:
        with suppress(ValueError):  # the limit that is set already is stricter
            resource.setrlimit(resource.RLIMIT_DATA, (used + limit_bytes, used + limit_bytes))
