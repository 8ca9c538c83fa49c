"""Hostile files: a decoder runs in a process of its own, so that a crash, a hang or a flood of memory costs one file.

A server, started once and without the caller's `__main__`, has loaded the decoders and forks for each call, which takes
milliseconds. Of the two processes of a call, the worker decodes under its limits; the warden, its parent, ends it in
time and says how it ended:

    caller ── control socket ──► server ── fork ──► warden ── fork ──► worker
       └───────────── reply: the worker's pickle, then the warden's trailer ───┘

This is no sandbox: a decoder that was taken over may still do what this user may do.
"""

import atexit
import hashlib
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

from engine.errors import (
    DecoderCrashed,
    DecoderOutOfMemory,
    DecoderTimeout,
    DecoderUnavailable,
    EngineError,
    InputError,
)
from engine.geometry import Size
from engine.image import MAX_PIXELS, ImageInfo, Picture, decode, probe
from engine.mask import Mask, read_mask
from engine.processes import python
from engine.warden import REQUEST, TRAILER, Limits, keep_standard_descriptors

DECODE_PIXELS_PER_S = 1_000_000
"""A slow disk and a busy machine: fifty times slower than usual."""

_T = TypeVar("_T")
_GRACE_S = 30.0
"""How long the start of the server and the warden's answer may take besides."""


def probe_in_child(
    path: Path, *, max_pixels: int = MAX_PIXELS, page: int | None = None, limits: Limits | None = None
) -> ImageInfo:
    """As `engine.image.probe`. Raises DecoderCrashed, DecoderTimeout and DecoderOutOfMemory besides."""
    return in_child(probe, path, max_pixels=max_pixels, page=page, subject=path, limits=limits)


def probe_many_in_child(
    paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS, page: int | None = None
) -> list[ImageInfo | EngineError]:
    """As `probe_in_child` of each, in one process; a file that ends it is found by reading all of them alone."""
    if not paths:
        return []
    try:
        return in_child(_probe_many, paths, max_pixels, page, subject=paths[0])
    except (DecoderCrashed, DecoderTimeout, DecoderOutOfMemory, DecoderUnavailable):
        return [_probed(probe_in_child, path, max_pixels, page) for path in paths]


def _probe_many(paths: Sequence[Path], max_pixels: int, page: int | None) -> list[ImageInfo | EngineError]:
    return [_probed(probe, path, max_pixels, page) for path in paths]


def _probed(read: Callable[..., ImageInfo], path: Path, max_pixels: int, page: int | None) -> ImageInfo | EngineError:
    try:
        return read(path, max_pixels=max_pixels, page=page)
    except EngineError as error:
        return error


def decode_in_child(info: ImageInfo, scratch: Path, *, limits: Limits | None = None) -> Picture:
    """As `engine.image.decode`, into a folder of its own in `scratch`, which a failure leaves empty.

    Raises DecoderCrashed, DecoderTimeout (by default 30 s and one second a megapixel) and DecoderOutOfMemory besides.
    """
    folder = scratch / f"decoded-{hashlib.sha256(os.fsencode(info.path)).hexdigest()[:8]}"
    try:
        return in_child(decode, info, folder, subject=info.path, limits=limits or _limits(info.size))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_mask_in_child(path: Path, *, size: Size, scratch: Path) -> Mask:
    """As `engine.mask.read_mask`, with the errors and the time of `decode_in_child`."""
    return in_child(read_mask, path, size=size, scratch=scratch, subject=path, limits=_limits(size))


def _limits(size: Size) -> Limits:
    return Limits(timeout_s=Limits().timeout_s + size.num_pixels / DECODE_PIXELS_PER_S)


def in_child(
    function: Callable[..., _T],
    /,
    *arguments: object,
    subject: Path,
    limits: Limits | None = None,
    **keywords: object,
) -> _T:
    """`function(*arguments, **keywords)`, which an importable module must hold, in a process of its own.

    What it returns or raises comes back pickled. `subject` is the file that the messages name. Threads may call this at
    the same time. Raises DecoderCrashed, DecoderTimeout or DecoderOutOfMemory where the process did not come to an end,
    DecoderUnavailable where there was none.
    """
    limits = limits or Limits()
    body = pickle.dumps((function, arguments, keywords))
    request = REQUEST.pack(len(body), limits.timeout_s, limits.memory_bytes) + body
    try:
        reply = _server.ask(request, limits.timeout_s + _GRACE_S)
    except OSError as error:  # no free descriptor, process or memory
        raise DecoderUnavailable(
            f"{subject}: 1 process and a few descriptors are needed to read it, the system gives none "
            f"({error.strerror}, {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} descriptors allowed): close what is "
            "open, or raise the limit, and run again"
        ) from error
    if reply is None:
        raise _timeout(subject, limits)
    if len(reply) < TRAILER.size:
        raise DecoderUnavailable(f"{subject}: the process that reads it was lost; run again")
    status, late = TRAILER.unpack_from(reply, len(reply) - TRAILER.size)
    if late or status == -signal.SIGALRM:
        raise _timeout(subject, limits)
    if status != 0:
        raise _crash(subject, status, limits)
    succeeded, value = cast("tuple[bool, Any]", pickle.loads(reply[: -TRAILER.size]))
    if succeeded:
        return cast("_T", value)
    if isinstance(value, MemoryError):
        raise _memory(subject, limits) from value
    raise value


def ready() -> None:
    """Starts the server that the first call would start; forks of this process then use it, too."""
    in_child(os.getpid, subject=Path())


def _timeout(subject: Path, limits: Limits) -> InputError:
    return DecoderTimeout(
        f"{subject}: not read after {limits.timeout_s:g} s, which is the limit. Save it anew with another program, or "
        "leave it out."
    )


def _memory(subject: Path, limits: Limits) -> InputError:
    return DecoderOutOfMemory(
        f"{subject}: reading it needs more than the {limits.memory_bytes:,} bytes allowed at once. Save it as a TIFF "
        "in tiles or small strips."
    )


def _crash(subject: Path, status: int, limits: Limits) -> InputError:
    if status == -signal.SIGKILL:  # not by the warden: the system ends the largest process when memory runs out
        return _memory(subject, limits)
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return DecoderCrashed(
        f"{subject}: a decoder crashed ({how}): the file is damaged or hostile. Save it anew with another program, or "
        "leave it out."
    )


class _Server:
    """The caller's end. Forks of this process may use it too: every message to the server stands alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def ask(self, request: bytes, timeout_s: float) -> bytes | None:
        """The reply, worker's and warden's; None where there is none in time, short where the warden was lost.

        Raises OSError where the system gives no socket or no process.
        """
        keep_standard_descriptors()
        deadline = time.monotonic() + timeout_s
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(theirs)
            try:
                ours.settimeout(timeout_s)
                ours.sendall(request)
                parts: list[bytes] = []
                while True:
                    ours.settimeout(max(0.001, deadline - time.monotonic()))
                    part = ours.recv(1 << 20)
                    if not part:
                        return b"".join(parts)
                    parts.append(part)
            except TimeoutError:
                return None
            except ConnectionError:
                return b""

    def _send(self, connection: socket.socket) -> None:
        """Hands the server one end of a connection; starts a server where there is none, or no longer one."""
        with self._lock:
            if self._control is not None:
                try:
                    socket.send_fds(self._control, [b"\0"], [connection.fileno()])
                    return
                except OSError:
                    self._close()
            self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"\0"], [connection.fileno()])

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command, environment = python(f"from engine import isolate, warden; warden.serve({theirs.fileno()})")
        with ExitStack() as unless_it_starts, theirs:
            unless_it_starts.enter_context(ours)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the caller, who then hangs up
            )
            unless_it_starts.pop_all()
        self._control = ours

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.terminate()  # it holds nothing; in a fork of the caller this finds no child, and does nothing
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Ends the server; the next call starts one anew."""
        with self._lock:
            self._close()


_server = _Server()
atexit.register(_server.close)
