"""Small JSON files that notice any change to themselves."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

_FIELD = "seal"


def seal(data: Mapping[str, object]) -> bytes:
    """The text of `data` with one more field: the sha256 of the text without it. `data` has no field `seal`."""
    digest = hashlib.sha256(_text(data).encode()).hexdigest()
    return _text({**data, _FIELD: digest}).encode()


def unseal(text: bytes) -> dict[str, Any] | None:
    """What was sealed; None unless every byte is as `seal` wrote it."""
    try:
        found = json.loads(text)
        data = {name: value for name, value in found.items() if name != _FIELD}
        # Bytes, not values: JSON has many spellings of one value, and a changed file is a changed file.
        return cast("dict[str, Any]", data) if seal(data) == text else None
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


def _text(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=1, allow_nan=False)
