"""Uploads: multipart bodies straight to the disk, under limits that hold before anything is decoded."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from engine.errors import BadRequest, BodyTooLarge, SlowClient, StoreFull
from engine.store import free_bytes, storage_errors

MOST_PARTS = 4
MOST_TEXT_BYTES = 16 << 10
EARLY_BYTES = 64 << 10
"""Of the picture, after which its header is looked at while the rest is on its way."""
SILENCE_S = 20.0
"""A client may send nothing for so long."""
LEAST_BYTES_PER_S = 16 << 10
_CHUNK_BYTES = 256 << 10
_FILES = ("image", "mask")
_TEXTS = ("options",)

Early = Callable[[Path, bytes | None], None]
"""Looks at the beginning of a picture, and the options, where they came before; raises the error that refuses it."""


@dataclass(slots=True)
class File:
    """A file of a form, on the disk."""

    path: Path
    name: str
    """As the client calls it: not to be trusted."""
    digest: Any = field(default_factory=hashlib.sha256)
    num_bytes: int = 0

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()


@dataclass(slots=True)
class Form:
    """What was uploaded."""

    files: dict[str, File] = field(default_factory=dict[str, File])
    texts: dict[str, bytes] = field(default_factory=dict[str, bytes])
    num_bytes: int = 0


async def receive(
    body: AsyncIterator[bytes],
    content_type: str | None,
    folder: Path,
    *,
    max_bytes: int,
    keep_free_bytes: int,
    early: Early,
) -> Form:
    """Stores the files of a multipart body in a folder, and leaves so much of its disk free.

    Raises BadRequest, BodyTooLarge, SlowClient, StoreFull and what `early` raises.
    """
    kind, parameters = parse_options_header((content_type or "").encode("latin-1", "replace"))
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise BadRequest("the body is multipart/form-data with the files `image` and `mask` and the text `options`")
    reader = _Reader(boundary, folder, keep_free_bytes, early)
    loop = asyncio.get_running_loop()
    started = loop.time()
    pending = bytearray()
    try:
        while (chunk := await _next(body)) is not None:
            reader.form.num_bytes += len(chunk)
            if reader.form.num_bytes > max_bytes:
                raise BodyTooLarge(
                    f"more than {max_bytes:,} bytes are sent, the most that is taken; send a smaller file"
                )
            waited_s = loop.time() - started
            if waited_s > SILENCE_S and reader.form.num_bytes < LEAST_BYTES_PER_S * waited_s:
                raise SlowClient(f"{reader.form.num_bytes:,} bytes came in {waited_s:.0f} s; send faster")
            pending += chunk
            if len(pending) >= _CHUNK_BYTES or not reader.looked_early:
                await asyncio.to_thread(reader.feed, bytes(pending))
                pending.clear()
        await asyncio.to_thread(reader.end, bytes(pending))
    finally:
        reader.close()
    return reader.form


async def _next(body: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(body, None), SILENCE_S)
    except ClientDisconnect:
        raise BadRequest("the client left before the body ended") from None  # for the log: nobody reads it
    except TimeoutError:
        raise SlowClient(f"nothing came for {SILENCE_S:.0f} s; send faster") from None


class _Reader:
    """Takes the bytes of a body, in a thread."""

    def __init__(self, boundary: bytes, folder: Path, keep_free_bytes: int, early: Early) -> None:
        self.form = Form()
        self.looked_early = False
        self._folder, self._keep_free_bytes, self._early = folder, keep_free_bytes, early
        self._parts = 0
        self._header = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None
        self._options: bytes | None = None
        self._out: BufferedWriter | None = None
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        free = free_bytes(self._folder) - self._keep_free_bytes
        if len(data) > free:  # others have come meanwhile, or it did not say how long it is
            raise StoreFull(
                f"{self.form.num_bytes:,} bytes have come, {max(0, free):,} more have room; come back later"
            )
        try:
            with storage_errors(self._folder):
                self._parser.write(data)
        except MultipartParseError as error:
            raise BadRequest(f"the multipart body is malformed ({error}); send what RFC 7578 says") from None
        image = self.form.files.get("image")
        if not self.looked_early and image is not None and image.num_bytes >= EARLY_BYTES:
            self._look(image)

    def end(self, data: bytes) -> None:
        """The last bytes."""
        self.feed(data)
        if not self._ended:
            raise BadRequest(f"the multipart body ends after {self.form.num_bytes:,} bytes without its last boundary")
        if "image" not in self.form.files:
            raise BadRequest("0 files are called `image`, 1 is needed")
        for name, file in self.form.files.items():
            if not file.num_bytes:
                raise BadRequest(f"the file `{name}` has 0 bytes; send a picture")

    def close(self) -> None:
        if self._out is not None:
            self._out.close()

    def _look(self, image: File) -> None:
        self.looked_early = True
        if self._out is not None:
            self._out.flush()
        self._early(image.path, self._options)

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise BadRequest(f"more than {MOST_PARTS} parts are sent; send `image`, `mask` and `options`")
        self._headers = {}
        self._header = b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0] + data[start:end], self._header[1]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0], self._header[1] + data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = b"", b""

    def _headers_finished(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if name in self.form.files or name in self.form.texts or name not in (*_FILES, *_TEXTS):
            raise BadRequest("a part is not `image`, `mask` or `options`, or is sent twice")
        if name in _TEXTS:
            self.form.texts[name] = b""
        elif b"filename" not in parameters:
            raise BadRequest(f"`{name}` is no file; send the picture itself: no address is ever fetched")
        else:
            path = self._folder / name
            self.form.files[name] = File(path, parameters[b"filename"].decode("utf-8", "replace"))
            self._out = path.open("wb")
        self._name = name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._name is not None
        if self._out is None:
            self.form.texts[self._name] += data[start:end]
            if len(self.form.texts[self._name]) > MOST_TEXT_BYTES:
                raise BadRequest(f"`{self._name}` has more than {MOST_TEXT_BYTES:,} bytes")
            return
        file = self.form.files[self._name]
        part = memoryview(data)[start:end]
        self._out.write(part)
        file.digest.update(part)
        file.num_bytes += len(part)

    def _part_end(self) -> None:
        if self._out is not None:
            self._out.flush()
            os.fsync(self._out.fileno())  # what is accepted survives a power cut
            self._out.close()
            self._out = None
        else:
            self._options = self.form.texts["options"]

    def _end(self) -> None:
        self._ended = True
