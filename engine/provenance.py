"""What was done to a picture, for the archive that keeps it: a sealed JSON sidecar, and a map of the generated pixels.

The sidecar names files, never folders or machines, so it can move with them. `engine.preservation` says the same in
PREMIS and METS. There is no C2PA manifest: it needs a certificate to sign with, which belongs to the archive.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import pyvips

from engine import __version__
from engine.errors import StorageError
from engine.generated_map import Generated, restored_region
from engine.image import Layout
from engine.models.card import Card
from engine.store import digest_of, write_atomic
from engine.tiling.canvas import ledger_folder, stored_plan
from engine.tiling.layout import object_key
from engine.tiling.ledger import Ledger
from engine.tiling.plan import Plan
from engine.tiling.seal import seal, unseal

SCHEMA = "cra-srgan-engine/provenance"
SCHEMA_VERSION = 1
SIDECAR_SUFFIX = ".provenance.json"

_SOFTWARE = ("torch", "numpy", "zarr")


@dataclass(frozen=True, slots=True)
class Fixity:
    """A file, or a folder as a whole, and by what it is known again."""

    name: str
    sha256: str
    num_bytes: int
    digest_of: Literal["file", "folder", "shards"] = "file"
    """Of a folder's or a canvas' sha256: that of the sorted lines `path sha256` of its files or shards."""

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "sha256": self.sha256, "bytes": self.num_bytes, "digest_of": self.digest_of}


@dataclass(frozen=True, slots=True)
class Restoration:
    """One finished piece of work, as the sidecar tells it."""

    plan: Plan
    card: Card
    image: Fixity
    layout: Layout
    mask: Fixity | None
    outputs: Mapping[str, Fixity]
    """By format."""
    generated: Generated
    generated_map: Fixity | None
    """None where nothing was missing."""
    started: datetime
    ended: datetime
    converted: Sequence[str] = ()
    """What was changed in colour, depth or metadata on the way in, a sentence each."""


def fixity_of(path: Path, *, name: str | None = None) -> Fixity:
    """Reads a file, a folder or all shards of a canvas again. `name`: what a canvas in progress will be called.

    Raises StorageError for what is missing or cannot be read.
    """
    name = name or path.name
    if not path.is_dir():
        digest = digest_of(path)
        return Fixity(name, digest.sha256, digest.num_bytes)
    plan = stored_plan(path)
    if plan is None:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _merkle(name, "folder", ((file.relative_to(path).as_posix(), *_digest(file)) for file in files))
    keys = plan.grid.all_keys()
    stored = ((key.name, *_digest(path / object_key(key.level, key.iy, key.ix))) for key in keys)
    return _merkle(name, "shards", stored)


def recorded_fixity(canvas: Path, *, name: str | None = None) -> Fixity:
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


def describe(work: Restoration) -> dict[str, Any]:
    """The sidecar's content, plain values only."""
    plan, card = work.plan, work.card
    layout = {"size_px": [work.layout.size.h, work.layout.size.w]}
    layout |= {"channels": work.layout.channels, "dtype": work.layout.dtype}
    known = ("data", "recipe", "notes")  # not on which machine, or for how long
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "input": {**work.image.to_json(), **layout},
        "mask": None if work.mask is None else work.mask.to_json(),
        "outputs": {name: fixity.to_json() for name, fixity in work.outputs.items()},
        "generated": _generated(work),
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
        "plan_id": plan.plan_id,
        "plan": plan.to_json(),
        "converted": list(work.converted),
        "software": software(),
        "time": {"started": _utc(work.started), "ended": _utc(work.ended)},
    }


def write_sidecar(path: Path, document: Mapping[str, object]) -> None:
    """Stores what `describe` gave, sealed: a change of any byte of it is noticed. Raises StorageError."""
    write_atomic(path, seal(document))


def check_provenance(path: Path, *, sources: Path | None = None) -> list[str]:
    """What no longer matches a sidecar: a sentence each, none if all is well. Everything it names is read again.

    Outputs are looked for beside the sidecar; the picture and its mask in the folder `sources`, or not at all.
    """
    try:
        document = unseal(path.read_bytes())
    except OSError as error:
        return [f"{path.name}: cannot be read ({error.strerror})"]
    if document is None or document.get("schema") != SCHEMA:
        return [f"{path.name}: is no provenance record of this program, or was changed"]
    if document["version"] != SCHEMA_VERSION:
        return [f"{path.name}: is of version {document['version']}, this program knows {SCHEMA_VERSION}"]
    found = [*document["outputs"].values(), document["generated"]["map"]]
    wrong = [_mismatch(path.parent, entry) for entry in found if entry is not None]
    if sources is not None:
        wrong += [_mismatch(sources, document[name]) for name in ("input", "mask") if document[name] is not None]
    return [sentence for sentence in wrong if sentence is not None]


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


def _generated(work: Restoration) -> dict[str, object]:
    generated, scale = work.generated, int(work.plan.parameters["scale"])
    if scale == 1 and work.plan.size == restored_region(work.plan).size:
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
        "map": None if work.generated_map is None else work.generated_map.to_json(),
    }


def _merkle(name: str, kind: Literal["folder", "shards"], parts: Iterable[tuple[str, str, int]]) -> Fixity:
    lines: list[str] = []
    total = 0
    for part, sha256, num_bytes in parts:
        lines.append(f"{part} {sha256}\n")
        total += num_bytes
    root = hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    return Fixity(name, root, total, kind)


def _digest(path: Path) -> tuple[str, int]:
    digest = digest_of(path)
    return digest.sha256, digest.num_bytes


def _mismatch(folder: Path, entry: Mapping[str, Any]) -> str | None:
    name = cast("str", entry["name"])
    if Path(name).name != name or name == "..":  # a record from elsewhere may not lead out of its folder
        return f"{name!r}: is not a file name"
    try:
        found = fixity_of(folder / name).to_json()
    except StorageError as error:
        return f"{name}: missing or unreadable ({error})"
    wrong = [field for field in ("digest_of", "bytes", "sha256") if found[field] != entry[field]]
    return f"{name}: {wrong[0]} is {found[wrong[0]]}, recorded was {entry[wrong[0]]}" if wrong else None


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
