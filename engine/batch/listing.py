"""What lies in a folder: of a file system, or under a prefix of an object store (`s3://bucket/prefix`)."""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.errors import PlanError, UnreadableInput

if TYPE_CHECKING:
    from obstore.store import S3Store

S3 = "s3://"


@dataclass(frozen=True, slots=True)
class Listing:
    """Names in one folder, sorted."""

    files: tuple[str, ...]
    """All that is no folder, broken links too."""
    folders: tuple[str, ...]
    links: tuple[str, ...]
    """Of `folders`, those that are symbolic links."""


class Folders:
    """Lists folders, and remembers the last few; connections to object stores are kept as long as this lives."""

    def __init__(self) -> None:
        self.list = lru_cache(maxsize=16)(self._list)
        self._store = lru_cache(_open_bucket)

    def _list(self, path: str) -> Listing:
        """Raises UnreadableInput for what cannot be listed."""
        return self._list_prefix(path) if path.startswith(S3) else _list_local(path)

    def _list_prefix(self, url: str) -> Listing:
        """An object store has no folders: one is what keys have in common up to a slash, and may be empty."""
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        store = self._store(bucket)

        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.list_with_delimiter(store, prefix or None)  # pyright: ignore[reportUnknownMemberType]
        except BaseError as error:
            said = str(error).partition("\n")[0]
            raise UnreadableInput(
                f"{url}: cannot be listed ({said}). Check name, rights and AWS_* settings."
            ) from error
        files = sorted(made["path"].rpartition("/")[2] for made in found["objects"])
        folders = sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])
        return Listing(tuple(files), tuple(folders), ())


def _list_local(path: str) -> Listing:
    try:
        with os.scandir(path) as found:
            entries = sorted((entry.name, _is_folder(entry), entry.is_symlink()) for entry in found)
    except OSError as error:
        raise UnreadableInput(
            f"{path}: cannot be listed ({error.strerror}). Check the rights of the folder."
        ) from error
    return Listing(
        tuple(name for name, is_folder, _ in entries if not is_folder),
        tuple(name for name, is_folder, _ in entries if is_folder),
        tuple(name for name, is_folder, is_link in entries if is_folder and is_link),
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _open_bucket(name: str) -> "S3Store":
    """Region, endpoint and credentials come from the environment, as in the AWS tools."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise PlanError(f"{S3}{name}: needs the package obstore; pip install 'cra-srgan-engine[s3]'") from error
    return S3Store(name)
