"""OME-Zarr 0.4 and 0.5 pictures, read box by box where they lie: the full-size level of the first multiscale.

    https://ngff.openmicroscopy.org/0.4/ (Zarr 2), https://ngff.openmicroscopy.org/0.5/ (Zarr 3)

The metadata is checked before Zarr opens anything: shapes, chunk sizes, and codecs from a list, for Zarr 2 would start
any that is registered. A chunk that is not stored reads as empty pixels, so a picture that lacks one is refused.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, cast

import numpy as np
import zarr

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Box, Size, ceil_div
from engine.picture_header import MAX_WORKING_BYTES
from engine.staged import Pixels, check_inside
from engine.store import open_regular

_MAX_JSON_BYTES = 8 << 20
_MAX_OBJECTS = 1 << 20
_DTYPES = {"uint8": "uint8", "uint16": "uint16", "|u1": "uint8", "<u2": "uint16", ">u2": "uint16"}
_CODECS = {"bytes", "blosc", "gzip", "zstd", "crc32c", "transpose", "sharding_indexed"}
_COMPRESSORS = {"blosc", "gzip", "zlib", "zstd", "lz4", "bz2"}
_RGB = ["FF0000", "00FF00", "0000FF"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the metadata says of the level that is read."""

    size: Size
    channels: int
    dtype: str
    level: Path
    """The folder of the array."""
    has_channel_axis: bool
    metadata_name: str
    """"zarr.json" or ".zarray"."""
    grid: tuple[int, ...]
    """Stored objects along each axis."""
    key_prefix: str
    separator: str
    archive: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What this engine notes of profile and resolution; empty elsewhere."""

    def keys(self) -> list[str]:
        """Of all objects that hold pixels, relative to `level`."""
        return [
            self.key_prefix + self.separator.join(map(str, place))
            for place in product(*(range(count) for count in self.grid))
        ]


class Plane:
    """The pixels of an OME-Zarr; each read opens, decodes and forgets the chunks that it needs."""

    def __init__(self, path: Path) -> None:
        layout = read_layout(path)
        self.path, self.size, self.channels, self.dtype = path, layout.size, layout.channels, layout.dtype
        self._has_channel_axis = layout.has_channel_axis
        try:
            self._array = cast("Any", zarr.open_array(layout.level, mode="r"))  # pyright: ignore[reportUnknownMemberType]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UnreadableInput(
                f"{path}: level {layout.level.name} cannot be opened ({error}). Copy it anew."
            ) from error

    def read(self, box: Box) -> Pixels:
        """`(h, w, c)` of a box inside the picture. Raises UnreadableInput for a chunk that is damaged or gone."""
        check_inside(box, self.size)
        try:
            stored = np.asarray(self._array[(..., *box.slices)])
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            raise UnreadableInput(f"{self.path}: a chunk of {box} is damaged ({error}). Copy it anew.") from error
        pixels = np.moveaxis(stored, 0, 2) if self._has_channel_axis else stored[..., None]
        return np.ascontiguousarray(pixels, dtype=np.dtype(self.dtype))


def is_zarr(path: Path) -> bool:
    """Whether this is a folder that is named as Zarr hierarchies are."""
    return path.suffix.lower() == ".zarr" and path.is_dir()


def digest(path: Path) -> str:
    """The sha256 of a listing, one line per stored object of the level: its key, a space, the sha256 of its bytes.

    The lines are sorted by key and end in a newline; the array's own metadata is one of the objects.
    Raises UnreadableInput where an object is missing, empty, or no plain file.
    """
    layout = read_layout(path)
    listing = hashlib.sha256()
    for key in sorted([layout.metadata_name, *layout.keys()]):
        try:
            with open_regular(layout.level / key) as file:
                if os.fstat(file.fileno()).st_size == 0:  # Zarr reads an empty shard as one of empty chunks
                    raise OSError(errno.ENODATA, "0 bytes")
                listing.update(f"{key} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise UnreadableInput(
                f"{path}: the chunk {key}, 1 of {prod(layout.grid)}, is not stored ({error.strerror}): it is lost, or "
                "was empty when it was written. Copy it anew, or write it with empty chunks."
            ) from error
    return listing.hexdigest()


def read_layout(path: Path) -> Layout:
    """Raises UnsupportedInput for what is not restored, UnreadableInput for metadata that is missing or damaged."""
    attributes, version = _attributes(path)
    ome = cast("dict[str, Any]", attributes.get("ome", {}) if version == 3 else attributes)
    try:
        multiscale = ome["multiscales"][0]
        axes = [axis["name"] for axis in multiscale["axes"]]
        level_name = str(multiscale["datasets"][0]["path"])
    except (KeyError, IndexError, TypeError) as error:
        raise UnsupportedInput(
            f"{path}: a Zarr without OME-Zarr 0.4 or 0.5 multiscales ({error!r}). Write it as OME-Zarr, or as TIFF."
        ) from error
    if axes not in (["c", "y", "x"], ["y", "x"]):
        _refuse(path, f"axes {','.join(map(str, axes))}", "c,y,x and y,x are restored; write one plane")
    level = _inside(path, level_name)
    stored = _json(path, level / ("zarr.json" if version == 3 else ".zarray"))
    try:
        layout = (_layout_3 if version == 3 else _layout_2)(path, level, stored, len(axes) == 3)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnreadableInput(
            f"{path}: the metadata of level {level_name} is damaged ({error!r}). Copy it anew."
        ) from error
    _check_channels(path, ome, layout.channels)
    archive = attributes.get("archive")
    return layout if not isinstance(archive, dict) else _with_archive(layout, cast("dict[str, Any]", archive))


def _with_archive(layout: Layout, archive: dict[str, Any]) -> Layout:
    return replace(layout, archive=archive)


def _attributes(path: Path) -> tuple[dict[str, Any], int]:
    """The attributes of the group, and the version of Zarr."""
    if (path / "zarr.json").is_file():
        return cast("dict[str, Any]", _json(path, path / "zarr.json").get("attributes", {})), 3
    if (path / ".zattrs").is_file():
        return _json(path, path / ".zattrs"), 2
    raise UnreadableInput(f"{path}: neither zarr.json nor .zattrs is there. Give the folder of an OME-Zarr.")


def _json(path: Path, file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_JSON_BYTES + 1)
        found = json.loads(data[:_MAX_JSON_BYTES]) if len(data) <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableInput(f"{path}: {file.name} is missing or damaged ({error}). Copy it anew.") from error
    if not isinstance(found, dict):
        raise UnreadableInput(f"{path}: {file.name} of {len(data):,} bytes or more holds no object. Copy it anew.")
    return cast("dict[str, Any]", found)


def _inside(path: Path, level_name: str) -> Path:
    """The folder of a level. Raises UnsupportedInput for one outside the picture."""
    level = path / PurePosixPath(level_name)
    if not level.resolve().is_relative_to(path.resolve()) or level.resolve() == path.resolve():
        _refuse(path, f"its pixels at {level_name!r}, outside of it", "copy it whole")
    return level


def _layout_3(path: Path, level: Path, stored: dict[str, Any], has_channels: bool) -> Layout:
    chunks, codecs = stored["chunk_grid"]["configuration"]["chunk_shape"], stored["codecs"]
    if stored["chunk_grid"]["name"] != "regular" or stored.get("node_type") != "array":
        _refuse(path, "an irregular chunk grid", "write it anew")
    inner = _check_codecs(path, codecs, chunks)
    encoding = stored.get("chunk_key_encoding", {"name": "default"})
    default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    prefix = f"c{separator}" if default else ""
    return _layout(path, level, stored["data_type"], stored["shape"], chunks, inner, has_channels, prefix, separator)


def _layout_2(path: Path, level: Path, stored: dict[str, Any], has_channels: bool) -> Layout:
    compressor = stored.get("compressor")
    if stored.get("filters") or (compressor is not None and compressor["id"] not in _COMPRESSORS):
        named = [] if compressor is None else [compressor["id"]]
        _refuse(path, f"codecs {named + list(stored.get('filters') or [])}", f"{sorted(_COMPRESSORS)} are read")
    chunks, separator = stored["chunks"], stored.get("dimension_separator", ".")
    return _layout(path, level, stored["dtype"], stored["shape"], chunks, chunks, has_channels, "", separator)


def _check_codecs(path: Path, codecs: list[dict[str, Any]], chunks: list[int]) -> list[int]:
    """The shape that is decoded at once. Raises UnsupportedInput for a codec that is not on the list."""
    for codec in codecs:
        if codec["name"] not in _CODECS:
            _refuse(path, f"the codec {codec['name']!r}", f"{sorted(_CODECS)} are read")
        if codec["name"] == "sharding_indexed":
            settings = codec["configuration"]
            _check_codecs(path, settings.get("index_codecs", []), chunks)
            return _check_codecs(path, settings["codecs"], settings["chunk_shape"])
    return chunks


def _layout(
    path: Path,
    level: Path,
    data_type: object,
    shape: list[int],
    chunks: list[int],
    inner: list[int],
    has_channels: bool,
    key_prefix: str,
    separator: str,
) -> Layout:
    dtype = _DTYPES.get(data_type) if isinstance(data_type, str) else None
    if dtype is None:
        _refuse(path, f"values of {data_type}", "uint8 and uint16 are restored")
    num_axes = 3 if has_channels else 2
    whole = all(type(side) is int and side > 0 for side in (*shape, *chunks, *inner))
    if not whole or {len(shape), len(chunks), len(inner)} != {num_axes} or separator not in ("/", "."):
        raise UnreadableInput(f"{path}: a level of {shape} in chunks of {chunks} has no such axes. Copy it anew.")
    channels = shape[0] if has_channels else 1
    if channels > 4:
        _refuse(path, f"{channels} channels", "grey and RGB with at most one alpha channel are restored")
    chunk_bytes = prod(inner) * np.dtype(dtype).itemsize
    if chunk_bytes > MAX_WORKING_BYTES:
        _refuse(path, f"chunks of {chunk_bytes:,} bytes, the limit is {MAX_WORKING_BYTES:,}", "write smaller chunks")
    grid = tuple(ceil_div(side, chunk) for side, chunk in zip(shape, chunks, strict=True))
    if prod(grid) > _MAX_OBJECTS:
        _refuse(path, f"{prod(grid):,} stored chunks, the limit is {_MAX_OBJECTS:,}", "write larger chunks or shards")
    name = "zarr.json" if (level / "zarr.json").is_file() else ".zarray"
    return Layout(Size(*shape[-2:]), channels, dtype, level, has_channels, name, grid, key_prefix, separator)


def _check_channels(path: Path, ome: dict[str, Any], channels: int) -> None:
    """Three channels are RGB unless their display colours say otherwise; a second or fourth must be called alpha."""
    try:
        told = [(str(c.get("label", "")).lower(), str(c.get("color", "")).upper()) for c in ome["omero"]["channels"]]
    except (KeyError, TypeError, AttributeError):
        told = []
    colours = [colour for _, colour in told[:3]]
    if channels >= 3 and told and colours != _RGB:
        _refuse(path, f"channels shown as {', '.join(colours)}", "red, green and blue are restored")
    if channels in (2, 4) and (len(told) != channels or told[-1][0] != "alpha"):
        _refuse(path, f"{channels} channels, the last not labelled alpha in omero", "label it, or leave it out")


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise UnsupportedInput(f"{path}: an OME-Zarr with {what}; {remedy}.")
