"""What a picture's file says besides its pixels."""

from dataclasses import dataclass
from typing import cast

import pyvips

_UNSTATED_PX_PER_MM = {"png": 2.834, "jpeg": 72 / 25.4, "tiff": 1.0}
"""What libvips says where a file says nothing."""
_ICC_SPACES = {1: b"GRAY", 2: b"GRAY", 3: b"RGB ", 4: b"RGB "}


@dataclass(frozen=True, slots=True)
class Metadata:
    """Carried from the input to every output."""

    icc: bytes | None = None
    """The embedded profile, byte for byte; None where there is none, or one that is not for these channels."""
    resolution_px_per_mm: tuple[float, float] | None = None
    """(y, x), after orientation; None where the file states none."""


def read_metadata(image: pyvips.Image, fmt: str, *, channels: int, orientation: int) -> Metadata:
    """The metadata of a picture that libvips has opened."""
    fields = set(image.get_fields())
    icc = bytes(cast("bytes", image.get("icc-profile-data"))) if "icc-profile-data" in fields else b""
    usable = icc[36:40] == b"acsp" and icc[16:20] == _ICC_SPACES[channels]
    y, x = (image.xres, image.yres) if orientation >= 5 else (image.yres, image.xres)
    unstated = _UNSTATED_PX_PER_MM[fmt]
    stated = min(y, x) > 0 and ("resolution-unit" in fields or (y, x) != (unstated, unstated))
    return Metadata(icc=icc if usable else None, resolution_px_per_mm=(y, x) if stated else None)
