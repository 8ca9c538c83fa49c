"""Processes that are born with the network's libraries loaded: in milliseconds, where starting takes seconds of a core.

On each machine a server loads them once and forks a child for each connection to its socket. A child does what it is
asked, one thing after another; who has asked sees when it has died. Where its other end hangs up, a child ends: at once
when it waits, within half a second when it is at work. One with a name goes on with its work for a while, and belongs
to the next that asks for this name: what has killed its owner costs no drawing. The server ends itself when it has had
no children for long.
"""

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
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

from engine.errors import StorageError
from engine.processes import python, receive
from engine.store import FileLock, storage_errors

IDLE_S = 30.0
STARTING_S = 300.0
"""What a busy machine may take to load the libraries."""
ADOPTION_S = 10.0
"""How long a child with a name, at work, outlives its owner: Ray starts an actor again in 3 to 5 seconds."""
GRACE_S = 0.5
"""The same without a name: until then, one that waits has tidied up."""
at_end: list[Callable[[], None]] = []
"""What a child does when its other end hangs up while it waits."""

_LOADED = "engine.batch.tiles"
_OWN = ("CUDA_VISIBLE_DEVICES",)
"""Variables that a child has from the process that it works for: Ray gives each its GPUs."""
_LENGTH = struct.Struct("<Q")
_NAMELESS = pickle.dumps(None)


class LostChildError(Exception):
    """A child has ended before it answered."""


@contextmanager
def _or_lost() -> Generator[None]:
    """A hang-up is the child's death; that it takes too long is not."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        raise LostChildError(str(error)) from error


class Child:
    """A process of its own, at work for this one alone."""

    def __init__(self, folder: Path, name: str = "") -> None:
        """The orphan of this name, or born by the server of `folder`, which is started where there is none.

        Raises StorageError, LostChildError.
        """
        own = {variable: os.environ[variable] for variable in _OWN if variable in os.environ}
        told = pickle.dumps((name, sorted(own.items())) if name else None)  # one keeps its GPU
        self._connection = _connected(folder)
        try:
            with _or_lost():
                _send(self._connection, told)
            self.ask("os:environ.update", own)
        except BaseException:
            self.close()
            raise

    def ask(self, function: str, *arguments: object, timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """What `module:function` says there. Raises LostChildError, TimeoutError, and what the function raises."""
        self._connection.settimeout(timeout_s)
        with _or_lost():
            _send(self._connection, pickle.dumps((function, arguments)))
            succeeded, value = pickle.loads(_received(self._connection))
        if succeeded:
            return value
        raise value

    def close(self) -> None:
        """Hangs up, which ends the child: one without a name soon, whatever it is at."""
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
    subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ray ends the process group of each of its processes with it
        check=True,
    )


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
        _bear(listener, lock)
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


@dataclass(slots=True)
class _Ward:
    """A child, as its server sees it."""

    pid: int
    name: bytes
    owner: socket.socket
    """The child's end of the connection once more: it shows when the other end hangs up."""
    line: socket.socket
    """Hands the child its next connection; hangs up when the child has ended."""
    orphaned_s: float | None = None
    """Since when, on the clock of `time.monotonic`."""

    @property
    def is_wanted(self) -> bool:
        """Whether it has an owner, or may still find one."""
        patience_s = GRACE_S if self.name == _NAMELESS else ADOPTION_S
        return self.orphaned_s is None or time.monotonic() - self.orphaned_s < patience_s

    def let_go(self) -> None:
        """Closes what this process holds of it."""
        self.owner.close()
        self.line.close()


def _bear(listener: socket.socket, lock: FileLock) -> None:
    """Forks a child for each connection, until nobody has wanted one for long."""
    wards: list[_Ward] = []
    wanted = time.monotonic()
    while wards or time.monotonic() - wanted < IDLE_S:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        for ward in wards:
            poll.register(ward.line, 0)  # hang-ups alone
            if ward.orphaned_s is None:
                poll.register(ward.owner, 0)
        ready = {number for number, _ in poll.poll(100 if any(ward.orphaned_s for ward in wards) else 1000)}
        for ward in wards:
            if ward.orphaned_s is None and ward.owner.fileno() in ready:
                ward.orphaned_s = time.monotonic()
            if not ward.is_wanted:
                os.kill(ward.pid, signal.SIGKILL)  # even a loop in C cannot hold it up
        for ward in [ward for ward in wards if _has_ended(ward.pid)]:
            ward.let_go()
            wards.remove(ward)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # too many processes: no child, the other end sees that
                connection.settimeout(GRACE_S)
                name = _received(connection)
                connection.settimeout(None)
                _give(name, connection, wards, listener, lock)
        wanted = time.monotonic() if wards else wanted


def _give(name: bytes, connection: socket.socket, wards: list[_Ward], listener: socket.socket, lock: FileLock) -> None:
    """A child for a connection: the one of this name, or a new one, which outlives a server that is killed."""
    for ward in wards:
        if ward.name == name != _NAMELESS:
            socket.send_fds(ward.line, [b"."], [connection.fileno()])
            ward.owner.close()
            ward.owner, ward.orphaned_s = connection.dup(), None
            return
    line, end = socket.socketpair()
    child = os.fork()
    if child == 0:
        for one in (listener, line):
            one.close()
        for ward in wards:
            ward.let_go()
        lock.release()  # or there is no next server while this child lives
        _live(connection, end, ADOPTION_S if name != _NAMELESS else 0)
    end.close()
    wards.append(_Ward(child, name, connection.dup(), line))


def _has_ended(child: int) -> bool:
    """Whether a child is dead. One that somebody has stopped is killed: it would hold up who waits for it."""
    pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
    if pid and os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        return False
    return pid != 0


def _live(owner: socket.socket, line: socket.socket, patience_s: float) -> NoReturn:
    """The child, from birth to death; when its work is done and its owner gone, it waits so long for the next one."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the driver, which then hangs up
        while True:
            try:
                name, arguments = cast("tuple[str, tuple[object, ...]]", pickle.loads(_received(owner)))
            except ConnectionError:
                owner = _next(line, 0)
                continue
            try:
                answer = pickle.dumps((True, cast("Callable[..., object]", resolve_name(name))(*arguments)))
            except Exception as error:
                answer = pickle.dumps((False, error))
            try:
                _send(owner, answer)
            except ConnectionError:
                owner = _next(line, patience_s)
    except OSError:
        for act in at_end:
            act()
        os._exit(0)
    except BaseException:
        os._exit(1)


def _next(line: socket.socket, patience_s: float) -> socket.socket:
    """The connection to the next owner. Raises OSError where there is none in time."""
    line.settimeout(patience_s)
    _, numbers, _, _ = socket.recv_fds(line, 1, 1)
    if not numbers:
        raise ConnectionError("the server has ended")
    return socket.socket(fileno=numbers[0])


def _send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _received(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive(connection, _LENGTH.size))
    return receive(connection, length)
