"""Pictures in: header checks, a streamed decode into a staged file, and boxes of it on demand.

Pixels outside the network are `(h, w, c)` uint8 or uint16, c = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + straight alpha.
Palettes and 1-bit pictures arrive expanded, exactly; EXIF orientation is applied once, when a box is read. What is
converted (CMYK, floating point, alpha multiplied into the colours) is named in `ImageInfo.converted`.
"""

import hashlib
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyvips
from numpy.typing import NDArray

from engine import jpeg2000, ome_zarr, tiff_segments, vips
from engine.conversion import (
    cmyk_to_rgb,
    float_to_uint16,
    is_cmyk_profile,
    spread,
    srgb_profile,
    to_straight,
)
from engine.errors import InputError, ModelError, TooManyPixels, UnreadableInput, UnsupportedInput
from engine.geometry import Box, Size
from engine.header import MAX_WORKING_BYTES, Header, check_png_end, read_header
from engine.metadata import Metadata, read_metadata
from engine.staged import Pixels, RawFile, check_inside, oriented

MAX_PIXELS = 1 << 30

_STRIP_ROWS = 256
_STRIP_BYTES = 8 << 20
_CMYK_STRIP_BYTES = 64 << 20
"""Larger: lcms prepares its tables anew for each strip."""
_VIPS_FORMATS = {"uint8": "uchar", "uint16": "ushort", "float32": "float"}


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says; nothing is decoded for it."""

    path: Path
    format: str
    """"png", "jpeg", "tiff", "webp", "jpeg2000" or "ome-zarr"."""
    size: Size
    """After EXIF orientation."""
    channels: int
    dtype: str
    """"uint8" or "uint16"."""
    orientation: int
    """EXIF 1 to 8; the value of the file, which `size` and `Picture.read` have applied already."""
    metadata: Metadata
    page: int | None = None
    """Which page of the file was asked for, counted from 0; None where none was, and the file has one."""
    converted: str | None = None
    """How the pixels differ from the stored samples, for the provenance; None where they are the same."""

    @property
    def has_alpha(self) -> bool:
        return self.channels in (2, 4)


class Layout(Protocol):
    """What a plan needs to know of a picture."""

    @property
    def size(self) -> Size: ...

    @property
    def channels(self) -> int: ...

    @property
    def dtype(self) -> str: ...


class Source(Layout, Protocol):
    """Anything that boxes of pixels can be read from."""

    def read(self, box: Box) -> Pixels:
        """The pixels of a box inside the picture, as an array of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture in a staged file, or an OME-Zarr that is read where it lies."""

    info: ImageInfo
    sha256: str
    """Of the bytes of the file that was decoded; of an OME-Zarr, see `ome_zarr.digest`."""
    raw: RawFile | ome_zarr.Plane

    @property
    def size(self) -> Size:
        return self.info.size

    @property
    def channels(self) -> int:
        return self.info.channels

    @property
    def dtype(self) -> str:
        return self.info.dtype

    def read(self, box: Box) -> Pixels:
        return self.raw.read(box)

    def discard(self) -> None:
        """Removes the staged file, if there is one."""
        if isinstance(self.raw, RawFile):
            self.raw.path.unlink()


class ArrayPicture:
    """A picture in memory, `(h, w, c)` or `(h, w)` uint8 or uint16; read like one in a file."""

    def __init__(self, pixels: Pixels, *, path: Path | None = None) -> None:
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        name = "the array" if path is None else str(path)
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or pixels.size == 0:
            raise UnsupportedInput(f"{name}: a picture is (h, w, c) with 1 to 4 channels, this is {pixels.shape}.")
        if pixels.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            raise UnsupportedInput(f"{name}: a picture is uint8 or uint16, this is {pixels.dtype}. Convert it.")
        self.path = path
        self.pixels = pixels
        self.size = Size(*pixels.shape[:2])
        self.channels = int(pixels.shape[2])
        self.dtype = pixels.dtype.name
        digest = hashlib.sha256(f"{pixels.shape} {self.dtype}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
        self.sha256 = digest.hexdigest()
        """Of the pixels and their shape."""

    def read(self, box: Box) -> Pixels:
        check_inside(box, self.size)
        return self.pixels[box.slices].copy()


def probe(path: Path, *, max_pixels: int = MAX_PIXELS, page: int | None = None) -> ImageInfo:
    """What the header of a picture says, in milliseconds. Raises an InputError for what is not restored.

    path: a PNG, JPEG, TIFF, WebP or JPEG 2000 file, or the folder of an OME-Zarr. page: of a TIFF, counted from 0.
    """
    if ome_zarr.is_zarr(path):
        return _probe_zarr(path, max_pixels, page)
    with _opened(path) as file:
        header = read_header(file, path, page=page)
        _check_num_pixels(path, header.size, max_pixels)
        if header.working_bytes > MAX_WORKING_BYTES:
            raise UnsupportedInput(
                f"{path}: decoding needs {header.working_bytes:,} bytes at once, the limit is {MAX_WORKING_BYTES:,}. "
                "Save it without interlacing, as a baseline JPEG, or as a TIFF in tiles or small strips."
            )
        return _info(path, header, _load(file, path, header), file, page)


def digest(info: ImageInfo) -> str:
    """The sha256 that `decode` will state: of the file's bytes, or of the stored objects of an OME-Zarr."""
    if info.format == "ome-zarr":
        return ome_zarr.digest(info.path)
    with _opened(info.path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode(info: ImageInfo, scratch: Path) -> Picture:
    """Decodes strip by strip into a file in `scratch`, which is created. The file lives as long as `scratch` does.

    An OME-Zarr is not staged: its chunks are read when they are asked for.
    Raises UnreadableInput for cut off, damaged or changing files (never a partly decoded picture), StorageFull.
    """
    if info.format == "ome-zarr":
        if _probe_zarr(info.path, info.size.num_pixels, info.page) != info:
            raise UnreadableInput(f"{info.path}: changed since its header was read ({info.size}). Run again.")
        return Picture(info, ome_zarr.digest(info.path), ome_zarr.Plane(info.path))
    with _opened(info.path) as file:
        before = os.fstat(file.fileno())
        header = read_header(file, info.path, page=info.page)
        if header.format == "png":
            check_png_end(file, info.path)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        image = _load(file, info.path, header)
        if _info(info.path, header, image, file, info.page) != info:
            raise UnreadableInput(f"{info.path}: changed since its header was read ({info.size}). Run again.")
        name = sha256[:16] if info.page is None else f"{sha256[:16]}-{info.page}"
        raw = RawFile(scratch / f"{name}.raw", header.size, header.channels, header.dtype, info.orientation)
        raw.write(strip.tobytes() for strip in _converted_strips(file, info.path, header, image))
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raw.path.unlink()
        raise UnreadableInput(f"{info.path}: changed while it was read ({before.st_size} bytes before). Run again.")
    return Picture(info, sha256, raw)


def to_rgb_float(pixels: Pixels) -> NDArray[np.float32]:
    """`(h, w, 3)` in [0, 1] from `(h, w, c)`: alpha is dropped, grey is repeated."""
    colour = pixels[..., : 1 if pixels.shape[2] <= 2 else 3]
    rgb = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    return rgb.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def from_rgb_float(
    rgb: NDArray[np.float32], *, channels: int, dtype: str, alpha: NDArray[np.float32] | None = None
) -> Pixels:
    """`(h, w, c)` from `(h, w, 3)` and alpha `(h, w)`, both in [0, 1]: clipped, rounded half to even.

    Grey is the mean of the three. Alpha must be given exactly where `channels` has one. Raises ModelError for NaN.
    """
    if (alpha is not None) != (channels in (2, 4)):
        raise ValueError(f"{channels} channels {'need' if alpha is None else 'have no'} alpha")
    colour = rgb.mean(axis=2, keepdims=True, dtype=np.float32) if channels <= 2 else rgb
    values = colour if alpha is None else np.concatenate([colour, alpha[..., None]], axis=2)
    if values.size and np.isnan(values.min()):
        raise ModelError("the network returned values that are not numbers. Try --precision fp32 or another model.")
    top = np.float32(np.iinfo(dtype).max)
    return np.rint(np.clip(values, 0, 1) * top).astype(dtype)


@contextmanager
def _opened(path: Path) -> Generator[BufferedReader]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableInput(f"{path}: not a file. Give a picture file or the folder of an OME-Zarr.")
        file = path.open("rb")
    except OSError as error:
        raise UnreadableInput(f"{path}: cannot be opened ({error.strerror}). Check the name and the rights.") from error
    with file:
        try:
            yield file
        except pyvips.Error as error:
            raise _refusal(path, error) from error


def _check_num_pixels(path: Path, size: Size, max_pixels: int) -> None:
    if size.num_pixels > max_pixels:
        raise TooManyPixels(
            f"{path}: {size} is {size.num_pixels:,} pixels, the limit is {max_pixels:,}. "
            "Raise the limit or cut the picture."
        )


def _probe_zarr(path: Path, max_pixels: int, page: int | None) -> ImageInfo:
    if page:
        raise UnsupportedInput(f"{path}: page {page} is asked for, an OME-Zarr has 1. Leave --page away, or give 0.")
    layout = ome_zarr.read_layout(path)
    _check_num_pixels(path, layout.size, max_pixels)
    metadata = Metadata.from_archived(layout.archive, name=str(path))
    return ImageInfo(path, "ome-zarr", layout.size, layout.channels, layout.dtype, 1, metadata, page)


def _load(file: BufferedReader, path: Path, header: Header) -> pyvips.Image:
    """The matching decoder, stopped behind the header. Raises UnsupportedInput if it sees something else there."""
    if header.format == "jpeg2000":
        return jpeg2000.described(file, path, header)
    image = vips.load(file, header.format, directory=header.directory)
    said = (image.width, image.height, image.bands, image.format)
    wanted = (header.size.w, header.size.h, header.stored_channels, _VIPS_FORMATS[header.stored_dtype])
    if said != wanted and not header.palette:
        raise UnsupportedInput(f"{path}: the decoder sees {said}, the header says {wanted}. Convert it to PNG.")
    return image


def _info(path: Path, header: Header, image: pyvips.Image, file: BufferedReader, page: int | None) -> ImageInfo:
    fields = set(image.get_fields())
    orientation = cast("int", image.get("orientation")) if "orientation" in fields else 1
    orientation = orientation if 1 <= orientation <= 8 else 1
    if header.conversion == "cmyk":
        _cmyk_profile(path, image)
        image = vips.carrying(image, {"icc-profile-data": srgb_profile()})
    return ImageInfo(
        path=path,
        format=header.format,
        size=oriented(header.size, orientation),
        channels=header.channels,
        dtype=header.dtype,
        orientation=orientation,
        metadata=read_metadata(image, header, file, orientation=orientation),
        page=page,
        converted=header.converted,
    )


def _cmyk_profile(path: Path, image: pyvips.Image) -> bytes:
    """The embedded profile of a CMYK picture. Raises UnsupportedInput where there is none: the inks are unknown."""
    found = "icc-profile-data" in image.get_fields()
    icc = bytes(cast("bytes", image.get("icc-profile-data"))) if found else b""
    if not is_cmyk_profile(icc):
        raise UnsupportedInput(
            f"{path}: CMYK with {f'a profile of {icc[16:20]!r}' if found else 'no profile'}: its colours are not "
            "defined. Assign the CMYK profile it was made for, or convert it to RGB."
        )
    return icc


def _converted_strips(file: BufferedReader, path: Path, header: Header, image: pyvips.Image) -> Iterator[Pixels]:
    """The picture's rows, top to bottom."""
    profile = _cmyk_profile(path, image) if header.conversion == "cmyk" else b""
    for stored in _stored_strips(file, path, header, image):
        match header.conversion:
            case "cmyk":
                yield cmyk_to_rgb(stored, profile, path)
            case "float":
                yield float_to_uint16(stored, path)
            case "premultiplied":
                yield to_straight(stored, path)
            case "bits":
                yield spread(stored, header.stored_bits)
            case _:
                yield stored


def _stored_strips(file: BufferedReader, path: Path, header: Header, image: pyvips.Image) -> Iterator[NDArray[Any]]:
    """The stored rows, `(rows, w, stored channels)`, from whichever decoder reads them."""
    if header.format == "jpeg2000":
        yield jpeg2000.decode(file, path, header)
        return
    if header.needs_tifffile:
        yield from tiff_segments.strips(file, path, header)
        return
    region = pyvips.Region.new(image)
    h, w, channels, dtype = header.size.h, header.size.w, header.stored_channels, np.dtype(header.stored_dtype)
    row_bytes = w * channels * dtype.itemsize
    rows = max(1, min(_STRIP_ROWS, _STRIP_BYTES // row_bytes))
    if header.conversion == "cmyk":
        rows = max(1, _CMYK_STRIP_BYTES // row_bytes)
    for y in range(0, h, rows):
        num = min(rows, h - y)
        yield np.frombuffer(region.fetch(0, y, w, num), dtype).reshape(num, w, channels)


def _refusal(path: Path, error: pyvips.Error) -> InputError:
    if "tile size out of range" in str(error):  # tiles far larger than the picture
        return UnsupportedInput(f"{path}: a TIFF whose tiles are too large for its size. Save it in strips.")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UnreadableInput(f"{path}: truncated or damaged ({'; '.join(lines[:3])}). Copy or scan it anew.")
