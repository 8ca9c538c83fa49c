"""TIFF pictures that libvips' libtiff does not decode, by tifffile: Zstandard, tiles in planes, 16-bit palettes.

Also alpha multiplied into the colours, which libvips would divide out with a rounding of its own.

The header has been checked by then: every strip or tile lies inside the file, and a row of them fits the memory.
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import tifffile
from numpy.typing import NDArray

from engine.errors import UnreadableInput
from engine.geometry import ceil_div
from engine.picture_header import Header

_JPEG = 7

Samples: TypeAlias = NDArray[Any]


class _Page(Protocol):
    """What is used of a tifffile.TiffPage, whose own types do not say it."""

    planarconfig: int
    samplesperpixel: int
    is_tiled: bool
    tilelength: int
    tilewidth: int
    rowsperstrip: int
    photometric: int
    compression: int
    dtype: np.dtype[Any]
    dataoffsets: tuple[int, ...]
    databytecounts: tuple[int, ...]
    jpegtables: bytes | None
    jpegheader: bytes | None

    def decode(self, data: bytes, index: int, **options: object) -> tuple[Samples | None, Any, Any]: ...


def strips(file: BufferedReader, path: Path, header: Header) -> Iterator[Samples]:
    """Rows of the stored picture, top to bottom, `(rows, w, c)`. Raises UnreadableInput for damage."""
    try:
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:  # it leaves a file that it was given open
            page = cast("_Page", tiff.pages[header.directory])
            for pixels in _rows_of_segments(file, page, header):
                yield _meant(pixels, page, header)
    except (tifffile.TiffFileError, ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise UnreadableInput(f"{path}: truncated or damaged ({error}). Copy or scan it anew.") from error


def _meant(pixels: Samples, page: _Page, header: Header) -> Samples:
    """As libvips would give them: palettes looked up, white where the file has 0 for white."""
    if header.palette:
        return np.array(header.palette, np.uint16)[pixels[..., 0]]
    return np.iinfo(pixels.dtype).max - pixels if page.photometric == 0 else pixels


def _rows_of_segments(file: BufferedReader, page: _Page, header: Header) -> Iterator[Samples]:
    size, samples = header.size, page.samplesperpixel
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, size.h), size.w)
    down, across = ceil_div(size.h, height), ceil_div(size.w, width)
    separate = page.planarconfig == 2 and samples > 1
    for row in range(down):
        num = min(height, size.h - row * height)
        pixels: Samples = np.zeros((num, size.w, samples), page.dtype)
        for plane in range(samples if separate else 1):
            channels = slice(plane, plane + 1) if separate else slice(None)
            for column in range(across):
                x0, x1 = column * width, min((column + 1) * width, size.w)
                segment = _segment(file, page, (plane * down + row) * across + column)
                if segment.shape[0] < num or segment.shape[1] < x1 - x0:
                    raise ValueError(f"a strip or tile holds {segment.shape[1]}x{segment.shape[0]} px")
                pixels[:, x0:x1, channels] = segment[:num, : x1 - x0]
        yield pixels


def _segment(file: BufferedReader, page: _Page, index: int) -> Samples:
    """One strip or tile, `(h, w, samples)`."""
    file.seek(page.dataoffsets[index])
    data = file.read(page.databytecounts[index])
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == _JPEG else {}
    found = page.decode(data, index, **tables)[0]
    if found is None:
        raise ValueError(f"strip or tile {index} is empty")
    return found[0]
