"""libvips on open files: no file names, no cache, and only the four decoders below can ever start.

By name, libvips would serve the old pixels of a changed file from its cache. (It maps the file of a JPEG: those pages
count as resident, but the system takes them back at will. Python callbacks in its place would
avoid that, but end the process if one is collected before libvips' last reference to it.)
"""

from collections.abc import Mapping
from io import BufferedReader
from typing import Any, BinaryIO, cast

import pyvips


def load(file: BufferedReader, fmt: str, *, directory: int = 0) -> pyvips.Image:
    """Starts the decoder of a "png", "jpeg", "tiff" or "webp" and stops it behind the header; rows follow in order.

    directory: of a TIFF, counted from 0. `file` must not be read from until the pixels are fetched. Damage raises
    pyvips.Error now or then.
    """
    pyvips.cache_set_max(0)  # one decode per picture: a cache would only keep files open and memory in use
    file.seek(0)
    source = pyvips.Source.new_from_descriptor(file.fileno())
    if fmt == "png":
        return pyvips.Image.pngload_source(source, access="sequential", fail_on="warning")
    if fmt == "jpeg":
        return pyvips.Image.jpegload_source(source, access="sequential", fail_on="warning")
    if fmt == "tiff":
        return pyvips.Image.tiffload_source(source, access="sequential", fail_on="warning", page=directory)
    if fmt == "webp":
        return pyvips.Image.webpload_source(source, access="sequential", fail_on="warning")
    raise ValueError(f"no decoder is allowed for {fmt}")


def carrying(image: pyvips.Image, blobs: Mapping[str, bytes]) -> pyvips.Image:
    """The same picture with metadata under libvips' names, such as "icc-profile-data"."""
    image = image.copy()
    for name, data in blobs.items():
        image.set_type(pyvips.GValue.blob_type, name, cast("Any", data))  # its stub knows no bytes
    return image


class FileTarget:
    """Where libvips writes to. It keeps the OSError, of which libvips would only tell that there was one."""

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file
        self.target = pyvips.TargetCustom()
        self.target.on_write(self._write)

    def _write(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            return -1
