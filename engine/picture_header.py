"""What a file's header says of its stored pixels, and what becomes of them on the way in."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader

from engine.geometry import Size

MAX_WORKING_BYTES = 512 << 20
"""What a decoder may have to hold at once: interlaced, progressive and single-strip files are not streams."""

_MAX_NAMES = 12

CONVERSIONS = {
    "": None,
    "cmyk": "CMYK to sRGB through the embedded profile, relative colorimetric",
    "float": "32-bit floating point in [0, 1] to 16 bit, rounded half to even",
    "premultiplied": "alpha multiplied into the colours to straight alpha",
    "bits": "fewer than 8 or 16 bits per channel to the whole range of 8 or 16",
}
"""How stored samples become the picture's, where they are not the same; the words go into the provenance."""


@dataclass(frozen=True, slots=True)
class Header:
    """The layout of the stored pixels, before any EXIF orientation."""

    format: str
    """"png", "jpeg", "tiff", "webp", "jpeg2000"."""
    size: Size
    channels: int
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha, after palettes and transparent colours are expanded."""
    dtype: str
    """"uint8" or "uint16"."""
    working_bytes: int
    """The least that a decoder must hold at once where the file cannot be read row by row, else 0."""
    conversion: str = ""
    """A key of `CONVERSIONS`."""
    stored_bits: int = 0
    """Bits per channel where the conversion is "bits", else 0."""
    directory: int = 0
    """Which of a TIFF's directories holds the picture."""
    needs_tifffile: bool = False
    """A TIFF that libtiff, as libvips has it, does not decode."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """16-bit colours that `needs_tifffile` must look up."""
    resolution_px_per_mm: tuple[float, float] | None = None
    """(y, x) as stored, before any orientation; None where the file states none, or one without a unit."""
    has_profile: bool = False
    """Whether there is an ICC profile, which the decoder may yet find damaged; told of PNG only."""
    left_out: tuple[str, ...] = ()
    """What lies beside the pixels and is not carried, in words for the user."""

    @property
    def converted(self) -> str | None:
        return CONVERSIONS[self.conversion]

    @property
    def stored_channels(self) -> int:
        """As the decoder gives them."""
        return 4 if self.conversion == "cmyk" else self.channels

    @property
    def stored_dtype(self) -> str:
        """As the decoder gives it."""
        return "float32" if self.conversion == "float" else self.dtype


def listed(names: Iterable[str]) -> str:
    """Sorted, each once, and not more than a person reads."""
    found = sorted(set(names))
    more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
    return ", ".join(found[:_MAX_NAMES]) + more


def read_exactly(file: BufferedReader, num_bytes: int) -> bytes:
    """`num_bytes`, or b"" where the file ends before them."""
    data = file.read(num_bytes)
    return data if len(data) == num_bytes else b""


def big_endian(data: bytes) -> int:
    return int.from_bytes(data, "big")
