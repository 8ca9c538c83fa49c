"""What is asked for one picture, and the record beside its outputs that says it is finished."""

import glob
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import OutputExists
from engine.store import write_atomic
from engine.tiling.canvas import stored_plan
from engine.tiling.plan import Plan


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
    try:
        return json.loads(_receipt_path(job).read_bytes())
    except (OSError, ValueError):
        return {}


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
    shutil.rmtree(plan.working_folder(job.out), ignore_errors=True)  # left where a run ended behind its receipt
    tidy(job, targets)
    return True


def tidy(job: Job, targets: dict[str, Path]) -> None:
    """Removes what a killed run left half-written beside the outputs."""
    for path in (*targets.values(), _receipt_path(job)):
        for partial in job.out.glob(f"{glob.escape(path.name)}.*.partial"):
            partial.unlink(missing_ok=True)


def plan_id_of(folder: Path) -> str | None:
    plan = stored_plan(folder)
    return None if plan is None else plan.plan_id


def refuse_taken(plan: Plan, targets: dict[str, Path], job: Job) -> None:
    """Refuses to write over the input, or over what another plan or another program made."""
    ours = plan.working_folder(job.out).exists() or _receipt(job).get("plan_id") == plan.plan_id
    for name, path in targets.items():
        if path.exists() and any(path.samefile(own) for own in (job.image, job.mask) if own is not None):
            raise OutputExists(f"{path}: the output would replace its own input; choose another --out")
        if job.replace or not os.path.lexists(path):
            continue
        if plan_id_of(path) != plan.plan_id if name == "ome-zarr" else not ours:
            raise OutputExists(
                f"{path}: holds the work of another plan, not of {plan.plan_id[:16]}; choose another --out, "
                "or give --replace to build beside it and swap"
            )
