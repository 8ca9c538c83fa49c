"""The Zarr hierarchy of an output: laid out whole before the first pixel, described as OME-Zarr 0.5."""

import json
from typing import Any, TypeAlias

import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from engine.errors import StorageError, UnsupportedInput
from engine.metadata import Metadata
from engine.objects import Place, objects_at
from engine.tiling.durable import DurableStore
from engine.tiling.plan import Plan

PlaneArray: TypeAlias = "zarr.Array[Any]"
"""One level as stored: (c, y, x)."""

_COLOURS = {
    1: (("grey", "FFFFFF"),),
    2: (("grey", "FFFFFF"), ("alpha", "FFFFFF")),
    3: (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF")),
    4: (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"), ("alpha", "FFFFFF")),
}
"""Name and display colour of each channel, by their number."""
_RESOLUTIONS_PX_PER_MM = (1e-9, 1e8)  # a satellite's pixels, and what a TIFF can state


def lay_out(store: DurableStore, plan: Plan, *, metadata: Metadata | None = None) -> None:
    """Writes the group and one empty array per level. Metadata only: shards that exist already stay.

    OME-Zarr has no place for a profile, EXIF, XMP or IPTC: `metadata` goes into the group's attribute `archive`.
    """
    objects = described(plan, metadata)
    for key in sorted(objects):  # one after another: of writes side by side, some go on when one has failed
        store.set_sync(key, objects[key])


def described(plan: Plan, metadata: Metadata | None = None) -> dict[str, Buffer]:
    """The objects that `lay_out` stores, by their keys."""
    objects: dict[str, Buffer] = {}
    store = MemoryStore(objects)
    attributes: dict[str, Any] = {"ome": _ome(plan)}
    if archive := (metadata or Metadata()).archived(plan.size):
        attributes["archive"] = archive
    group = zarr.open_group(  # pyright: ignore[reportUnknownMemberType]
        store, mode="a", zarr_format=3, attributes=attributes
    )
    group.create_group("_engine")  # or every reader that lists the group is warned of a folder that is not Zarr
    for level, size in enumerate(plan.grid.level_sizes):
        chunk, shard = plan.grid.chunk_shape(level), plan.grid.shard_shape(level)
        group.create_array(
            str(level),
            shape=(plan.channels, size.h, size.w),
            chunks=(plan.channels, chunk.h, chunk.w),
            shards=(plan.channels, shard.h, shard.w),
            dtype=plan.dtype,
            # Level 1 writes twice as fast as level 3 for one per cent more bytes; the checksum makes a flipped bit a
            # loud error where zstd alone might decode it to other pixels. (The shard's index has a crc32c of its own.)
            compressors=ZstdCodec(level=1, checksum=True),
            filters=None,
            fill_value=0,
            dimension_names=("c", "y", "x"),
            config={"write_empty_chunks": True},  # or a black shard would leave no object, as one never written
        )
    return objects


def stored_metadata(root: Place) -> Metadata:
    """What `lay_out` was given for the output at `root`. Raises StorageError where it cannot be read."""
    lowest, highest = _RESOLUTIONS_PX_PER_MM
    try:
        attributes = json.loads(objects_at(root).get("zarr.json") or b"").get("attributes", {})
        metadata = Metadata.from_archived(attributes.get("archive", {}), name=str(root))
        if not all(lowest <= side <= highest for side in metadata.resolution_px_per_mm or ()):
            raise ValueError(f"{metadata.resolution_px_per_mm} px per mm are no resolution")
        return metadata
    except UnsupportedInput as error:
        raise StorageError(str(error)) from error
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise StorageError(f"{root}: zarr.json cannot be read ({error}). Restore the picture again.") from error


def open_arrays(store: Store, plan: Plan, *, root: Place) -> tuple[PlaneArray, ...]:
    """The arrays of all levels, full size first; StorageError where another lay-out is stored at `root`."""
    arrays: list[PlaneArray] = []
    for level, size in enumerate(plan.grid.level_sizes):
        try:
            array: PlaneArray = zarr.open_array(  # pyright: ignore[reportUnknownMemberType]
                store, path=str(level), mode="r" if store.read_only else "r+"
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise StorageError(f"{root}: level {level} cannot be opened ({error}); delete the folder") from error
        if array.shape != (plan.channels, size.h, size.w) or array.dtype != plan.dtype:
            raise StorageError(f"{root}: level {level} is not what its plan says; delete the folder")
        arrays.append(array.with_config({"write_empty_chunks": True}))
    return tuple(arrays)


def object_key(level: int, iy: int, ix: int) -> str:
    """The key of the stored object that holds one shard (all its channels)."""
    return f"{level}/c/0/{iy}/{ix}"


def _ome(plan: Plan) -> dict[str, object]:
    """The `ome` attribute: https://ngff.openmicroscopy.org/0.5/, multiscales and omero."""
    full = plan.grid.level_sizes[0]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [{"type": "scale", "scale": [1.0, full.h / size.h, full.w / size.w]}],
        }
        for level, size in enumerate(plan.grid.level_sizes)
    ]
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    top = 255 if plan.dtype == "uint8" else 65535
    channels = [
        {
            "label": label,
            "color": colour,
            "active": label != "alpha",
            "coefficient": 1,
            "family": "linear",
            "inverted": False,
            "window": {"min": 0, "max": top, "start": 0, "end": top},
        }
        for label, colour in _COLOURS[plan.channels]
    ]
    return {
        "version": "0.5",
        "multiscales": [{"name": plan.name, "axes": axes, "datasets": datasets, "type": "mean"}],
        "omero": {"channels": channels, "rdefs": {"model": "color" if plan.channels > 2 else "greyscale"}},
    }
