"""What is asked for one picture, and the record beside its outputs that says it is finished, of what, and how."""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, cast
from uuid import uuid4

from engine import generated_map
from engine.errors import OutputBusy, OutputExists
from engine.objects import Place, Prefix
from engine.provenance import fixity_of, recorded_fixity
from engine.store import FileLock, open_regular, storage_errors, write_atomic
from engine.tiling.canvas import adding_to, scratch_of, stored_plan
from engine.tiling.export import FOLDERS, SUFFIX
from engine.tiling.plan import Plan, working_folder
from engine.tiling.seal import seal, unseal

SCHEMA = "cra-srgan-engine/receipt/1"

_SCHEMA_PARTS = (b'"schema": "cra-srgan-', b"engine/receipt/")
"""Both are in a receipt's first bytes; one of them still is when the other is damaged."""
_EXPORTING = "exporting-"
_PARTIAL = re.compile(r"(\.[0-9a-f]{32}\.partial)+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = {"name": str, "sha256": _SHA256, "bytes": int, "digest_of": re.compile("file|folder|shards|level")}
_SHAPE = {
    "input": _FILE,
    "generated": {"missing_px": int, "of_px": int, "share": int | float, "statement": str},
    "model": {"name": str, "sha256": _SHA256, "licence": str},
    "software": {"cra-srgan-engine": str},
    "plan_id": _SHA256,
    "plan": dict,
    "outputs": dict,
    "finished": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
}
"""The fields of a receipt that are read again, with their types or patterns. `mask` is like `input`, or null."""
_SUFFIXES = {**SUFFIX, generated_map.GENERATED: generated_map.SUFFIX}


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to restore, and where to."""

    image: Path
    mask: Path | None
    out: Path
    name: str
    """Outputs are `out/name.zarr`, `out/name.png` ..."""
    formats: tuple[str, ...]
    replace: bool = False
    max_pixels: int = 1 << 30
    """Refused above this many input pixels."""
    tiff_compression: str = "deflate"
    remote: Prefix | None = None
    """Where the outputs go instead, on an object store: then `out` is for temporary files only."""
    detect: bool = False
    """Whether the mask, which is none so far, is to be found in the picture first."""
    shard_px: int | None = None
    """Side of the canvas' shards in pixels; None: that of an archive's."""

    @property
    def targets(self) -> dict[str, Path]:
        """Where each output goes; where there is a mask, the map of generated pixels is one of them."""
        names = self.formats if self.mask is None else (*self.formats, generated_map.GENERATED)
        return {name: self.out / f"{self.name}{_SUFFIXES[name]}" for name in names}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one picture."""

    plan_id: str
    outputs: tuple[Place, ...]
    seconds: float
    shards_total: int
    shards_done: int
    shards_reused: int
    notes: tuple[str, ...] = ()
    """What of the input is not in the outputs as it was: conversions, metadata left out."""


def receipt_path(out: Path, name: str) -> Path:
    """The file beside the outputs of a picture that says how it was made."""
    return out / f"{name}.json"


def published_canvas(out: Path, name: str) -> Path:
    """Where the canvas of a picture is once it is finished."""
    return out / f"{name}{SUFFIX['ome-zarr']}"


def receipt_copy(canvas: Path) -> Path:
    """The same once more inside a canvas, so that a damaged receipt costs nothing."""
    return canvas / "_engine" / "receipt.json"


def read_receipt(path: Path) -> dict[str, Any] | None:
    """The receipt in a file; None where there is none of ours, or one that is damaged."""
    try:
        with open_regular(path) as file:
            return parse_receipt(file.read())
    except OSError:
        return None


def parse_receipt(text: bytes) -> dict[str, Any] | None:
    """As `read_receipt`, of the text of one."""
    found = unseal(text)
    return found if found is not None and _is_receipt(found) else None


def receipt_of(out: Path, name: str) -> dict[str, Any] | None:
    """The receipt beside the outputs of a picture; None where there is none, a damaged one, or another picture's."""
    found = read_receipt(receipt_path(out, name))
    return found if found is not None and found["plan"]["name"] == name else None


def looks_like_receipt(path: Path) -> bool:
    """Whether a file is a receipt, or was one before it was damaged; other programs' JSON is not."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with storage_errors(path), path.open("rb") as file:
        start = file.read(100)
    return any(part in start for part in _SCHEMA_PARTS)


def _is_receipt(found: dict[str, Any]) -> bool:
    """Whether all that is read of a receipt has its type, and its outputs their names: it may come from elsewhere."""
    if found.get("schema") != SCHEMA or not _has(found, _SHAPE):
        return False
    if "mask" not in found or not (found["mask"] is None or _has(found["mask"], _FILE)):
        return False
    try:
        plan = Plan.from_json(found["plan"])
        json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogateescape")  # or no XML can be made of it
    except (KeyError, TypeError, ValueError):
        return False
    return all(_is_output(fmt, made, plan) for fmt, made in found["outputs"].items())


def _is_output(fmt: str, made: object, plan: Plan) -> bool:
    """Whether an entry is of a file that the picture of a plan may have, as it was made or struck."""
    shape: dict[str, Any] = _FILE | ({"compression": str} if fmt == "tiff" else {})
    if _has(made, {"sha256": NoneType, "bytes": NoneType}):
        shape = shape | {"sha256": NoneType, "bytes": NoneType}
    return fmt in _SUFFIXES and _has(made, shape | {"name": re.compile(re.escape(f"{plan.name}{_SUFFIXES[fmt]}"))})


def _has(found: Any, shape: Any) -> bool:  # noqa: ANN401 - it tells what they are
    """Whether a value out of JSON is of a type, fits a pattern, or is an object that has these fields at least."""
    if isinstance(shape, dict):
        parts = cast("dict[str, Any]", shape).items()
        return isinstance(found, dict) and all(name in found and _has(found[name], part) for name, part in parts)
    if isinstance(shape, re.Pattern):
        return isinstance(found, str) and cast("re.Pattern[str]", shape).fullmatch(found) is not None
    return isinstance(found, shape)


def write_receipt(plan: Plan, targets: dict[str, Path], job: Job, facts: Mapping[str, object]) -> None:
    """What was made, from what, how, and its digests; a picture is finished when this and all it names are there.

    `facts` are those of `engine.provenance.describe`.
    """
    if keeps_canvas(plan, targets, job):  # on another machine, one made again may have other bytes
        targets = {**targets, "ome-zarr": published_canvas(job.out, job.name)}
    outputs = {name: _entry(name, path, plan, job) for name, path in targets.items()}
    before = _receipt(job)
    receipt = new_receipt(plan, outputs, facts, before)
    # Nothing that no receipt names may stay; it is known by the old receipt, so the new one is stored last.
    _remove_outputs(job, (before.get("outputs", {}).keys() | _exported(job, plan)) - receipt["outputs"].keys())
    store_receipt(job.out, job.name, receipt)


def new_receipt(
    plan: Plan, outputs: Mapping[str, object], facts: Mapping[str, object], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The receipt to store where `before` is. Of the same plan, what it names stays: a repair makes nothing new."""
    finished = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if before is not None and before.get("plan_id") == plan.plan_id:
        outputs, finished = before["outputs"] | outputs, before["finished"]
    return {
        "schema": SCHEMA,
        **facts,
        "plan_id": plan.plan_id,
        "plan": plan.to_json(),
        "outputs": dict(outputs),
        "finished": finished,
    }


def store_receipt(out: Path, name: str, receipt: dict[str, Any]) -> None:
    """Stores a receipt, and before it the copy in the canvas, published or in progress, of the same plan."""
    text = seal(receipt)
    for canvas in _canvases(out, name, receipt["plan_id"]):
        write_atomic(receipt_copy(canvas), text)
    write_atomic(receipt_path(out, name), text)


def _canvases(out: Path, name: str, plan_id: str) -> Iterator[Path]:
    """The canvas of a plan, published and in progress, where there is one."""
    for canvas in (published_canvas(out, name), working_folder(out, name, plan_id)):
        if plan_id_of(canvas) == plan_id:
            yield canvas


def record_export(plan: Plan, job: Job) -> None:
    """Adds files that were made from a published canvas beside its receipt to that; without one, nothing is done."""
    receipt = _receipt(job)
    if receipt.get("plan_id") == plan.plan_id:
        made = {name: _entry(name, path, plan, job) for name, path in job.targets.items()}
        store_receipt(job.out, job.name, {**receipt, "outputs": receipt["outputs"] | made})


def strike_outputs(out: Path, name: str, formats: Iterable[str]) -> None:
    """Notes in a picture's receipt that files are ours but damaged: the next run makes them again."""
    receipt = receipt_of(out, name)
    if receipt is not None:
        struck = {fmt: {**receipt["outputs"][fmt], "bytes": None, "sha256": None} for fmt in formats}
        store_receipt(out, name, {**receipt, "outputs": receipt["outputs"] | struck})


def _entry(fmt: str, path: Path, plan: Plan, job: Job) -> dict[str, object]:
    """A canvas is known by the records of its shards, and may not have its name yet."""
    if fmt == "ome-zarr":
        return recorded_fixity(next(_canvases(job.out, job.name, plan.plan_id)), name=path.name).to_json()
    return fixity_of(path).to_json() | ({"compression": job.tiff_compression} if fmt == "tiff" else {})


def keeps_canvas(plan: Plan, targets: dict[str, Path], job: Job) -> bool:
    """Whether the canvas is an output, of this run or of an earlier one of the same plan, and not only a step."""
    receipt = _receipt(job)
    return "ome-zarr" in targets or (receipt.get("plan_id") == plan.plan_id and "ome-zarr" in receipt["outputs"])


def _receipt(job: Job) -> dict[str, Any]:
    return receipt_of(job.out, job.name) or {}


def _remove_outputs(job: Job, formats: Iterable[str]) -> None:
    with storage_errors(job.out):
        for path in (job.out / f"{job.name}{_SUFFIXES[fmt]}" for fmt in formats):
            if path.is_dir() and not path.is_symlink():  # half a folder must not have its name
                path = path.rename(path.with_name(f"{path.name}.{uuid4().hex}.partial"))
            _remove(path)


def is_finished(plan: Plan, targets: dict[str, Path], job: Job) -> bool:
    """Whether an earlier run of this very plan made every output that is asked for, and they still are there."""
    receipt = _receipt(job)
    if receipt.get("plan_id") != plan.plan_id:
        return False
    if not all(_is_made(name, path, receipt["outputs"].get(name), plan, job) for name, path in targets.items()):
        return False
    _clear_working_folder(plan, job, targets)
    return True


def _is_made(fmt: str, path: Path, made: dict[str, Any] | None, plan: Plan, job: Job) -> bool:
    if made is None or made["sha256"] is None:
        return False
    if fmt == "ome-zarr":
        return plan_id_of(path) == plan.plan_id
    if fmt == "tiff" and made["compression"] != job.tiff_compression:
        return False
    return path.is_dir() or (path.is_file() and path.stat().st_size == made["bytes"])


def _clear_working_folder(plan: Plan, job: Job, targets: dict[str, Path]) -> None:
    """Removes what a run left that ended behind its receipt; one that is still at work is left alone.

    So is a canvas that waits for its repair: it is the only one of an output that the receipt names.
    """
    folder, published = plan.working_folder(job.out), published_canvas(job.out, job.name)
    is_published = plan_id_of(published) == plan.plan_id
    if is_published and scratch_of(published).exists():
        with suppress(OutputBusy), adding_to(published):
            _forget_unfinished(plan, job)
    waits = keeps_canvas(plan, targets, job) and not is_published
    if waits or not folder.exists():
        tidy(job, targets)
        return
    lock = FileLock.try_take(folder / "_engine" / "lock")
    if lock is not None:
        _forget_unfinished(plan, job)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _forget_unfinished(plan: Plan, job: Job) -> None:
    """Removes the exports, whole or half-written, that runs of a plan began and no receipt names."""
    tidy(job, {fmt: job.out / f"{job.name}{suffix}" for fmt, suffix in _SUFFIXES.items()})
    _remove_outputs(job, _exported(job, plan) - _receipt(job)["outputs"].keys())


def tidy(job: Job, targets: dict[str, Path]) -> None:
    """Removes what a killed run left half-written beside the outputs."""
    for path in (*targets.values(), receipt_path(job.out, job.name)):
        for partial in job.out.glob(f"{glob.escape(path.name)}.*.partial"):
            if _PARTIAL.fullmatch(partial.name.removeprefix(path.name)):
                _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plan_id_of(folder: Path) -> str | None:
    plan = stored_plan(folder)
    return None if plan is None else plan.plan_id


def _is_canvas(folder: Path) -> bool:
    """Whether this program made a folder, even where its plan can no longer be read."""
    return plan_id_of(folder) is not None or any(
        (folder / "_engine" / mark).exists() for mark in ("plan.json", "ledger")
    )


def announce(scratch: Path, targets: dict[str, Path]) -> None:
    """Notes with the canvas which files are about to be made: a run cut short behind one knows it again."""
    for name in targets:
        (scratch / f"{_EXPORTING}{name}").touch()


def _announced(canvases: Iterable[Path]) -> set[str]:
    found = (path for canvas in canvases for path in scratch_of(canvas).glob(f"{_EXPORTING}*"))
    return {path.name.removeprefix(_EXPORTING) for path in found} & _SUFFIXES.keys()


def unfinished_exports(canvas: Path, name: str) -> list[Path]:
    """The exports that a run began from a canvas of the picture `name`, and no receipt beside it names."""
    named = (receipt_of(canvas.parent, name) or {"outputs": {}})["outputs"].keys()
    paths = (canvas.with_name(f"{name}{_SUFFIXES[fmt]}") for fmt in _announced([canvas]) - named - {"ome-zarr"})
    return sorted(path for path in paths if os.path.lexists(path))


def _exported(job: Job, plan: Plan) -> set[str]:
    """What runs of a plan that were cut short may have exported."""
    return _announced(_canvases(job.out, job.name, plan.plan_id)) - {"ome-zarr"}


def refuse_taken(plan: Plan, targets: dict[str, Path], job: Job) -> None:
    """Refuses to write over the input, or over what another plan made, or what is not known to be ours at all."""
    refuse_taken_files(plan, targets, job)
    path = receipt_path(job.out, job.name)
    if os.path.lexists(path):
        is_exported, found = bool(_exported(job, plan)), read_receipt(path)
        ours = looks_like_receipt(path) if found is None else found["plan"]["name"] == job.name
        is_current = _receipt(job).get("plan_id") == plan.plan_id
        _refuse(path, plan, job, ours=ours, current=is_current or is_exported)


def refuse_taken_files(plan: Plan, targets: dict[str, Path], job: Job) -> None:
    """As `refuse_taken`, of the outputs alone: ours is what a receipt of the picture, or work in progress, names.

    Another process may be making them. It announces a file, makes it, stores the receipt, ends what it announced; they
    are looked for in the order in which none is missed.
    """
    if job.out.exists() and not job.out.is_dir():
        raise OutputExists(f"{job.out}: a file is in the way of the output folder; choose another --out")
    taken = {name: path for name, path in targets.items() if os.path.lexists(path)}
    exported, announced = _exported(job, plan), _announced(_all_canvases(job))
    receipt = _receipt(job)
    finished: dict[str, Any] = receipt["outputs"] if receipt.get("plan_id") == plan.plan_id else {}
    current = finished.keys() | exported
    known = current | announced
    for name, path in taken.items():
        if path.exists() and any(path.samefile(own) for own in (job.image, job.mask) if own is not None):
            raise OutputExists(f"{path}: the output would replace its own input; choose another --out")
        if name == "ome-zarr":
            _refuse(path, plan, job, ours=_is_canvas(path), current=plan_id_of(path) == plan.plan_id)
        else:
            ours = (name in known or _is_listed(path, job)) and (name in FOLDERS or not path.is_dir())
            _refuse(path, plan, job, ours=ours, current=name in current)


def _all_canvases(job: Job) -> list[Path]:
    """The canvases of a picture, of whatever plan."""
    named = re.compile(re.escape(job.name) + r"\.[0-9a-f]{16}\.inprogress\.zarr")
    found = job.out.glob(f"{glob.escape(job.name)}.*.inprogress.zarr")
    return [published_canvas(job.out, job.name), *(path for path in found if named.fullmatch(path.name))]


def _is_listed(path: Path, job: Job) -> bool:
    """Whether a receipt of the picture, of whatever plan and even if it is damaged, names a file among its outputs."""
    name = json.dumps(path.name).encode()
    for receipt in (receipt_path(job.out, job.name), receipt_copy(published_canvas(job.out, job.name))):
        if looks_like_receipt(receipt):
            with storage_errors(receipt):
                _, _, outputs = receipt.read_bytes().partition(b'"outputs": {')
            if name in outputs:
                return True
    return False


def _refuse(path: Path, plan: Plan, job: Job, *, ours: bool, current: bool) -> None:
    if ours and current:
        return
    if not ours:
        raise OutputExists(
            f"{path}: is in the way, and no receipt says that this program made it; move it, or choose another --out"
        )
    if not job.replace:
        raise OutputExists(
            f"{path}: holds the work of another plan, not of {plan.plan_id[:16]}; choose another --out, "
            "or give --replace to build beside it and swap"
        )
