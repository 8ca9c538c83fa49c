"""Outputs on an object store: the pointer that publishes them, their check, and what no pointer names.

Below an output prefix there is ``<name>.json``, the receipt of a picture: readers follow it and look at nothing else.
What it names lies below ``<name>/<plan_id>/``: the canvas as ``<name>.zarr``, and each exported file in a part of its
own that is called by its digest, so that no other encoder's bytes ever take its place. The pointer is stored last, on
the condition that it still is what was read before: of two writers each sees what the other has published.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engine.errors import OutputBusy, OutputExists, StorageError, UnreadableInput
from engine.failpoints import hit
from engine.objects import Prefix
from engine.provenance import Fixity, fixity_of, folder_fixity, recorded_fixity
from engine.receipt import new_receipt, parse_receipt
from engine.tiling.canvas import damaged_metadata, ledger_folder, stored_plan
from engine.tiling.damage import Kind, Problem, Progress
from engine.tiling.layout import object_key
from engine.tiling.ledger import Ledger
from engine.tiling.plan import Plan
from engine.tiling.remote_canvas import RemoteCanvas, canvas_prefix, plan_prefix
from engine.tiling.seal import seal

CANVAS = "ome-zarr"
QUIET = timedelta(days=1)
"""What no pointer names may have a writer while it is younger: there are no locks to tell."""

_MOST_CONFLICTS = 5
_OF_A_PLAN = re.compile(r"(?P<name>.+?)/(?P<plan>[0-9a-f]{64})/(?P<part>[^/]+)(/.*)?")


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a picture's pointer says, and the tag of the object that says it."""

    receipt: dict[str, Any] | None
    """None: it is damaged, or another program's."""
    tag: str

    def is_of(self, plan_id: str) -> bool:
        return self.receipt is not None and self.receipt["plan_id"] == plan_id


def read_pointer(out: Prefix, name: str) -> Pointer | None:
    """The pointer of a picture; None where there is none."""
    found = out.read(_pointer_key(name))
    if found is None:
        return None
    receipt = parse_receipt(found[0])
    if receipt is None or receipt["plan"]["name"] != name or receipt.get("prefix") != f"{name}/{receipt['plan_id']}":
        return Pointer(None, found[1])  # or it would lead elsewhere
    return Pointer(receipt, found[1])


def published_canvas(url: Prefix) -> Prefix:
    """The canvas of the picture whose pointer this is. Raises UnreadableInput where it has none."""
    pointer = read_pointer(url.parent, url.name.removesuffix(".json"))
    if pointer is None or pointer.receipt is None or CANVAS not in pointer.receipt["outputs"]:
        raise UnreadableInput(
            f"{url}: points to 0 canvases; give the URL of a receipt, PREFIX/NAME.json, with an ome-zarr"
        )
    return canvas_prefix(url.parent, url.name.removesuffix(".json"), pointer.receipt["plan_id"])


def places(out: Prefix, receipt: Mapping[str, Any]) -> dict[str, Prefix]:
    """Where each output that a receipt names is, by its format."""
    return {
        fmt: out / receipt["prefix"] / _key(fmt, made) for fmt, made in receipt["outputs"].items() if made["sha256"]
    }


def is_finished(out: Prefix, plan: Plan, formats: Iterable[str], *, tiff_compression: str) -> bool:
    """Whether the pointer is this plan's, names every output that is asked for, and they still are there."""
    pointer = read_pointer(out, plan.name)
    if pointer is None or pointer.receipt is None or not pointer.is_of(plan.plan_id):
        return False
    made = pointer.receipt["outputs"]
    return all(
        fmt in made and _is_there(fmt, made[fmt], out, plan, tiff_compression=tiff_compression) for fmt in formats
    )


def keeps_canvas(out: Prefix, plan: Plan, formats: Iterable[str]) -> bool:
    """Whether the canvas is an output, of this run or of an earlier one of the same plan, and not only a step."""
    if CANVAS in formats:
        return True
    pointer = read_pointer(out, plan.name)
    if pointer is None or pointer.receipt is None or not pointer.is_of(plan.plan_id):
        return False
    return CANVAS in pointer.receipt["outputs"]


def refuse_taken(out: Prefix, plan: Plan, *, replace: bool) -> None:
    """Refuses to take the name of what another plan or another program has published."""
    _refuse(read_pointer(out, plan.name), out, plan, replace=replace)


def publish(
    canvas: RemoteCanvas,
    out: Prefix,
    files: Mapping[str, Path],
    facts: Mapping[str, object],
    *,
    keep_canvas: bool,
    tiff_compression: str,
    replace: bool,
) -> dict[str, Prefix]:
    """Uploads local files, by their formats, checks every shard, and then stores the pointer to all; where they are.

    keep_canvas: whether the canvas is an output, too; else it is discarded. Raises OutputExists as `refuse_taken`,
    StorageError for shards that are missing or damaged.
    """
    plan = canvas.plan
    root = plan_prefix(out, plan.name, plan.plan_id)
    outputs: dict[str, dict[str, object]] = {}
    for fmt, path in files.items():
        fixity = fixity_of(path)
        entry = fixity.to_json() | ({"compression": tiff_compression} if fmt == "tiff" else {})
        _upload(root / _key(fmt, entry), path, fixity)
        outputs[fmt] = entry
    for _ in range(_MOST_CONFLICTS):
        pointer = read_pointer(out, plan.name)
        _refuse(pointer, out, plan, replace=replace)
        before = pointer.receipt if pointer is not None and pointer.is_of(plan.plan_id) else None
        if keep_canvas:
            canvas.verify(canvas.grid.all_keys())
            outputs[CANVAS] = recorded_fixity(canvas.root).to_json()
        told = {**facts, "prefix": f"{plan.name}/{plan.plan_id}"}
        receipt = new_receipt(plan, outputs, told, before)
        hit("publish")
        if receipt == before or out.replace(
            _pointer_key(plan.name), seal(receipt), over=None if pointer is None else pointer.tag
        ):
            hit("publish")
            if not keep_canvas:
                canvas.discard()
            return places(out, receipt)
    raise OutputBusy(f"{out}/{plan.name}.json: changed {_MOST_CONFLICTS} times meanwhile; wait for the other writer")


def names(path: Prefix) -> Iterator[tuple[Prefix, str]]:
    """The output prefix and the name of each picture that a pointer's URL or a prefix stands for."""
    if path.name.endswith(".json"):
        yield path.parent, path.name.removesuffix(".json")
        return
    found = False
    for key in path.keys():  # noqa: SIM118  no mapping
        if key.endswith(".json") and _OF_A_PLAN.fullmatch(key) is None:
            found = True
            folder, _, name = key.removesuffix(".json").rpartition("/")
            yield (path / folder if folder else path), name
    if not found:
        raise UnreadableInput(f"{path}: there are 0 receipts below it; give what `restore` wrote to --out")


def verify(out: Prefix, name: str, *, progress: Progress) -> tuple[tuple[Problem, ...], str]:
    """Reads all that a pointer names again. What is bad is struck: the next run of the same command makes it anew.

    The second value says what stands in the way of that. Readers still see the pointer, with what is bad struck in it.
    """
    path = out / _pointer_key(name)
    pointer = read_pointer(out, name)
    if pointer is None:
        return (Problem(path, "receipt", Kind.MISSING),), "nothing is published under this name"
    if pointer.receipt is None:
        return (Problem(path, "receipt", Kind.METADATA),), "its receipt is lost: run the same command with --replace"
    receipt = pointer.receipt
    problems: list[Problem] = []
    bad: list[str] = []
    for fmt, made in receipt["outputs"].items():
        at = out / receipt["prefix"] / _key(fmt, made)
        found = _canvas_problems(at, progress) if fmt == CANVAS else _file_problems(fmt, at, made, progress)
        if made["sha256"] is None and not found:
            found = [Problem(at, fmt, Kind.CHANGED)]  # struck before
        problems += found
        bad += [fmt] if found else []
    if bad:
        struck = {fmt: {**receipt["outputs"][fmt], "bytes": None, "sha256": None} for fmt in bad}
        text = seal({**receipt, "outputs": receipt["outputs"] | struck})
        if not out.replace(_pointer_key(name), text, over=pointer.tag):
            return tuple(problems), "its receipt changed meanwhile: verify again"
    return tuple(problems), ""


@dataclass(frozen=True, slots=True)
class Unnamed:
    """A part of a plan's prefix that no pointer names."""

    path: Prefix
    sort: str
    """``in progress``: the same command would go on with it, ``replaced``: of an older plan or encoder."""
    num_bytes: int


def stale(out: Prefix, *, now: datetime | None = None) -> list[Unnamed]:
    """What lies below `out`, is named by no pointer, and is older than `QUIET`; nothing is changed."""
    parts: dict[tuple[str, str, str], tuple[int, datetime]] = {}
    for entry in out.entries():
        if of := _OF_A_PLAN.fullmatch(entry.key):
            part = (of["name"], of["plan"], of["part"])
            num_bytes, newest = parts.get(part, (0, entry.modified))
            parts[part] = (num_bytes + entry.num_bytes, max(newest, entry.modified))
    found: list[Unnamed] = []
    for (name, plan_id, part), (num_bytes, newest) in sorted(parts.items()):
        sort = _sort(out, name, plan_id, part)
        if sort is not None and (now or datetime.now(UTC)) - newest > QUIET:
            found.append(Unnamed(out / name / plan_id / part, sort, num_bytes))
    return found


def clean(out: Prefix, unnamed: Iterable[Unnamed]) -> Iterator[Unnamed]:
    """Removes what `stale` found, each looked at once more, and yields what was removed."""
    for part in unnamed:
        of = _OF_A_PLAN.fullmatch(part.path.path.removeprefix(f"{out.path}/" if out.path else ""))
        if of is not None and _sort(out, of["name"], of["plan"], of["part"]) is not None:
            for key in list(part.path.keys()):
                part.path.delete(key)
            yield part


def _pointer_key(name: str) -> str:
    return f"{name}.json"


def _key(fmt: str, made: Mapping[str, Any]) -> str:
    """Of an output below its plan's prefix. A struck one has no digest any more, and no place."""
    return str(made["name"]) if fmt == CANVAS else f"{str(made['sha256'])[:16]}/{made['name']}"


def _refuse(pointer: Pointer | None, out: Prefix, plan: Plan, *, replace: bool) -> None:
    if pointer is not None and not pointer.is_of(plan.plan_id) and not replace:
        raise OutputExists(
            f"{out}/{plan.name}.json: holds the work of another plan or program, not of {plan.plan_id[:16]}; choose "
            "another --out, or give --replace to build beside it and swap"
        )


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The keys below an output's own, and the files, of a file or a folder."""
    if not path.is_dir():
        yield "", path
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            yield file.relative_to(path).as_posix(), file


def _upload(at: Prefix, path: Path, fixity: Fixity) -> None:
    for key, file in _files(path):
        if at.size(key) != file.stat().st_size:  # what is there already was stored whole, under its own digest
            at.upload(key, file)


def _is_there(fmt: str, made: Mapping[str, Any], out: Prefix, plan: Plan, *, tiff_compression: str) -> bool:
    if made["sha256"] is None or (fmt == "tiff" and made["compression"] != tiff_compression):
        return False
    root = plan_prefix(out, plan.name, plan.plan_id)
    if fmt == CANVAS:
        stored = stored_plan(root / _key(fmt, made))
        return stored is not None and stored.plan_id == plan.plan_id
    if made["digest_of"] == "folder":
        return next((root / _key(fmt, made)).keys(), None) is not None
    return root.size(_key(fmt, made)) == made["bytes"]


def _file_problems(fmt: str, at: Prefix, made: Mapping[str, Any], progress: Progress) -> list[Problem]:
    if made["sha256"] is None:
        return []
    try:
        if made["digest_of"] == "folder":
            found = folder_fixity(at, name=made["name"])
        else:
            digest = at.digest("")
            found = Fixity(made["name"], digest.sha256, digest.num_bytes)
    except StorageError:
        if at.size("") is not None:
            raise
        return [Problem(at, fmt, Kind.MISSING)]
    progress(at, found.num_bytes)
    if found.to_json().items() <= made.items():
        return []
    kind = Kind.MISSING if not found.num_bytes else Kind.TRUNCATED if found.num_bytes < made["bytes"] else Kind.CHANGED
    return [Problem(at, fmt, kind)]


def _canvas_problems(root: Prefix, progress: Progress) -> list[Problem]:
    plan = stored_plan(root)
    if plan is None:
        return [Problem(root / "_engine/plan.json", "plan", Kind.METADATA)]
    problems = [
        Problem(at, f"metadata {at.path.removeprefix(root.path)[1:]}", Kind.METADATA) for at in damaged_metadata(root)
    ]
    ledger = Ledger(ledger_folder(root), plan_id=plan.plan_id)
    for key in plan.grid.all_keys():
        name = object_key(key.level, key.iy, key.ix)
        record, num_bytes = ledger.get(key), root.size(name)
        if record is None:
            problems.append(Problem(ledger.path(key), f"record {key.name}", Kind.RECORD, key))
            continue
        if num_bytes is None:
            kind = Kind.MISSING
        elif num_bytes != record.num_bytes:
            kind = Kind.TRUNCATED if num_bytes < record.num_bytes else Kind.CHANGED
        elif root.digest(name).sha256 != record.sha256:
            kind = Kind.CHANGED
        else:
            progress(root / name, num_bytes)
            continue
        problems.append(Problem(root / name, f"shard {key.name}", kind, key))
        ledger.strike(key)
    return problems


def _sort(out: Prefix, name: str, plan_id: str, part: str) -> str | None:
    """What kind of leftover a part of a plan's prefix is; None where the pointer names it."""
    pointer = read_pointer(out, name)
    if pointer is None:
        return "in progress"
    if pointer.receipt is None:
        return None  # what a damaged pointer named is not known
    if not pointer.is_of(plan_id):
        return "replaced"
    made = pointer.receipt["outputs"]
    named = {_key(fmt, entry).partition("/")[0] for fmt, entry in made.items()}
    if part in named:
        return None
    return "in progress" if part.endswith(".zarr") else "replaced"
