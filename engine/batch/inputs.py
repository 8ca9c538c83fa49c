"""The pictures that a command is given, what their outputs are called, and where their masks lie.

A source is a picture, an OME-Zarr, a folder, a pattern (`**` for any sub-folders), a list (`.txt`, one path or URL per
line) or `s3://bucket/prefix`. Nothing is decoded here. Paths are `str` as `os.fsdecode` makes them, so that bytes that
are no UTF-8 survive; a picture costs one string until its turn comes.
"""

import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from engine.batch.listing import Folders
from engine.batch.masks import Masks
from engine.batch.names import Names
from engine.batch.search import Search
from engine.errors import MaskUnavailable, PlanError, UnreadableInput
from engine.image import MAX_PIXELS
from engine.mask import DETECTED
from engine.objects import SCHEME, Prefix, local_copy
from engine.receipt import Job


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to restore."""

    image: str
    """Path or URL, as found."""
    name: str
    """Outputs are `OUT/<name>.<suffix>`; with slashes: the sub-folders of the source are mirrored."""
    mask: str | None
    """Path or URL; None: nothing is missing."""
    error: str | None
    """Why no mask could be found: the sentence of a MaskUnavailable."""

    def job(
        self,
        out: Path,
        formats: tuple[str, ...],
        *,
        replace: bool = False,
        max_pixels: int = MAX_PIXELS,
        tiff_compression: str = "deflate",
        remote: Prefix | None = None,
        detect: bool = False,
    ) -> Job:
        """What to do with it, in the sub-folder of `out` that its name asks for; with `remote`, in that below it.

        Raises MaskUnavailable, and PlanError where a file is still on an object store (see `local`).
        """
        if self.error is not None:
            raise MaskUnavailable(self.error)
        if self.is_remote:
            raise PlanError(
                f"{self.image}: 1 picture or its mask is on an object store and would have to be downloaded; give "
                "files in a folder, or restore it"
            )
        folder, _, name = self.name.rpartition("/")
        mask = None if self.mask is None else Path(self.mask)
        if remote is not None:  # `out` is for temporary files
            remote, folder = (remote / folder if folder else remote), ""
        return Job(
            Path(self.image), mask, out / folder, name, formats, replace, max_pixels, tiff_compression, remote, detect
        )

    @property
    def is_remote(self) -> bool:
        """Whether the picture or its mask is on an object store."""
        return self.image.startswith(SCHEME) or (self.mask or "").startswith(SCHEME)

    @contextmanager
    def local(self) -> Generator["Item"]:
        """The same with what is on an object store in temporary files, while this lasts."""
        if not self.is_remote:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="engine-") as folder:
            yield self.fetched(Path(folder))

    def fetched(self, folder: Path) -> "Item":
        """The same with what is on an object store downloaded to a local folder. Raises UnreadableInput."""
        if not self.is_remote:
            return self
        mask = None if self.mask is None else str(local_copy(self.mask, folder / "mask"))
        return replace(self, image=str(local_copy(self.image, folder / "image")), mask=mask)


def find_inputs(sources: Sequence[str], *, out: str | None, mask: str = "none") -> Iterator[Item]:
    """All pictures of the sources in a fixed order, each once; masks are looked up as the items are taken.

    `mask` is a file, a folder, "none" or `DETECTED`, for which items have none either. What is left out is
    said in `engine.batch.search`.
    Raises UnreadableInput for a source without pictures, PlanError where `out` lies in what is searched (None: not
    looked at) and where pictures would share an output.
    """
    folders = Folders()
    given = None if mask in ("none", DETECTED) else mask
    search = Search(folders, out=out, mask=given)
    found: dict[str, int] = {}  # picture → where in it the part begins that is mirrored
    for source in sources:
        empty = True
        for image, start in search.pictures(source):
            found.setdefault(image, start)
            empty = False
        if empty:
            raise UnreadableInput(f"{source}: 0 pictures in it; give pictures, a folder of them, or ** for sub-folders")
    names = Names([image[start:] for image, start in found.items()])
    stems = Counter[str]() if given is None else Counter(PurePosixPath(image).stem for image in found)
    masks = Masks(mask, folders, num_named=stems)

    def item(image: str, place: str) -> Item:
        try:
            wanted = None if image in search.closed else masks.find(image, place)
        except MaskUnavailable as error:
            return Item(image, names.of(place), None, str(error))
        return Item(image, names.of(place), wanted, None)

    return (item(image, image[start:]) for image, start in found.items())
