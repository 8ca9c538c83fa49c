"""Stored samples that are not the picture's own 8 or 16 bits, made so: pure functions of strips of rows."""

from pathlib import Path

import imagecodecs
import numpy as np
import pyvips
from numpy.typing import NDArray

from engine.errors import UnreadableInput, UnsupportedInput
from engine.staged import Pixels

_RELATIVE_COLORIMETRIC = 1


def srgb_profile() -> bytes:
    """The profile of converted pictures: the sRGB that libvips brings along."""
    return bytes(pyvips.Image.profile_load("srgb"))


def is_cmyk_profile(icc: bytes) -> bool:
    """Whether it says of itself that it is an ICC profile of CMYK."""
    return icc[36:40] == b"acsp" and icc[16:20] == b"CMYK"


def cmyk_to_rgb(pixels: Pixels, profile: bytes, path: Path) -> Pixels:
    """`(h, w, 3)` sRGB from `(h, w, 4)`, relative colorimetric, no black point compensation; the dtype stays.

    Uses lcms directly: libvips would put a press profile of its own in the place of one that is damaged.
    Raises UnreadableInput for a profile that lcms does not take.
    """
    try:
        return imagecodecs.cms_transform(  # pyright: ignore[reportUnknownMemberType]
            np.ascontiguousarray(pixels),
            profile,
            srgb_profile(),
            colorspace="cmyk",
            outcolorspace="rgb",
            outdtype=pixels.dtype,
            intent=_RELATIVE_COLORIMETRIC,
        )
    except imagecodecs.CmsError as error:
        raise UnreadableInput(
            f"{path}: its CMYK profile of {len(profile):,} bytes is damaged ({error}). Assign the profile anew, or "
            "convert the picture to RGB."
        ) from error


def float_to_uint16(pixels: NDArray[np.float32], path: Path) -> Pixels:
    """Value x 65535, rounded half to even. Raises UnsupportedInput for a value outside [0, 1] or not a number."""
    num_nan = int(np.count_nonzero(np.isnan(pixels)))
    if num_nan:
        raise UnsupportedInput(
            f"{path}: {num_nan:,} of {pixels.size:,} values of a strip are not numbers. Fill them, or save 16 bit."
        )
    least, most = float(pixels.min()), float(pixels.max())
    if least < 0 or most > 1:
        raise UnsupportedInput(
            f"{path}: floating-point values from {least:g} to {most:g}; 0 to 1 is restored. Scale them to 0 to 1, or "
            "save it as 16 bit."
        )
    return np.rint(pixels.astype(np.float64) * 65535).astype(np.uint16)


def to_straight(pixels: Pixels, path: Path) -> Pixels:
    """Colours divided by the alpha in the last channel, rounded half up; 0 where alpha is 0.

    Multiplying by alpha again gives back the stored colours. Raises UnsupportedInput for a colour above its alpha: no
    product is.
    """
    top = int(np.iinfo(pixels.dtype).max)
    colours, alpha = pixels[..., :-1].astype(np.uint64), pixels[..., -1:].astype(np.uint64)
    above = np.argwhere(colours > alpha)
    if len(above):
        y, x, channel = above[0]
        raise UnsupportedInput(
            f"{path}: alpha is said to be multiplied into the colours, yet a colour of {colours[y, x, channel]} has "
            f"alpha {alpha[y, x, 0]}. Save it with straight (unassociated) alpha."
        )
    straight = (colours * (2 * top) + alpha) // np.maximum(2 * alpha, 1)
    return np.concatenate([np.where(alpha > 0, straight, 0), alpha], axis=2).astype(pixels.dtype)


def spread(pixels: Pixels, bits: int) -> Pixels:
    """Values of 0 to 2^bits - 1 over the whole range of their dtype, rounded half up."""
    last, top = (1 << bits) - 1, int(np.iinfo(pixels.dtype).max)
    return ((pixels.astype(np.uint64) * (2 * top) + last) // (2 * last)).astype(pixels.dtype)
