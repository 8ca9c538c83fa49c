"""The mask of each of many pictures: one folder holds them, with the pictures' sub-folders or without."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from engine.batch.listing import S3, Folders
from engine.errors import MaskUnavailable, UnreadableInput
from engine.header import PICTURE_SUFFIXES
from engine.mask import DETECTED, find_mask, mask_names


class Masks:
    """What `--mask` means for one picture after the other; a folder of masks is listed, not asked file by file."""

    def __init__(self, option: str, folders: Folders, *, num_named: Mapping[str, int]) -> None:
        """`num_named`: how many of the pictures have each stem."""
        self._option, self._folders, self._num_named = option, folders, num_named
        self._names_in = lru_cache(maxsize=16)(self._names)
        if option.startswith(S3):
            self._is_folder = PurePosixPath(option).suffix.lower() not in PICTURE_SUFFIXES
        else:
            self._is_folder = option not in ("none", DETECTED) and os.path.isdir(option)

    def find(self, image: str, relative: str) -> str | None:
        """The mask of the picture that lies at `relative` (with slashes) in its source; None: nothing is missing.

        A folder is searched as `engine.mask.find_mask` does: first its sub-folder of the picture's, then itself.
        Raises MaskUnavailable where there is none, more than one of a rank, or one that may be another picture's.
        """
        if not self._is_folder:
            if self._option.startswith(S3):
                return self._option
            found = find_mask(self._option, image=Path(image))
            return None if found is None else str(found)
        folder = os.path.dirname(relative)
        if folder and (mask := self._among(f"{self._option.rstrip('/')}/{folder}", image)) is not None:
            return mask
        mask, stem = self._among(self._option, image), PurePosixPath(image).stem
        if mask is None:
            raise MaskUnavailable(
                f"{image}: no {PurePosixPath(image).name}, {stem}.png or {stem}.mask.png in {self._option}. Add one."
            )
        if folder and self._num_named[stem] > 1:
            raise MaskUnavailable(
                f"{image}: {self._num_named[stem]} pictures are called {stem}, {mask} is 1 mask. Put each mask into a "
                "sub-folder, as the pictures are."
            )
        return mask

    def _names(self, folder: str) -> frozenset[str]:
        """Of the files in a folder; none where there is no such folder."""
        try:
            return frozenset(self._folders.list(folder).files)
        except UnreadableInput:
            return frozenset()

    def _among(self, folder: str, image: str) -> str | None:
        files = self._names_in(folder)
        for names in mask_names(PurePosixPath(image).name, beside=_same(folder, os.path.dirname(image) or ".")):
            paths = [f"{folder.rstrip('/')}/{name}" for name in names if name in files]
            found = [path for path in paths if not _same(path, image)]
            if len(found) > 1:
                raise MaskUnavailable(f"{image}: {len(found)} masks fit: {found[0]}, {found[1]}. Leave one of them.")
            if found:
                return found[0]
        return None


def _same(one: str, other: str) -> bool:
    if one.startswith(S3) or other.startswith(S3):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
