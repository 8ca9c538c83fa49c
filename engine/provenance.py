"""What was done to a picture, for the archive that keeps it: the facts of a receipt.

They name files, never folders or machines, so they can move with them. `engine.preservation` says the same in PREMIS
and METS, `engine.credentials` in C2PA.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import pyvips

from engine import __version__
from engine.errors import StorageError
from engine.generated_map import Generated, restored_region
from engine.image import ImageInfo
from engine.models.card import Card
from engine.objects import Place, Prefix
from engine.store import Digest, digest_of
from engine.tiling.canvas import ledger_folder, stored_plan
from engine.tiling.layout import object_key
from engine.tiling.ledger import Ledger
from engine.tiling.plan import Plan

_SOFTWARE = ("torch", "numpy", "zarr")


@dataclass(frozen=True, slots=True)
class Fixity:
    """A file, or a folder as a whole, and by what it is known again."""

    name: str
    sha256: str
    num_bytes: int
    digest_of: Literal["file", "folder", "shards", "level"] = "file"
    """What else than a file has is the sha256 of sorted lines `path sha256`: of the files of a folder, of the shards of
    a canvas, or of the metadata and chunks of the full-size level of an OME-Zarr (`engine.ome_zarr.digest`)."""

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "sha256": self.sha256, "bytes": self.num_bytes, "digest_of": self.digest_of}


def fixity_of(path: Path, *, digest: Callable[[Path], Digest] = digest_of) -> Fixity:
    """Of a file, a folder or all shards of a canvas, each of which is read again, or asked of `digest`.

    Raises StorageError for what is missing or cannot be read.
    """
    if not path.is_dir():
        return Fixity(path.name, *_read(path, digest))
    plan = stored_plan(path)
    if plan is None:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _merkle(
            path.name, "folder", ((file.relative_to(path).as_posix(), *_read(file, digest)) for file in files)
        )
    keys = plan.grid.all_keys()
    stored = ((key.name, *_read(path / object_key(key.level, key.iy, key.ix), digest)) for key in keys)
    return _merkle(path.name, "shards", stored)


def folder_fixity(root: Prefix, *, name: str) -> Fixity:
    """As `fixity_of` for a folder, of all objects below a prefix."""
    digests = ((key, root.digest(key)) for key in root.keys())  # noqa: SIM118  no mapping
    return _merkle(name, "folder", ((key, digest.sha256, digest.num_bytes) for key, digest in digests))


def recorded_fixity(canvas: Place, *, name: str | None = None) -> Fixity:
    """As `fixity_of` for a canvas, by the records of its ledger: no shard is read. Raises StorageError without them."""
    plan = stored_plan(canvas)
    if plan is None:
        raise StorageError(f"{canvas}: is not an output of this program; give a folder that `restore` has made")
    ledger = Ledger(ledger_folder(canvas), plan_id=plan.plan_id)
    lines: list[tuple[str, str, int]] = []
    for key in plan.grid.all_keys():
        record = ledger.peek(key)
        if record is None:
            raise StorageError(f"{canvas}: shard {key.name} is not finished; run the same command again")
        lines.append((key.name, record.sha256, record.num_bytes))
    return _merkle(name or canvas.name, "shards", lines)


def describe(
    plan: Plan,
    card: Card,
    image: ImageInfo,
    *,
    mask: Path | None,
    generated: Generated,
) -> dict[str, object]:
    """The facts of a restoration that the plan alone does not tell, plain values only."""
    source = Fixity(image.path.name, plan.input_sha256, *_extent(image.path))
    holes = None if mask is None else Fixity(mask.name, plan.mask_sha256, mask.stat().st_size)
    layout = {"size_px": [image.size.h, image.size.w], "channels": image.channels, "dtype": image.dtype}
    known = ("data", "recipe", "notes")  # not on which machine, or for how long
    return {
        "input": {**source.to_json(), **layout},
        "mask": None if holes is None else holes.to_json(),
        "generated": _shares(plan, generated),
        "model": {
            "name": card.name,
            "sha256": card.sha256,
            "network": card.network,
            "task": card.task,
            "degradation": card.degradation,
            "licence": card.licence,
            "parameters": card.parameters,
            "training": {name: card.training[name] for name in known if name in card.training},
        },
        "converted": [] if image.converted is None else [image.converted],
        "left_out": list(image.metadata.left_out),
        "software": software(),
    }


def software() -> dict[str, str]:
    """Names and versions of what has to do with pixels. Nothing is loaded for it."""
    versions = {"cra-srgan-engine": __version__}
    for name in _SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    versions["libvips"] = ".".join(str(pyvips.version(part)) for part in range(3))
    return versions


def _extent(path: Path) -> tuple[int, Literal["file", "level"]]:
    """The bytes of an input, and what its digest is of."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), "level"
    return path.stat().st_size, "file"


def _shares(plan: Plan, generated: Generated) -> dict[str, object]:
    scale = int(plan.parameters["scale"])
    if scale == 1 and plan.size == restored_region(plan).size:
        statement = "Pixels that were not missing are those of the input; missing ones were generated by the model."
    elif scale == 1:
        statement = "Missing pixels were generated by the model; then all were averaged to the size of the output."
    else:
        statement = "Every output pixel was computed by the model; those of the map from no input pixel of their own."
    return {
        "missing_px": generated.missing_px,
        "of_px": generated.region_px,
        "share": generated.missing_px / generated.region_px,
        "every_pixel_computed": scale > 1,
        "statement": statement,
    }


def _merkle(name: str, kind: Literal["folder", "shards"], parts: Iterable[tuple[str, str, int]]) -> Fixity:
    lines: list[str] = []
    total = 0
    for part, sha256, num_bytes in parts:
        lines.append(f"{part} {sha256}\n")
        total += num_bytes
    root = hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    return Fixity(name, root, total, kind)


def _read(path: Path, digest: Callable[[Path], Digest]) -> tuple[str, int]:
    found = digest(path)
    return found.sha256, found.num_bytes
