"""Whole objects by their keys: one small interface, kept by a folder and by a prefix of an object store.

Both store an object whole or not at all, and durably. Only a folder can move an object, and only a prefix can replace
one on condition: what is built on this interface alone needs neither.
"""

import hashlib
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar
from unicodedata import category

from engine.errors import PlanError, StorageError, StorageReadOnly, UnreadableInput
from engine.failpoints import hit
from engine.store import Digest, create_only, digest_of, remove_durably, storage_errors, write_atomic

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode
    from obstore.store import S3Store

T = TypeVar("T")

SCHEME = "s3://"
MAX_RETRIES = 10
"""Of one request, with back-off and jitter: after a 5xx, and a lost connection where a second request does no harm."""
RETRY_TIMEOUT_S = 180
REQUEST_TIMEOUT_S = 120
MULTIPART_BYTES = 64 << 20
"""Longer files are uploaded in parts."""
PART_BYTES = 16 << 20

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
_LOST_ANSWERS = 3  # in a row to one conditional request


class Objects(Protocol):
    """Whole objects under one root. A key is a path with slashes below it."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Stores an object, replacing what was there."""
        ...

    def create(self, key: str, data: bytes | memoryview) -> bool:
        """Stores an object where there is none; False where there is. A prefix takes the same bytes for its own."""
        ...

    def get(self, key: str) -> bytes | None:
        """A whole object; None where there is none."""
        ...

    def size(self, key: str) -> int | None:
        """The length of an object in bytes; None where there is none."""
        ...

    def digest(self, key: str) -> Digest:
        """Reads an object again, in pieces. Raises StorageError where there is none."""
        ...

    def keys(self) -> Iterator[str]:
        """The keys of all objects, in no order."""
        ...

    def delete(self, key: str) -> None:
        """Deletes an object, if it is there."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """Objects that are files."""

    root: Path

    def put(self, key: str, data: bytes | memoryview) -> None:
        write_atomic(self.root / key, data)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        return create_only(self.root / key, data)

    def get(self, key: str) -> bytes | None:
        path = self.root / key
        with storage_errors(path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                return None

    def size(self, key: str) -> int | None:
        path = self.root / key
        with storage_errors(path):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                return None

    def digest(self, key: str) -> Digest:
        return digest_of(self.root / key)

    def keys(self) -> Iterator[str]:
        return (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def delete(self, key: str) -> None:
        remove_durably(self.root / key)


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a listing."""

    key: str
    num_bytes: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Prefix:
    """Objects of a bucket whose names begin with `path` and a slash; where it is empty, all of them.

    A value: the connection is made at the first request of a process, from the usual variables (``AWS_ENDPOINT_URL``,
    ``AWS_REGION``, ``AWS_ACCESS_KEY_ID`` ...). Every method raises StorageError when the store cannot be reached or
    refuses, StorageReadOnly where a permission is missing.
    """

    bucket: str
    path: str = ""

    def __post_init__(self) -> None:
        parts = self.path.split("/") if self.path else []
        odd = any(category(c) in ("Cc", "Cs") for c in self.path)
        if not self.bucket or odd or any(part in ("", ".", "..") for part in parts):
            raise PlanError(
                f"{str(self)!r}: is no name in an object store; give s3://BUCKET/PREFIX, without empty parts, dots "
                "alone or control characters"
            )

    @classmethod
    def parse(cls, url: str) -> "Prefix":
        """What ``s3://bucket/path`` names. Nothing in it is an escape: ``%20`` is three characters."""
        bucket, _, path = url.removeprefix(SCHEME).partition("/")
        return cls(bucket, path.rstrip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.path}"

    def __truediv__(self, key: str) -> "Prefix":
        return Prefix(self.bucket, f"{self.path}/{key}" if self.path else key)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Prefix":
        return Prefix(self.bucket, self.path.rpartition("/")[0])

    @property
    def client(self) -> "S3Store":
        """The bucket, for libraries that speak to it themselves."""
        return _client(self.bucket)

    def put(self, key: str, data: bytes | memoryview) -> None:
        at = self._at(key)
        hit("put")
        self._request(key, "written", lambda store: store.put(at.path, data, use_multipart=False))
        hit("put")

    def create(self, key: str, data: bytes | memoryview) -> bool:
        return self._put_if(key, data, over=None)

    def replace(self, key: str, data: bytes | memoryview, *, over: str | None) -> bool:
        """Stores an object where the one with the tag `over` (None: none) still is; False where another one is."""
        return self._put_if(key, data, over=over)

    def upload(self, key: str, file: Path) -> None:
        """Stores a local file, in parts where it is long."""
        at = self._at(key)
        num_bytes = file.stat().st_size
        hit("upload")
        self._request(
            key,
            "written",
            lambda store: store.put(
                at.path,
                file,
                use_multipart=num_bytes > MULTIPART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=4,
            ),
        )
        hit("upload")

    def get(self, key: str) -> bytes | None:
        found = self.read(key)
        return None if found is None else found[0]

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A whole object and its tag, by which `replace` knows it; None where there is none."""
        at = self._at(key)

        def read(store: "S3Store") -> tuple[bytes, str]:
            found = store.get(at.path)
            return bytes(found.bytes()), found.meta["e_tag"] or ""

        try:
            return self._request(key, "read", read)
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        at = self._at(key)
        try:
            return self._request(key, "read", lambda store: store.head(at.path)["size"])
        except FileNotFoundError:
            return None

    def digest(self, key: str) -> Digest:
        at = self._at(key)
        sha256, num_bytes = hashlib.sha256(), 0

        def read(store: "S3Store") -> None:
            nonlocal num_bytes
            for piece in store.get(at.path).stream():
                sha256.update(piece)
                num_bytes += len(piece)

        try:
            self._request(key, "read", read)
        except FileNotFoundError:
            raise StorageError(f"{at}: there is no such object; run the same command again") from None
        return Digest(sha256.hexdigest(), num_bytes)

    def keys(self) -> Iterator[str]:
        return (entry.key for entry in self.entries())

    def entries(self) -> Iterator[Entry]:
        """All objects, with what a listing tells of them."""

        def listed(store: "S3Store") -> "Iterator[Sequence[ObjectMeta]]":
            return iter(store.list(self.path or None, chunk_size=1000))  # pyright: ignore[reportUnknownMemberType]

        pages = self._request("", "listed", listed)
        while page := self._request("", "listed", lambda _: next(pages, None)):
            for found in page:
                key = found["path"].removeprefix(f"{self.path}/") if self.path else found["path"]
                yield Entry(key, found["size"], found["last_modified"])

    def download(self, file: Path) -> None:
        """Writes the one object that this names itself to a new local file. Raises FileNotFoundError."""

        def read(store: "S3Store") -> None:
            found = store.get(self.path)
            with storage_errors(file, needed_bytes=found.meta["size"]), file.open("wb") as stream:
                for piece in found.stream():
                    stream.write(piece)

        self._request("", "read", read)

    def delete(self, key: str) -> None:
        at = self._at(key)
        try:
            self._request(key, "deleted", lambda store: store.delete(at.path))
        except StorageReadOnly:
            raise
        except StorageError:
            if self.size(key) is not None:  # else only the answer was lost, which the client does not ask for again
                raise

    def _at(self, key: str) -> "Prefix":
        return self / key if key else self

    def _put_if(self, key: str, data: bytes | memoryview, *, over: str | None) -> bool:
        at = self._at(key)
        mode: PutMode = "create" if over is None else {"e_tag": over}
        for attempt in count(1):
            hit("create")
            lost: StorageError | None = None
            try:
                self._request(key, "written", lambda store: store.put(at.path, data, mode=mode))
                hit("create")
                return True
            except _conflicts():
                pass
            except StorageReadOnly:
                raise
            except StorageError as error:
                lost = error
            # Perhaps only the answer was lost, or a repeated request met the first one: what is there decides.
            found = self.read(key)
            if found is not None and found[0] == data:
                return True
            if (None if found is None else found[1]) != over:
                return False
            if attempt == _LOST_ANSWERS:
                raise lost or StorageError(f"{at}: changes all the time; see what else writes there")
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise AssertionError

    @contextmanager
    def typed_errors(self, key: str, done: str) -> Generator[None]:
        """Around a request that another library makes for the object `key`, to have it `done`.

        FileNotFoundError where it is not there, all other failures as typed errors.
        """
        from obstore import exceptions

        at, started = self._at(key), time.monotonic()
        try:
            yield
        except _conflicts():
            raise
        except FileNotFoundError as error:
            if done == "read":
                raise
            raise StorageError(f"{at}: could not be {done}: there is no bucket {self.bucket}; make it first") from error
        except (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StorageReadOnly(
                f"{at}: could not be {done}: {_cause(error)}; check the credentials and the policy of the bucket"
            ) from error
        except exceptions.BaseError as error:
            raise StorageError(
                f"{at}: could not be {done} and was given up after {time.monotonic() - started:.1f} s, where "
                f"{MAX_RETRIES} retries within {RETRY_TIMEOUT_S} s are the most ({_cause(error)}); check the network "
                "and the store, then run the same command again: finished parts are kept"
            ) from error

    def _request(self, key: str, done: str, send: "Callable[[S3Store], T]") -> T:
        with self.typed_errors(key, done):
            return send(self.client)


Place: TypeAlias = Path | Prefix
"""Where outputs are."""


def place(text: str) -> Place:
    """The folder or the prefix that a user names."""
    if text.startswith(SCHEME):
        return Prefix.parse(text)
    if "://" in text:
        raise PlanError(
            f"{text}: 1 kind of object store is spoken to, {SCHEME}; give a folder or {SCHEME}BUCKET/PREFIX"
        )
    return Path(text)


def objects_at(root: Place) -> Objects:
    """The objects below a folder or a prefix."""
    return Folder(root) if isinstance(root, Path) else root


def local_copy(source: str, folder: Path) -> Path:
    """The file that a path or a URL names; an object is downloaded into `folder`, which is made where missing."""
    found = place(source)
    if isinstance(found, Path):
        return found
    file = folder / found.name
    with storage_errors(file):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        found.download(file)
    except FileNotFoundError:
        raise UnreadableInput(
            f"{found}: there is no such object; give the URL of a picture (an OME-Zarr is read from a folder only)"
        ) from None
    return file


@cache
def _client(bucket: str) -> "S3Store":
    try:
        from obstore.store import S3Store
    except ImportError:
        raise PlanError(
            f"{SCHEME}{bucket}: object stores need 1 more package, obstore; install cra-srgan-engine[s3]"
        ) from None
    return S3Store(
        bucket,
        retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)},
        client_options={
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
            # Who writes http:// into a variable means it; for all others this stays off.
            "allow_http": any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS),
        },
    )


def _conflicts() -> tuple[type[Exception], ...]:
    from obstore import exceptions

    return (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotModifiedError)


def _cause(error: Exception) -> str:
    """What happened, without the dump of the request that follows it."""
    return str(error).partition("\n")[0].rpartition(" - ")[2] or type(error).__name__
