"""What is asked for one picture, and the record beside its outputs that says it is finished."""

import glob
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.errors import OutputExists
from engine.store import FileLock, write_atomic
from engine.tiling.canvas import stored_plan
from engine.tiling.plan import Plan

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


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one picture."""

    plan_id: str
    outputs: tuple[Path, ...]
    seconds: float
    shards_total: int
    shards_done: int
    shards_reused: int


def _receipt_path(job: Job) -> Path:
    return job.out / f"{job.name}.json"


def write_receipt(plan: Plan, targets: dict[str, Path], job: Job) -> None:
    """What was made, from what, and how large it is; a picture is finished when this and all it names are there."""
    outputs = {
        name: {"file": path.name, "bytes": None if name == "ome-zarr" else path.stat().st_size}
        for name, path in targets.items()
    }
    before = _receipt(job)
    if before.get("plan_id") == plan.plan_id:  # formats asked for earlier stay finished
        outputs = before["outputs"] | outputs
    receipt = {"input": job.image.name, "plan_id": plan.plan_id, "plan": plan.to_json(), "outputs": outputs}
    write_atomic(_receipt_path(job), json.dumps(receipt, indent=2).encode())


def _receipt(job: Job) -> dict[str, Any]:
    """The receipt beside the outputs; empty where there is none of ours."""
    try:
        found = json.loads(_receipt_path(job).read_bytes())
    except (OSError, ValueError):
        return {}
    ours = isinstance(found, dict) and "plan" in found and isinstance(found.get("outputs"), dict)  # pyright: ignore[reportUnknownMemberType]
    return cast("dict[str, Any]", found) if ours else {}


def is_finished(plan: Plan, targets: dict[str, Path], job: Job) -> bool:
    """Whether an earlier run of this very plan made every output that is asked for, and they still are there."""
    receipt = _receipt(job)
    if receipt.get("plan_id") != plan.plan_id:
        return False
    for name, path in targets.items():
        if name not in receipt["outputs"]:
            return False
        if name == "ome-zarr" and plan_id_of(path) != plan.plan_id:
            return False
        if name != "ome-zarr" and not (path.is_file() and path.stat().st_size == receipt["outputs"][name]["bytes"]):
            return False
    _clear_working_folder(plan, job, targets)
    return True


def _clear_working_folder(plan: Plan, job: Job, targets: dict[str, Path]) -> None:
    """Removes what a run left that ended behind its receipt; one that is still at work is left alone."""
    folder = plan.working_folder(job.out)
    if not folder.exists():
        tidy(job, targets)
        return
    lock = FileLock.try_take(folder / "_engine" / "lock")
    if lock is not None:
        tidy(job, targets)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def tidy(job: Job, targets: dict[str, Path]) -> None:
    """Removes what a killed run left half-written beside the outputs."""
    for path in (*targets.values(), _receipt_path(job)):
        for partial in job.out.glob(f"{glob.escape(path.name)}.*.partial"):
            if _PARTIAL.fullmatch(partial.name.removeprefix(path.name)):
                partial.unlink(missing_ok=True)


def plan_id_of(folder: Path) -> str | None:
    plan = stored_plan(folder)
    return None if plan is None else plan.plan_id


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
            ours, foreign = plan_id_of(path) == plan.plan_id, path.is_dir() and plan_id_of(path) is None
        else:
            ours, foreign = name in finished or (scratch / f"exporting-{name}").exists(), path.is_dir()
        _refuse(path, plan, taken=os.path.lexists(path) and not ours and not job.replace, foreign=foreign)
    path = _receipt_path(job)
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
