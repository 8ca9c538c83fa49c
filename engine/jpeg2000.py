"""JPEG 2000 pixels by imagecodecs (OpenJPEG), which libvips is built without; whole, as OpenJPEG decodes them."""

from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import imagecodecs
import numpy as np
import pyvips

from engine import vips
from engine.errors import UnreadableInput
from engine.jpeg2000_header import read_boxes
from engine.picture_header import Header
from engine.staged import Pixels


def decode(file: BufferedReader, path: Path, header: Header) -> Pixels:
    """`(h, w, c)` as stored. Raises UnreadableInput for damage."""
    start, end = read_boxes(file, path).codestream
    file.seek(start)
    try:
        pixels = cast("Any", imagecodecs.jpeg2k_decode(file.read(end - start), numthreads=1))  # pyright: ignore[reportUnknownMemberType]
    except (imagecodecs.Jpeg2kError, ValueError, MemoryError) as error:
        raise UnreadableInput(f"{path}: truncated or damaged ({error}). Copy or scan it anew.") from error
    wanted = (header.size.h, header.size.w, header.channels)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape != wanted or pixels.dtype != np.dtype(header.dtype):
        raise UnreadableInput(
            f"{path}: the decoder gives {pixels.shape} {pixels.dtype}, the header says {wanted} {header.dtype}. "
            "Save it anew."
        )
    return pixels


def described(file: BufferedReader, path: Path, header: Header) -> pyvips.Image:
    """A picture of no pixels that carries the file's metadata under libvips' names, as its own loaders do."""
    boxes = read_boxes(file, path)
    image = pyvips.Image.black(header.size.w, header.size.h, bands=header.channels)
    blobs = {"icc-profile-data": boxes.icc, "xmp-data": boxes.xmp}
    return vips.carrying(image, {name: data for name, data in blobs.items() if data})
