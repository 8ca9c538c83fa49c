"""What is asked for one picture, and the record beside its outputs that says it is finished, of what, and how."""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine import generated_map
from engine.errors import OutputExists
from engine.objects import Place, Prefix
from engine.provenance import fixity_of, recorded_fixity
from engine.store import FileLock, storage_errors, write_atomic
from engine.tiling.canvas import stored_plan
from engine.tiling.export import SUFFIX
from engine.tiling.plan import Plan, working_folder
from engine.tiling.seal import seal, unseal

SCHEMA = "cra-srgan-engine/receipt/1"

_FIELDS = frozenset({"input", "plan_id", "plan", "outputs", "seal"})
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")


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

    @property
    def targets(self) -> dict[str, Path]:
        """Where each output goes; where there is a mask, the map of generated pixels is one of them."""
        suffixes = {name: SUFFIX[name] for name in self.formats}
        if self.mask is not None:
            suffixes[generated_map.GENERATED] = generated_map.SUFFIX
        return {name: self.out / f"{self.name}{suffix}" for name, suffix in suffixes.items()}


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


def receipt_copy(canvas: Path) -> Path:
    """The same once more inside a canvas, so that a damaged receipt costs nothing."""
    return canvas / "_engine" / "receipt.json"


def read_receipt(path: Path) -> dict[str, Any] | None:
    """The receipt in a file; None where there is none of ours, or one that is damaged."""
    try:
        return parse_receipt(path.read_bytes())
    except OSError:
        return None


def parse_receipt(text: bytes) -> dict[str, Any] | None:
    """As `read_receipt`, of the text of one."""
    found = unseal(text)
    if found is None or found.get("schema") != SCHEMA:
        return None
    names = [made["name"] for made in found["outputs"].values()]
    # One from elsewhere may not lead out of its folder.
    return found if all(name == Path(name).name and name != ".." for name in names) else None


def looks_like_receipt(path: Path) -> bool:
    """Whether a file is a receipt, or was one before it was damaged; other programs' JSON is not."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with storage_errors(path):
        text = path.read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return any(f'"{field}"'.encode() in text for field in _FIELDS)
    return isinstance(found, dict) and len(_FIELDS & found.keys()) >= len(_FIELDS) - 1  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def write_receipt(plan: Plan, targets: dict[str, Path], job: Job, facts: Mapping[str, object]) -> None:
    """What was made, from what, how, and its digests; a picture is finished when this and all it names are there.

    `facts` are those of `engine.provenance.describe`.
    """
    outputs = {name: _entry(name, path, plan, job) for name, path in targets.items()}
    store_receipt(job.out, job.name, receipt_of(plan, outputs, facts, _receipt(job)))


def receipt_of(
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
    """The canvas of a plan, in progress and published, where there is one."""
    for canvas in (working_folder(out, name, plan_id), out / f"{name}{SUFFIX['ome-zarr']}"):
        if plan_id_of(canvas) == plan_id:
            yield canvas


def strike_outputs(out: Path, name: str, formats: Iterable[str]) -> None:
    """Notes in a picture's receipt that files are ours but damaged: the next run makes them again."""
    receipt = read_receipt(receipt_path(out, name))
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
    return read_receipt(receipt_path(job.out, job.name)) or {}


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
    folder = plan.working_folder(job.out)
    published = job.out / f"{job.name}{SUFFIX['ome-zarr']}"
    waits = keeps_canvas(plan, targets, job) and plan_id_of(published) != plan.plan_id
    if waits or not folder.exists():
        tidy(job, targets)
        return
    lock = FileLock.try_take(folder / "_engine" / "lock")
    if lock is not None:
        tidy(job, targets)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def tidy(job: Job, targets: dict[str, Path]) -> None:
    """Removes what a killed run left half-written beside the outputs."""
    for path in (*targets.values(), receipt_path(job.out, job.name)):
        for partial in job.out.glob(f"{glob.escape(path.name)}.*.partial"):
            if _PARTIAL.fullmatch(partial.name.removeprefix(path.name)):
                partial.unlink(missing_ok=True)


def plan_id_of(folder: Path) -> str | None:
    plan = stored_plan(folder)
    return None if plan is None else plan.plan_id


def _is_canvas(folder: Path) -> bool:
    """Whether this program made a folder, even where its plan can no longer be read."""
    return plan_id_of(folder) is not None or any(
        (folder / "_engine" / mark).exists() for mark in ("plan.json", "ledger")
    )


def announce(scratch: Path, targets: dict[str, Path]) -> None:
    """Notes in the working folder which files are about to be made: a run cut short behind one knows it again."""
    for name in targets:
        (scratch / f"exporting-{name}").touch()


def refuse_taken(plan: Plan, targets: dict[str, Path], job: Job) -> None:
    """Refuses to write over the input, or over what another plan or another program made."""
    if job.out.exists() and not job.out.is_dir():
        raise OutputExists(f"{job.out}: a file is in the way of the output folder; choose another --out")
    receipt = _receipt(job)
    finished: dict[str, Any] = receipt["outputs"] if receipt.get("plan_id") == plan.plan_id else {}
    scratch = plan.working_folder(job.out) / "_engine" / "scratch"
    for name, path in targets.items():
        if path.exists() and any(path.samefile(own) for own in (job.image, job.mask) if own is not None):
            raise OutputExists(f"{path}: the output would replace its own input; choose another --out")
        if name == "ome-zarr":
            ours, foreign = plan_id_of(path) == plan.plan_id, path.is_dir() and not _is_canvas(path)
        else:
            ours = name in finished or (scratch / f"exporting-{name}").exists()
            foreign = path.is_dir() and not (name == "iiif" and (path / "info.json").is_file())
        _refuse(path, plan, taken=os.path.lexists(path) and not ours and not job.replace, foreign=foreign)
    path = receipt_path(job.out, job.name)
    other = not finished and not any(scratch.glob("exporting-*"))
    _refuse(path, plan, taken=os.path.lexists(path) and other and not job.replace, foreign=path.is_dir())


def _refuse(path: Path, plan: Plan, *, taken: bool, foreign: bool) -> None:
    if foreign:
        raise OutputExists(f"{path}: a folder that this program did not make is in the way; choose another --out")
    if taken:
        raise OutputExists(
            f"{path}: holds the work of another plan or program, not of {plan.plan_id[:16]}; choose another --out, "
            "or give --replace to build beside it and swap"
        )
