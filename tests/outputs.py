"""What a finished run leaves, for comparing two of them."""

from pathlib import Path

from engine.receipt import read_receipt
from engine.tiling.seal import seal

FACTS = {
    "input": {"name": "a.png", "sha256": "0" * 64, "bytes": 1, "digest_of": "file"},
    "mask": None,
    "generated": {"missing_px": 0, "of_px": 1, "share": 0.0, "statement": "Nothing was missing."},
    "model": {"name": "lite", "sha256": "1" * 64, "licence": "Apache-2.0"},
    "software": {"cra-srgan-engine": "0"},
}
"""What `engine.provenance.describe` would tell, as far as a receipt must have it."""


def files(out: Path) -> dict[str, bytes]:
    """Every file below a folder, but locks, which are empty and may stay when a process is killed."""
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def timeless(out: Path) -> dict[str, bytes]:
    """As `files`, but of receipts all except when the picture was finished."""
    found = files(out)
    for name in found:
        if (receipt := read_receipt(out / name)) is not None:
            assert receipt.pop("finished")
            found[name] = seal(receipt)
    return found
