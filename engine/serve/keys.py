"""Who may use the endpoint: keys, of which only hashes are stored.

A file of keys has a line for each: a name, the sha256 of the key, and the bytes that its pictures may take. Keys are
random and long, so a plain hash cannot be turned back; they are compared in constant time.
"""

import hmac
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from engine.errors import PlanError, Unauthorized
from engine.store import write_atomic

KEY_BYTES = 32
MAX_BYTES = 50 << 30
"""Of one key's pictures, where its line does not say otherwise."""
_LINE = re.compile(r"([\w.-]{1,64})\s+([0-9a-f]{64})(?:\s+(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose pictures are kept apart from others'."""

    name: str
    max_bytes: int = MAX_BYTES


ANYBODY = Owner("anybody", 1 << 62)
"""Of a service without keys."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The owners of a service by the sha256 of their keys; without any, everybody is `ANYBODY`."""

    owners: tuple[tuple[bytes, Owner], ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Raises PlanError for a file that cannot be read, names a key twice, or has none."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path}: cannot be read as a file of keys ({error}); make one with `engine key`"
            ) from error
        owners: dict[str, tuple[bytes, Owner]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None or found[1] in owners:
                raise PlanError(
                    f"{path}: line {number} is not a new name, 64 hex digits and bytes; add with `engine key`"
                )
            owners[found[1]] = bytes.fromhex(found[2]), Owner(found[1], int(found[3] or MAX_BYTES))
        if not owners:
            raise PlanError(f"{path}: has 0 keys, 1 is needed; add one with `engine key NAME --keys {path}`")
        return cls(tuple(owners.values()))

    def owner(self, authorization: str | None) -> Owner:
        """Whose key an Authorization header carries. Raises Unauthorized."""
        if not self.owners:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        given = sha256(key.strip().encode()).digest()
        found = [owner for stored, owner in self.owners if hmac.compare_digest(stored, given)]  # all, in any case
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized("a key is needed; send it as `Authorization: Bearer KEY`")
        return found[0]

    def named(self, name: str) -> Owner:
        """The owner of a name, whose key may be gone from the file."""
        return next((owner for _, owner in self.owners if owner.name == name), Owner(name) if self.owners else ANYBODY)


def add_key(path: Path, name: str, *, max_bytes: int = MAX_BYTES) -> str:
    """Adds a key to a file, which may be new, and gives the key: it is not stored and cannot be told again.

    Raises PlanError where the name is taken or not one.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else "# name  sha256 of the key  bytes of its pictures"
    key = secrets.token_urlsafe(KEY_BYTES)
    line = f"{name} {sha256(key.encode()).hexdigest()} {max_bytes}"
    if _LINE.fullmatch(line) is None or re.search(rf"^{re.escape(name)}\s", text, re.MULTILINE):
        raise PlanError(
            f"{path}: {name!r} is taken, or not 1 to 64 letters, digits and any of ._-; choose another name"
        )
    write_atomic(path, f"{text.rstrip()}\n{line}\n".lstrip().encode())
    path.chmod(0o600)
    return key
