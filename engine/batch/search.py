"""Which pictures a source stands for: itself, those below a folder or prefix, what fits a pattern or is on a list.

Left out below folders: names that start with a dot, folders of masks, and what a run has left: canvases, IIIF outputs,
files that a receipt beside them names, half-written ones. Names that end in `.mask`, `.generated` or `.inprogress`
before the suffix are never pictures.
"""

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from engine import generated_map
from engine.batch.listing import S3, Folders, Listing
from engine.batch.names import RESERVED
from engine.errors import PlanError, UnreadableInput
from engine.header import PICTURE_SUFFIXES
from engine.receipt import read_receipt
from engine.tiling.export import SUFFIX

_ZARR = SUFFIX["ome-zarr"]
_NO_PICTURES = (".mask", ".inprogress", Path(generated_map.SUFFIX).stem)
_HALF_DONE = re.compile(r".+\.[0-9a-f]{32}\.(partial|replaced)")
_MAGIC = re.compile(r"[*?[]")


class Search:
    """Finds the pictures of one source after the other, each with where in it the part begins that is mirrored."""

    def __init__(self, folders: Folders, *, out: str | None, mask: str | None) -> None:
        """`out` and a folder of masks are not searched, a file with the mask of all is no picture."""
        self.closed: set[str] = set()
        """Folders that could not be listed."""
        self._folders, self._out = folders, out
        self._mask = mask if mask is None or mask.startswith(S3) else str(Path(mask))

    def pictures(self, source: str) -> Iterator[tuple[str, int]]:
        """Raises UnreadableInput for a folder or list that cannot be read, PlanError where `out` would be searched."""
        if source.startswith(S3):
            source = source.rstrip("/")
            is_picture = _has_suffix(source, (*PICTURE_SUFFIXES, _ZARR))
            return _alone(source) if is_picture else self._below(source, ("**",))
        path = str(Path(source))
        if os.path.isdir(path):
            return _alone(path) if _has_suffix(path, (_ZARR,)) else self._below(path, ("**",))
        if os.path.lexists(path) or not _MAGIC.search(path):
            return _listed(path) if path.lower().endswith(".txt") else _alone(path)
        parts = path.split("/")
        fixed = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
        return self._below("/".join(parts[:fixed]) or ("/" if path.startswith("/") else "."), tuple(parts[fixed:]))

    def _below(self, base: str, pattern: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        self._refuse_out(base, pattern)
        prefix = "" if base == "." else f"{base.rstrip('/')}/"
        return ((prefix + place, len(prefix)) for place in self._walk(base, prefix, pattern))

    def _refuse_out(self, base: str, pattern: tuple[str, ...]) -> None:
        """Outputs would be inputs of the next run."""
        if self._out is None or self._out.startswith(S3) != base.startswith(S3):
            return
        out, top = (path.rstrip("/") if path.startswith(S3) else os.path.realpath(path) for path in (self._out, base))
        top = f"{top.rstrip('/')}/"
        if f"{out}/".startswith(top) and _may_hold(_parts(out[len(top) :]), pattern):
            raise PlanError(f"{self._out}: --out lies inside the input folder {base}; choose one outside it")

    def _walk(self, base: str, prefix: str, pattern: tuple[str, ...]) -> Iterator[str]:
        """Places below `base` that fit the pattern: a folder's own, then those of its sub-folders, each searched once.

        Links to folders come last, so that what they lead to keeps its own name; those that lead up are not followed.
        A folder that cannot be listed is a place itself, so that somebody is told.
        """
        entered = {_identity(path) for path in (self._out, self._mask) if path is not None} - {None, _identity(base)}
        folders, links = [""], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            path = (prefix + folder).rstrip("/") or base
            identity = _identity(path)
            if identity in entered:
                continue
            entered.add(identity)
            try:
                listing = self._folders.list(path)
            except UnreadableInput:
                if not folder:
                    raise
                self.closed.add(path)
                yield folder
                continue
            if "_engine" in listing.folders or (path.endswith(SUFFIX["iiif"]) and "info.json" in listing.files):
                continue
            below = f"{folder}/" if folder else ""
            for name in self._inputs(path, listing):
                if _fits(_parts(below + name), pattern) and prefix + below + name != self._mask:
                    yield below + name
            inside = [below + name for name in listing.folders if _is_searched(name)]
            inside = [place for place in inside if _may_hold(_parts(place), pattern)]
            linked = {below + name for name in listing.links}
            folders += [place for place in reversed(inside) if place not in linked]
            links += [place for place in inside if place in linked and not _leads_up(prefix + place, base)]

    def _inputs(self, path: str, listing: Listing) -> list[str]:
        """The pictures in a folder that are nobody's mask and no earlier output."""
        files = [name for name in listing.files if _is_input(name) and _has_suffix(name, PICTURE_SUFFIXES)]
        if not path.startswith(S3):  # on object stores exports lie beside their canvas, not beside their receipt
            made = _made(path, files, listing)
            files = [name for name in files if name not in made]
        zarrs = [name for name in listing.folders if _is_input(name) and _has_suffix(name, (_ZARR,))]
        return sorted(files + [name for name in zarrs if not self._is_canvas(f"{path}/{name}")])

    def _is_canvas(self, path: str) -> bool:
        try:
            return "_engine" in self._folders.list(path).folders
        except UnreadableInput:
            return False


def _alone(image: str) -> Iterator[tuple[str, int]]:
    """A picture that was named itself."""
    if _is_input(PurePosixPath(image).name, hidden=True):
        yield image, image.rfind("/") + 1


def _listed(path: str) -> Iterator[tuple[str, int]]:
    """The lines of a list."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, "rb") as file:
            for line in file:
                if b"\0" in line:
                    raise UnreadableInput(f"{path}: is no list; write 1 path or URL per line, as UTF-8")
                place = os.fsdecode(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"))
                if place.strip() and _is_input(PurePosixPath(place).name, hidden=True):
                    yield (place, len(S3)) if place.startswith(S3) else _placed(place, folder)
    except OSError as error:
        raise UnreadableInput(f"{path}: cannot be opened ({error.strerror}). Check the name and the rights.") from error


def _placed(line: str, folder: str) -> tuple[str, int]:
    """The path that a line means: below the list's folder it is mirrored from there, elsewhere from the root."""
    image = os.path.join(folder, line)
    if ".." in image.split("/"):  # a link may stand before it, so it is the system that says where it leads
        image = f"{os.path.realpath(os.path.dirname(image))}/{PurePosixPath(image).name}"
        folder = os.path.realpath(folder)
    else:
        image = f"/{os.path.normpath(image).lstrip('/')}"
    prefix = f"{folder.rstrip('/')}/"
    return image, len(prefix) if image.startswith(prefix) else 1


def _is_input(name: str, *, hidden: bool = False) -> bool:
    """Whether a name is none of those of masks and of what a run has left."""
    return (hidden or not name.startswith(".")) and not os.path.splitext(name.lower())[0].endswith(_NO_PICTURES)


def _has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    return os.path.splitext(name.lower())[1] in suffixes


def _is_searched(name: str) -> bool:
    left_out = name.startswith(".") or name in RESERVED or _has_suffix(name, (_ZARR,))
    return not left_out and not _HALF_DONE.fullmatch(name)


def _made(folder: str, names: Sequence[str], listing: Listing) -> set[str]:
    """What the receipts beside the pictures of a folder say that they name."""
    receipts = {f"{os.path.splitext(name)[0]}.json" for name in names} & set(listing.files)
    found = (read_receipt(Path(folder) / name) for name in receipts)
    return {output["name"] for receipt in found if receipt is not None for output in receipt["outputs"].values()}


def _parts(place: str) -> list[str]:
    return place.split("/") if place else []


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path is one that a pattern means; `**` stands for any folders, or none."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _may_hold(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether something that fits a pattern may lie below a folder."""
    if not pattern or pattern[0] == "**" or not folder:
        return bool(pattern)
    return fnmatchcase(folder[0], pattern[0]) and _may_hold(folder[1:], pattern[1:])


def _identity(path: str) -> str | tuple[int, int] | None:
    """Of a folder, whatever leads to it; None where there is none."""
    if path.startswith(S3):
        return path.rstrip("/")
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _leads_up(link: str, base: str) -> bool:
    return f"{os.path.realpath(base)}/".startswith(f"{os.path.realpath(link).rstrip('/')}/")
