"""Processes that are born with the network's libraries loaded: in milliseconds, where starting takes seconds of a core.

On each machine a server loads them once and forks a child for each connection to its socket. A child does what it is
asked, one thing after another. It ends at once where its other end hangs up, whatever it is at; and who has asked sees
when it has died. The server ends itself when it has had no children for a while.
"""

import fcntl
import gc
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

from engine.errors import StorageError
from engine.processes import python, receive
from engine.store import FileLock, storage_errors

IDLE_S = 30.0
STARTING_S = 300.0
"""What a busy machine may take to load the libraries."""
at_end: list[Callable[[], None]] = []
"""What a child does when its other end hangs up while it waits."""

_LOADED = "engine.batch.tiles"
_OWN = ("CUDA_VISIBLE_DEVICES",)
"""Variables that a child has from the process that it works for: Ray gives each its GPUs."""
_LENGTH = struct.Struct("<Q")


class LostChildError(Exception):
    """A child has ended before it answered."""


class Child:
    """A process of its own, at work for this one alone."""

    def __init__(self, folder: Path) -> None:
        """Born by the server of `folder`, which is started where there is none. Raises StorageError."""
        self._connection = _connected(folder)
        self.ask("os:environ.update", {name: os.environ[name] for name in _OWN if name in os.environ})

    def ask(self, function: str, *arguments: object, timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """What `module:function` says there. Raises LostChildError, TimeoutError, and what the function raises."""
        body = pickle.dumps((function, arguments))
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
            succeeded, value = pickle.loads(_received(self._connection))
        except TimeoutError:
            raise
        except OSError as error:
            raise LostChildError(str(error)) from error
        if succeeded:
            return value
        raise value

    def close(self) -> None:
        """Ends the child, whatever it is at."""
        self._connection.close()


def folder_of(node: str) -> Path:
    """Where the server of a node of a cluster has its socket; whoever may write there has its children do anything."""
    folder = Path(tempfile.gettempdir(), f"engine-{node[:24]}")
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"{folder}: belongs to 1 other user, or is open to others; remove it")
    return folder


def _connected(folder: Path) -> socket.socket:
    until = time.monotonic() + STARTING_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / "socket"))
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > until:
                raise StorageError(
                    f"{folder}: no process answers there after {STARTING_S:g} s ({error}); look at the machine's memory"
                ) from error
        _start(folder)
        time.sleep(0.05)


def _start(folder: Path) -> None:
    """Starts the server, unless one is starting or there."""
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)  # a server that ends removes it
    lock = FileLock.try_take(folder / "lock")
    if lock is None:
        return
    lock.release()
    command, environment = python(f"from engine.batch import nursery; nursery.serve({str(folder)!r})")
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, check=True)


def serve(name: str) -> None:
    """Leaves its parent, and is the server of a folder, where there is no other one."""
    if os.fork():
        os._exit(0)  # Ray ends the children of its processes with these
    folder = Path(name)
    lock = FileLock.try_take(folder / "lock")
    if lock is None:
        return
    __import__(_LOADED)
    from engine.isolate import ready

    ready()
    with socket.socket(socket.AF_UNIX) as listener, suppress(KeyboardInterrupt):
        (folder / "socket").unlink(missing_ok=True)
        listener.bind(str(folder / "socket"))
        listener.listen(128)
        gc.collect()
        gc.freeze()  # or the first collection of each child would copy every page
        _bear(listener)
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _bear(listener: socket.socket) -> None:
    """Forks a child for each connection, until nobody has wanted one for long."""
    children: set[int] = set()
    wanted = time.monotonic()
    while children or time.monotonic() - wanted < IDLE_S:
        ready, _, _ = select.select([listener], [], [], 1.0)
        if ready:
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # too many processes: no child, the other end sees that
                child = os.fork()
                if child == 0:
                    listener.close()
                    _live(connection)
                children.add(child)
        children -= {child for child in children if _has_ended(child)}
        wanted = time.monotonic() if children else wanted


def _has_ended(child: int) -> bool:
    """Whether a child is dead. One that somebody has stopped is killed: it would hold up who waits for it."""
    pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
    if pid and os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        return False
    return pid != 0


def _live(connection: socket.socket) -> NoReturn:
    """The child, from birth to death."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the driver, which then hangs up
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        while True:
            name, arguments = cast("tuple[str, tuple[object, ...]]", pickle.loads(_received(connection)))
            _end_with(connection, is_wanted=True)
            try:
                answer = pickle.dumps((True, cast("Callable[..., object]", resolve_name(name))(*arguments)))
            except Exception as error:
                answer = pickle.dumps((False, error))
            _end_with(connection, is_wanted=False)
            connection.sendall(_LENGTH.pack(len(answer)) + answer)
    except ConnectionError:
        for act in at_end:
            act()
        os._exit(0)
    except BaseException:
        os._exit(1)


def _end_with(connection: socket.socket, *, is_wanted: bool) -> None:
    """While this is wanted, a hang-up sends SIGIO, which ends the process: even a loop in C cannot hold it up."""
    flags = fcntl.fcntl(connection, fcntl.F_GETFL)
    fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC if is_wanted else flags & ~os.O_ASYNC)
    if is_wanted and select.select([connection], [], [], 0)[0]:  # it has come before
        os._exit(0)


def _received(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive(connection, _LENGTH.size))
    return receive(connection, length)
