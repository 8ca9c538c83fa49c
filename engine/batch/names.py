"""What the outputs of many pictures are called: the picture's place in its source, without the suffix where it can be.

Names are compared as file systems do that know no case and one form of each letter: outputs can be carried there.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

from engine.errors import PlanError

RESERVED = frozenset({"_batch", "_engine"})
"""Folders in which this program keeps what is its own: none of them is searched or mirrored."""


class Names:
    """Names of outputs for pictures at these places: paths with slashes, relative to the source."""

    def __init__(self, places: Sequence[str]) -> None:
        """Raises PlanError for one place twice, and for one that has no mirror in the output folder."""
        self._stems = Counter[str]()
        self._whole = Counter[str]()
        for place in places:
            parts = place.split("/")
            if not {"", ".", ".."}.isdisjoint(parts) or not RESERVED.isdisjoint(parts[:-1]):
                raise PlanError(f"{place}: outputs cannot lie in a folder of that name; rename it, or leave it out")
            self._stems[_folded(os.path.splitext(place)[0])] += 1
            self._whole[_folded(place)] += 1
        doubled = Counter(place for place in places if self._whole[_folded(place)] > 1)
        for place, count in doubled.items():
            if count > 1:
                raise PlanError(f"{place}: {count} inputs have this name and would share 1 output; run them apart")

    def of(self, place: str) -> str:
        """Without its suffix; with it, where others would have the same; and a digest, where letters differ in case."""
        stem = os.path.splitext(place)[0]
        if self._stems[_folded(stem)] == 1 and _folded(stem) not in self._whole:
            return stem
        if self._whole[_folded(place)] == 1:
            return place
        return f"{place}.{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def _folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
