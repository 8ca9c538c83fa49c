"""What is missing: a mask from a file, from an array, or none.

A mask is `(h, w)` bool, True = missing. In a file any value but zero is missing: 1-bit, palette, grey, RGB and 16 bit
masks all work, as long as what is known is exactly black (a JPEG's ringing around the edges counts as missing).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from engine.errors import MaskMismatch, MaskUnavailable, NothingKnown, UnsupportedInput
from engine.geometry import Box, Size, round_down
from engine.header import PICTURE_SUFFIXES
from engine.image import ArrayPicture, Picture, Source, decode, probe
from engine.staged import Pixels, RawFile, check_inside

DETECTED = "auto"
"""In place of a mask file: the damage is to be found."""
MASK_SUFFIX = ".mask.png"
"""Of what is found."""
_STRIP_PIXELS = 1 << 22


@dataclass(frozen=True, slots=True)
class Mask:
    """The missing pixels of one picture."""

    size: Size
    sha256: str
    """Of the mask file's bytes or of the array; "none" where nothing was given."""
    num_missing: int
    source: Source | None
    """One channel, not zero = missing; None where nothing is missing."""

    @property
    def any(self) -> bool:
        return self.num_missing > 0

    def read(self, box: Box) -> NDArray[np.bool_]:
        """`(h, w)` of a box inside the picture, True = missing."""
        if self.source is None:
            check_inside(box, self.size)
            return np.zeros((box.size.h, box.size.w), np.bool_)
        return self.source.read(box)[..., 0] != 0


def no_mask(size: Size) -> Mask:
    """Nothing is missing."""
    return Mask(size, "none", 0, None)


def array_mask(mask: NDArray[np.bool_]) -> Mask:
    """A mask in memory, `(h, w)` bool. Raises UnsupportedInput for other arrays, NothingKnown for a full one."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise UnsupportedInput(f"a mask array is (h, w) bool, this is {mask.shape} {mask.dtype}. Pass `mask != 0`.")
    source = ArrayPicture(mask.astype(np.uint8))
    return _checked("the mask array", source.size, source.sha256, int(np.count_nonzero(mask)), source)


def read_mask(path: Path, *, size: Size, scratch: Path) -> Mask:
    """Decodes a mask file into `scratch`, one byte a pixel. Its EXIF orientation is applied, as for pictures.

    Transparency: an opaque alpha channel is ignored; where the colours are all the same, alpha is the mask (painted =
    missing). Raises MaskMismatch for another size, NothingKnown for a full mask, UnsupportedInput where colour and
    transparency say different things, and what `engine.image.decode` raises.
    """
    info = probe(path)
    if info.size != size:
        raise MaskMismatch(f"{path}: the mask is {info.size} px, the picture is {size} px. Make them the same size.")
    picture = decode(info, scratch / "mask")
    channel = _meaning(picture)
    raw = RawFile(scratch / f"mask-{picture.sha256[:16]}.raw", size, 1, "uint8")
    num_missing = 0

    def strips() -> Iterator[bytes]:
        nonlocal num_missing
        for pixels in _strips(picture):
            missing = (pixels[..., channel] != 0).any(axis=2)
            num_missing += int(np.count_nonzero(missing))
            yield missing.tobytes()

    raw.write(strips())
    picture.discard()
    return _checked(str(path), size, picture.sha256, num_missing, raw)


def find_mask(option: Path | str, *, image: Path) -> Path | None:
    """The mask file that an option means for one picture; None for none, and for one that is still to be found.

    A folder is searched for `<stem>.mask.<suffix>`; one that is not the picture's own then for the name of the picture
    and for its stem with any suffix.
    Raises MaskUnavailable where there is no such file or more than one of the same rank.
    """
    if option in ("none", DETECTED):
        return None
    option = Path(option)
    if option.is_file():
        return option
    if not option.is_dir():
        raise MaskUnavailable(f"{image}: the mask {option} does not exist. Give a file, a folder or none.")
    for names in mask_names(image.name, beside=_same_file(option, image.parent)):
        found = [option / name for name in names if (option / name).is_file() and not _same_file(option / name, image)]
        if len(found) > 1:
            raise MaskUnavailable(f"{image}: {len(found)} masks fit: {found[0]}, {found[1]}. Leave one of them.")
        if found:
            return found[0]
    raise MaskUnavailable(f"{image}: no {image.name}, {image.stem}.png or {image.stem}.mask.png in {option}. Add one.")


def mask_names(image: str, *, beside: bool) -> list[list[str]]:
    """What the mask of a picture with this file name may be called, the first rank first.

    `beside`: in the picture's own folder, where a file of its name is another picture.
    """
    stem = PurePath(image).stem
    own = [f"{stem}.mask{suffix}" for suffix in PICTURE_SUFFIXES]
    return [own] if beside else [own, [image], [stem + suffix for suffix in PICTURE_SUFFIXES]]


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _checked(name: str, size: Size, sha256: str, num_missing: int, source: Source) -> Mask:
    if num_missing == size.num_pixels:
        raise NothingKnown(f"{name}: all {num_missing:,} of {size.num_pixels:,} pixels are missing. Is it inverted?")
    return Mask(size, sha256, num_missing, source if num_missing else None)


def _strips(picture: Picture) -> Iterator[Pixels]:
    size = picture.size
    rows = max(1, round_down(_STRIP_PIXELS // size.w, 8))
    for y in range(0, size.h, rows):
        yield picture.read(Box(y, 0, min(y + rows, size.h), size.w))


def _meaning(picture: Picture) -> slice:
    """The channels that are the mask."""
    colours, alpha = slice(0, 1 if picture.channels <= 2 else 3), slice(picture.channels - 1, picture.channels)
    if not picture.info.has_alpha:
        return colours
    first = picture.read(Box(0, 0, 1, 1))[0, 0, colours]
    opaque = flat = True
    hidden = False
    for pixels in _strips(picture):
        opaque &= bool((pixels[..., alpha] == np.iinfo(pixels.dtype).max).all())
        flat &= bool((pixels[..., colours] == first).all())
        hidden |= bool(((pixels[..., alpha] == 0) & (pixels[..., colours] != 0)).any())
    if not opaque and not flat and hidden:
        raise UnsupportedInput(
            f"{picture.info.path}: transparent pixels of the mask have a colour; save it without transparency."
        )
    return alpha if flat and not opaque else colours
