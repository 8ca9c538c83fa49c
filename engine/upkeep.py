"""Whether every stored byte of an output is still as it was.

What is found damaged is struck, so that the next run of the same command makes just that again. A published canvas with
damage goes back under the name that it had while it was made: readers no longer see it, and the next run resumes it.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import remote
from engine.errors import EngineError, OutputBusy, StorageError, StorageReadOnly, UnreadableInput
from engine.objects import Place, Prefix
from engine.outputs import output_folders
from engine.provenance import fixity_of, recorded_fixity
from engine.receipt import (
    looks_like_receipt,
    read_receipt,
    receipt_copy,
    receipt_path,
    store_receipt,
    strike_outputs,
)
from engine.store import FileLock, fsync_folder, storage_errors
from engine.tiling.canvas import ledger_folder, stored_plan
from engine.tiling.damage import Kind, Problem, Progress, canvas_problems, file_kind, is_working, missing_or
from engine.tiling.export import SUFFIX
from engine.tiling.ledger import Ledger, plan_id_recorded
from engine.tiling.plan import Plan, working_folder

_CANVAS = SUFFIX["ome-zarr"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one picture: its canvas, its receipt and its exported files."""

    path: Place
    """The canvas; the receipt, where there is none, and on an object store."""
    problems: tuple[Problem, ...]
    note: str = ""
    """What stands in the way of a repair, or why nothing was looked at; empty for most."""

    @property
    def intact(self) -> bool:
        """Whether all that was looked at is as it was stored."""
        return not self.problems


def verify_outputs(paths: Iterable[Place], *, progress: Progress | None = None) -> Iterator[Verdict]:
    """Reads everything that was stored for each picture again, and strikes what is bad.

    paths: folders of outputs (and all below them), canvases (published or in progress), receipts, or URLs of receipts
    or of what is above them. `progress` is told each file that was read. Raises UnreadableInput for a path that is none
    of these, or has nothing to be checked. Damage is no error: it is in the verdicts.
    """
    told = progress or _tell_nobody
    for path in paths:
        if isinstance(path, Prefix):
            for prefix, name in remote.names(path):
                problems, note = remote.verify(prefix, name, progress=told)
                yield Verdict(prefix / f"{name}.json", problems, note)
            continue
        path = Path(path).absolute()
        pictures = list(_pictures(path))
        if not pictures:
            raise UnreadableInput(
                f"{path}: 0 outputs checked, for it has no canvas and no receipt; give what `restore` wrote to --out"
            )
        for out, canvas, name in pictures:
            if canvas is not None and is_working(canvas):
                yield _verify_working(canvas, told)
            else:
                yield _verify_published(out, name, told, in_folder=canvas != path)


def _pictures(path: Path) -> Iterator[tuple[Path, Path | None, str]]:
    """The output folder, the canvas (None: none is there) and the name of each picture that `path` stands for."""
    if (path / "_engine").is_dir():
        yield path.parent, path, path.name.removesuffix(_CANVAS)
    elif path.is_dir():
        for folder in output_folders(path):
            yield from _pictures_in(folder)
    elif looks_like_receipt(path):
        canvas = path.with_name(f"{path.stem}{_CANVAS}")
        yield path.parent, canvas if (canvas / "_engine").is_dir() else None, path.stem
    else:
        raise UnreadableInput(
            f"{path}: is no folder of outputs, canvas or receipt of this program; give what `restore` wrote to --out"
        )


def _pictures_in(folder: Path) -> Iterator[tuple[Path, Path | None, str]]:
    with storage_errors(folder):
        found = sorted(folder.iterdir())
    canvases = {child for child in found if child.suffix == _CANVAS and (child / "_engine").is_dir()}
    for child in sorted(canvases):
        yield folder, child, child.name.removesuffix(_CANVAS)
    for child in found:
        if child.with_name(f"{child.stem}{_CANVAS}") not in canvases and looks_like_receipt(child):
            yield folder, None, child.stem


def _tell_nobody(path: Place, num_bytes: int) -> None:
    pass


def _verify_working(canvas: Path, progress: Progress) -> Verdict:
    with _locked(canvas) as owned:
        if not owned:
            return Verdict(canvas, (), "in use: another process is writing it")
        plan = stored_plan(canvas)
        plan_id = plan_id_recorded(ledger_folder(canvas)) if plan is None else plan.plan_id
        if plan_id is None:
            return Verdict(canvas, (), "nothing is stored in it yet: the next run starts it anew")
        problems = tuple(canvas_problems(canvas, plan=plan, plan_id=plan_id, progress=progress))
        return Verdict(canvas, problems, _hindrance(lambda: _strike_shards(canvas, plan_id, problems)))


def _verify_published(out: Path, name: str, progress: Progress, *, in_folder: bool) -> Verdict:
    canvas = out / f"{name}{_CANVAS}"
    where = canvas if (canvas / "_engine").is_dir() else receipt_path(out, name)
    bad_receipts, receipt, notes = _check_receipts(out, name, canvas, in_folder=in_folder)
    exports: tuple[Problem, ...] = ()
    if receipt is not None and (in_folder or receipt_path(out, name).exists()):
        exports = tuple(_export_problems(out, receipt, progress))
        struck = [problem.name for problem in exports]
        if struck:
            notes.append(_hindrance(lambda: strike_outputs(out, name, struck)))
    stored: tuple[Problem, ...] = ()
    if where == canvas:
        stored, note = _check_canvas(canvas, receipt, progress)
        notes.append(note)
    elif receipt is not None and in_folder and "ome-zarr" in receipt["outputs"]:
        if _is_complete(working_folder(out, name, receipt["plan_id"]), receipt):
            notes.append("its canvas is in progress: run the same command again")
        else:
            stored = (Problem(canvas, "ome-zarr", Kind.MISSING),)
    return Verdict(where, (*stored, *bad_receipts, *exports), "; ".join(note for note in notes if note))


def _check_canvas(canvas: Path, receipt: dict[str, Any] | None, progress: Progress) -> tuple[tuple[Problem, ...], str]:
    """What is wrong with a published canvas, which then is one in progress again; and what stood in the way of that."""
    plan, plan_id = _plan_of(canvas, receipt)
    if plan_id is None:
        lost = Problem(canvas / "_engine" / "plan.json", "plan", Kind.METADATA)
        return (lost,), "its plan is lost: run the same command with --replace"
    name, swapped = canvas.name.removesuffix(_CANVAS), Problem(canvas, "ome-zarr", Kind.SWAPPED)
    is_renamed = plan is not None and plan.name != name
    other = receipt if receipt is not None and receipt["plan_id"] != plan_id and not is_renamed else None
    if other is not None and not _is_complete(working_folder(canvas.parent, name, other["plan_id"]), other):
        return (swapped,), "its receipt is of another run: move it away, then run the command of the receipt again"
    problems = tuple(canvas_problems(canvas, plan=plan, plan_id=plan_id, progress=progress))
    if other is not None:
        return problems, "it is being replaced: run the same command again"
    if plan is not None and is_renamed:
        note = f"it was renamed: give it back its name {plan.name}{_CANVAS}, with which it can be repaired"
        return (swapped, *problems), note
    if not problems:
        if receipt is None or "ome-zarr" not in receipt["outputs"] or _is_complete(canvas, receipt):
            return (), ""
        note = "its records are not those of the receipt: delete the canvas, then run the same command again"
        return (Problem(canvas, "ome-zarr", Kind.CHANGED),), note

    def take_back() -> None:
        _strike_shards(canvas, plan_id, problems)
        _rename_back(canvas, working_folder(canvas.parent, name, plan_id))

    return problems, _hindrance(take_back)


def _is_complete(canvas: Path, receipt: dict[str, Any]) -> bool:
    """Whether a canvas, published or in progress, has the records of all shards that a receipt was written about."""
    try:
        return recorded_fixity(canvas).sha256 == receipt["outputs"]["ome-zarr"]["sha256"]
    except (StorageError, KeyError):
        return False


def _check_receipts(
    out: Path, name: str, canvas: Path, *, in_folder: bool
) -> tuple[tuple[Problem, ...], dict[str, Any] | None, list[str]]:
    """What is wrong with the receipt and its copy in the canvas, the intact one, and what stood in the way of a repair.

    A canvas that was carried away alone has no receipt beside it: only in a folder of outputs one must be there.
    """
    path, copy_path = receipt_path(out, name), receipt_copy(canvas)
    receipt, copy = read_receipt(path), read_receipt(copy_path)
    if receipt is not None and receipt["plan"]["name"] != name:
        note = f"it is the receipt of {receipt['plan']['name']}: give it back its name"
        return (Problem(path, "receipt", Kind.SWAPPED),), None, [note]
    problems: list[Problem] = []
    if receipt is None and (in_folder or os.path.lexists(path)):
        problems.append(missing_or(Kind.METADATA, path, "receipt"))
    # In the middle of a swap the receipt is of the new canvas already, and the copy in the old one is not expected.
    same_plan = receipt is None or receipt["plan_id"] == _plan_of(canvas, receipt)[1]
    if copy is None and same_plan and (receipt is not None or copy_path.exists()) and (canvas / "_engine").is_dir():
        problems.append(missing_or(Kind.METADATA, copy_path, "receipt's copy"))
    intact = receipt or copy
    if receipt is not None and copy is not None and copy != receipt and copy["plan_id"] == receipt["plan_id"]:
        # The copy is written first, so of two that tell of as many outputs it is the newer one.
        intact = max((copy, receipt), key=lambda told: len(told["outputs"]))
        older = (path, "receipt") if intact is copy else (copy_path, "receipt's copy")
        problems.append(Problem(*older, Kind.OUTDATED))
    notes: list[str] = []
    if problems and intact is not None:
        if intact["plan"]["name"] == name:
            notes.append(_hindrance(lambda: store_receipt(out, name, intact)))
    elif problems:
        notes.append("its receipt is lost: move its exported files away, then run the same command with --replace")
    return tuple(problems), intact, notes


def _export_problems(out: Path, receipt: dict[str, Any], progress: Progress) -> Iterator[Problem]:
    for fmt, made in receipt["outputs"].items():
        path = out / made["name"]
        if fmt == "ome-zarr":
            continue
        if made["sha256"] is None:  # struck before
            yield missing_or(Kind.CHANGED, path, fmt)
        elif not _is_as_received(path, made, progress):
            yield Problem(path, fmt, file_kind(path, num_bytes=made["bytes"]))


def _is_as_received(path: Path, made: dict[str, Any], progress: Progress) -> bool:
    try:
        found = fixity_of(path)
    except StorageError:
        return False
    progress(path, found.num_bytes)
    return found.to_json().items() <= made.items()


def _plan_of(canvas: Path, receipt: dict[str, Any] | None) -> tuple[Plan | None, str | None]:
    """The plan of a published canvas and its id: from the canvas, else from the receipt, the id else from records."""
    plan = stored_plan(canvas)
    if plan is not None:
        return plan, plan.plan_id
    recorded = plan_id_recorded(ledger_folder(canvas))
    if receipt is not None and recorded in (None, receipt["plan_id"]) and "ome-zarr" in receipt["outputs"]:
        plan = Plan.from_json(receipt["plan"])
        return plan, plan.plan_id
    return None, recorded


def _strike_shards(canvas: Path, plan_id: str, problems: Iterable[Problem]) -> None:
    ledger = Ledger(ledger_folder(canvas), plan_id=plan_id)
    for problem in problems:
        if problem.key is not None:
            ledger.strike(problem.key)


def _rename_back(canvas: Path, working: Path) -> None:
    """Gives a published canvas its working name again; what an older run left there is of no use beside it."""
    busy = OutputBusy(f"{canvas}: another process is at work on it; wait for it, then verify again")
    with ExitStack() as held, storage_errors(canvas):
        if not held.enter_context(_locked(canvas)):
            raise busy
        if working.exists():
            if not held.enter_context(_locked(working)):
                raise busy
            shutil.rmtree(working)
        os.rename(canvas, working)
        fsync_folder(canvas.parent)


@contextmanager
def _locked(canvas: Path) -> Generator[bool]:
    """Holds the lock of a canvas; False where another process does. What nobody can write needs no lock."""
    try:
        lock = FileLock.try_take(canvas / "_engine" / "lock")
    except StorageReadOnly:
        yield True
        return
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _hindrance(repair: Callable[[], None]) -> str:
    """Does a repair; what stood in its way, such as a read-only disk, as a sentence."""
    try:
        repair()
    except EngineError as error:
        return str(error)
    return ""
