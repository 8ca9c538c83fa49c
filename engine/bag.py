"""An output folder as a bag (BagIt 1.0, RFC 8493): what an archive ingests, with a checksum of every file.

Beside each receipt the bag holds the same in PREMIS and METS. It shares its files with the output folder (hard links),
so it needs next to no space; across file systems they are copied. Outputs are never changed in place, so what is in a
bag stays as it was bagged.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from engine import __version__
from engine.errors import OutputBusy, OutputExists, UnreadableInput
from engine.outputs import BATCH
from engine.preservation import METS_SUFFIX, PREMIS_SUFFIX, mets_xml, premis_xml
from engine.provenance import fixity_of
from engine.receipt import looks_like_receipt, plan_id_of, receipt_of
from engine.store import Digest, digest_of, fsync_folder, make_folders, storage_errors, write_atomic
from engine.tiling.canvas import damaged_metadata

_UNFINISHED = (".inprogress.zarr", ".partial", ".replaced")


def make_bag(out: Path, bag: Path, *, information: Mapping[str, str] | None = None) -> Path:
    """Makes the folder `bag` of all files below the folder `out`; it is there complete or not at all.

    `information` goes into bag-info.txt, as `Source-Organization` (RFC 8493, 2.2.2). The bag may not lie in `out`.
    Raises OutputBusy where `out` holds unfinished work, OutputExists where `bag` is taken, UnreadableInput for a folder
    without a file, with a link, or with an output that is not as its receipt says, and StorageError.
    """
    out, bag = out.absolute(), bag.absolute()
    if bag.resolve().is_relative_to(out.resolve()):
        raise OutputExists(f"{bag}: lies in {out} itself; choose a folder beside it")
    if os.path.lexists(bag):
        raise OutputExists(f"{bag}: exists already; choose another folder, or delete it")
    names = _payload(out)
    partial = bag.with_name(f"{bag.name}.{uuid4().hex}.partial")
    with storage_errors(bag):
        try:
            make_folders(partial)
            for name in names:
                _link(out / name, partial / "data" / name)
            digests = {Path(name): digest_of(partial / "data" / name) for name in names}
            digests |= {name: digest_of(partial / "data" / name) for name in _write_records(partial / "data", digests)}
            _write_tags(partial, digests, information or {})
            os.rename(partial, bag)
            fsync_folder(bag.parent)
        finally:
            with suppress(OSError):  # the first error is the one worth telling
                if partial.exists():
                    shutil.rmtree(partial)
    return bag


def _write_records(data: Path, digests: Mapping[Path, Digest]) -> list[Path]:
    """The PREMIS event and the METS document of every receipt in the payload; gives their names."""
    canvases = {path.parents[1] for path in digests if path.match("*.zarr/_engine/*")}
    receipts = {path for path in digests if path.parent.name != "_engine" and looks_like_receipt(data / path)}
    written: list[Path] = []
    for path in sorted(receipts | {canvas.with_suffix(".json") for canvas in canvases}):
        receipt = receipt_of(data / path.parent, path.stem)
        if receipt is None:
            raise _damaged(path)
        for made in receipt["outputs"].values():
            if not _is_as_received(data, path.with_name(made["name"]), made, receipt["plan_id"], digests):
                raise _damaged(path.with_name(made["name"]))
            canvases.discard(path.with_name(made["name"]))
        premis, mets = (path.with_suffix(suffix) for suffix in (PREMIS_SUFFIX, METS_SUFFIX))
        write_atomic(data / premis, premis_xml(receipt))
        sidecars = {"json": fixity_of(data / path).to_json(), "premis": fixity_of(data / premis).to_json()}
        write_atomic(data / mets, mets_xml(receipt, sidecars=sidecars))
        written += [premis, mets]
    for canvas in canvases:  # its receipt names none
        raise _damaged(canvas)
    return written


def _is_as_received(
    data: Path, path: Path, made: Mapping[str, object], plan_id: str, digests: Mapping[Path, Digest]
) -> bool:
    try:
        found = fixity_of(data / path, digest=lambda file: digests[file.relative_to(data)])
    except KeyError:
        return False
    if found.digest_of == "shards" and (plan_id_of(data / path) != plan_id or damaged_metadata(data / path)):
        return False
    return found.to_json().items() <= made.items()


def _damaged(path: Path) -> UnreadableInput:
    return UnreadableInput(
        f"{path}: is damaged, missing, or not as its receipt says; run `engine verify`, then the command that made it"
    )


def _payload(out: Path) -> list[str]:
    """Paths below a folder, sorted, without those of a batch; what is no plain file, or not finished, is refused."""
    names: list[str] = []
    with storage_errors(out):
        for parent, folders, files in os.walk(out, onerror=_raise):
            folders[:] = [name for name in folders if name != BATCH]
            for entry in (*folders, *files):
                path = Path(parent, entry)
                if entry.endswith(_UNFINISHED) or path.parts[-2:] == ("_engine", "scratch"):
                    raise OutputBusy(f"{path}: is not finished; run its command again, or `engine clean`, then bag")
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise UnreadableInput(f"{path}: a bag holds plain files only; replace the link by its target")
            names += [os.path.relpath(os.path.join(parent, name), out) for name in files]
    if not names:
        raise UnreadableInput(f"{out}: 0 files to put into a bag; give a folder of outputs")
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def _link(source: Path, target: Path) -> None:
    make_folders(target.parent)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _write_tags(bag: Path, digests: Mapping[Path, Digest], information: Mapping[str, str]) -> None:
    fields = {
        "Bag-Software-Agent": f"cra-srgan-engine {__version__}",
        "Bagging-Date": datetime.now(UTC).date().isoformat(),
        **information,
        "Payload-Oxum": f"{sum(digest.num_bytes for digest in digests.values())}.{len(digests)}",
    }
    tags = {
        "bagit.txt": b"BagIt-Version: 1.0\nTag-File-Character-Encoding: UTF-8\n",
        "bag-info.txt": "".join(f"{name}: {_one_line(value)}\n" for name, value in fields.items()).encode(),
        "manifest-sha256.txt": _manifest({f"data/{name}": digest.sha256 for name, digest in digests.items()}),
    }
    for name, text in tags.items():
        write_atomic(bag / name, text)
    write_atomic(bag / "tagmanifest-sha256.txt", _manifest({name: digest_of(bag / name).sha256 for name in tags}))


def _manifest(digests: Mapping[str, str]) -> bytes:
    """RFC 8493, 2.1.3: line ends and the percent sign of a path are encoded, and nothing else.

    bagit-python does not decode the percent sign: it calls a bag of such names incomplete.
    """
    lines = [f"{sha256}  {_encoded(name)}\n" for name, sha256 in sorted(digests.items())]
    return "".join(lines).encode("utf-8", "surrogateescape")


def _encoded(name: str) -> str:
    return name.replace("%", "%25").replace("\n", "%0A").replace("\r", "%0D")


def _one_line(value: str) -> str:
    return " ".join(value.split())
