"""Small JPEGs of inputs and outputs, for people to look at."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyvips

from engine import vips
from engine.errors import EngineError
from engine.geometry import Box, Size
from engine.header import read_header
from engine.image import decode, probe
from engine.isolate import in_child
from engine.staged import Pixels
from engine.tiling.canvas import Canvas
from engine.tiling.layout import stored_metadata
from engine.warden import Limits

if TYPE_CHECKING:  # a child that makes a thumbnail needs no catalog
    from engine.batch.catalog import Row

LONG_SIDE_PX = 320
"""Twice what the page shows on a common screen."""

_QUALITY = 75
_MAX_PIXELS = 1 << 28
_MAX_HELD_PIXELS = 1 << 25
"""Of pictures that are not reduced while they are decoded."""
_LIMITS = Limits(timeout_s=20.0)
_FILES = ("png", "jpeg", "tiff", "jp2")
_STREAMED = ("", "cmyk", "premultiplied")


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An sRGB JPEG of at most `LONG_SIDE_PX`."""

    jpeg: bytes
    size: Size


def before(row: "Row") -> Thumbnail | str:
    """The input of a picture, or why it cannot be shown."""
    path = Path(row.image)
    try:
        found = path.stat()
    except (OSError, ValueError):
        return "the input is not here any more"
    if (
        path.is_file()
        and row.image_mtime_ns
        and (found.st_size, found.st_mtime_ns)
        != (
            row.image_bytes,
            row.image_mtime_ns,
        )
    ):
        return "the input was changed since"
    return _of_file(path)


def after(out: Path, row: "Row") -> Thumbnail | str:
    """The output of a picture, or why it cannot be shown."""
    names = {output.format: output.name for output in row.outputs}
    folder = (out / row.name).parent
    if "ome-zarr" in names:
        return _of_canvas(folder / names["ome-zarr"])
    found = next((names[fmt] for fmt in _FILES if fmt in names), None)
    if found is None:
        return "no output that can be shown"
    return _of_file(folder / found) if (folder / found).is_file() else "the output is not here any more"


def _of_canvas(root: Path) -> Thumbnail | str:
    """From the smallest level that is large enough."""
    try:
        canvas = Canvas.load(root)
        sizes = canvas.grid.level_sizes
        level = max((index for index, size in enumerate(sizes) if size.long_side >= LONG_SIDE_PX), default=0)
        if sizes[level].num_pixels > _MAX_HELD_PIXELS:
            return "too large to be shown"
        pixels = canvas.read(Box.of(sizes[level]), level=level)
        return _reduced(_image(pixels, stored_metadata(root).icc))
    except (EngineError, pyvips.Error) as error:
        return f"cannot be shown ({_code(error)})"


def _of_file(path: Path) -> Thumbnail | str:
    """Decoded in a process of its own: a file that was restored once is still a file from elsewhere."""
    try:
        return in_child(of_file, path, subject=path, limits=_LIMITS)
    except (EngineError, pyvips.Error) as error:
        return f"cannot be shown ({_code(error)})"


def of_file(path: Path) -> Thumbnail:
    """Reads a picture in this process. Raises InputError, or pyvips.Error for damage."""
    if path.is_file():
        with path.open("rb") as file:
            header = read_header(file, path)
            streamed = header.format in ("png", "jpeg", "tiff", "webp") and header.conversion in _STREAMED
            if streamed and not header.needs_tifffile and header.size.num_pixels <= _MAX_PIXELS:
                return _reduced(vips.load(file, header.format, directory=header.directory))
    info = probe(path, max_pixels=_MAX_HELD_PIXELS)
    with tempfile.TemporaryDirectory() as scratch:
        picture = decode(info, Path(scratch))
        return _reduced(_image(picture.read(Box.of(info.size)), info.metadata.icc))


def _image(pixels: Pixels, icc: bytes | None) -> pyvips.Image:
    """`(h, w, c)` in memory as libvips sees a picture."""
    eight = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    height, width, channels = eight.shape
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(eight).data, width, height, channels, "uchar")
    image = image.copy(interpretation="srgb" if channels > 2 else "b-w")
    return image if icc is None else vips.carrying(image, {"icc-profile-data": icc})


def _reduced(image: pyvips.Image) -> Thumbnail:
    small = cast("Any", image.thumbnail_image(LONG_SIDE_PX, height=LONG_SIDE_PX, size="down", output_profile="srgb"))
    if small.hasalpha():
        small = small.flatten(background=255)
    small = small.colourspace("srgb").cast("uchar").copy_memory()
    return Thumbnail(bytes(small.jpegsave_buffer(Q=_QUALITY, keep="none")), Size(small.height, small.width))


def _code(error: Exception) -> str:
    return error.code if isinstance(error, EngineError) else "damaged"
