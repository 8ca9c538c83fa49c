"""Types and options that several commands have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engine.geometry import Box


class Scale(StrEnum):
    """Enlargements of the network."""

    X1 = "1"
    X2 = "2"
    X4 = "4"
    X8 = "8"
    X16 = "16"


class Format(StrEnum):
    OME_ZARR = "ome-zarr"
    TIFF = "tiff"
    PNG = "png"
    JPEG = "jpeg"
    JP2 = "jp2"
    IIIF = "iiif"


class Graph(StrEnum):
    """Of a network, for other programs."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    TORCHSCRIPT = "torchscript"


class Compression(StrEnum):
    """Of TIFF; all lossless."""

    NONE = "none"
    LZW = "lzw"
    DEFLATE = "deflate"
    ZSTD = "zstd"


class Precision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Degradation(StrEnum):
    CLEAN = "clean"
    SCAN = "scan"


def parse_bytes(text: str) -> int:
    """`4GB`, `512MB`, `1.5GiB` or a number of bytes."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
    lowered = text.strip().lower()
    unit = next((u for u in sorted(units, key=len, reverse=True) if lowered.endswith(u)), "")
    try:
        num_bytes = int(float(lowered.removesuffix(unit)) * units.get(unit, 1))
        if num_bytes > 0:
            return num_bytes
        raise ValueError
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a size; write 4GB, 512MB or a number of bytes") from None


def _parse_box(text: str) -> Box:
    """`y,x,h,w` in input pixels."""
    try:
        y, x, h, w = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not y,x,h,w: four whole numbers with commas") from None
    return Box(y, x, y + h, x + w)


def parse_local(text: str) -> Path:
    """A folder of this machine; what needs one says so, instead of looking for a folder called `s3:`."""
    if text.startswith("s3://"):
        raise typer.BadParameter(f"{text} is on an object store; copy the outputs to a folder first")
    return Path(text)


def parse_span(text: str, option: str) -> tuple[int, int]:
    """`MIN:MAX` of an option, 1 at least."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise typer.BadParameter(f"{text!r} is not MIN:MAX with 1 at least", param_hint=option)
    return int(least), int(most)


Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Pictures (PNG, JPEG, TIFF, WebP, JPEG 2000, OME-Zarr), folders with all below them, quoted patterns "
        "(** for sub-folders), lists (.txt, one path a line) or s3://bucket/prefix.",
        show_default=False,
    ),
]
Out = Annotated[
    str,
    typer.Option(
        "--out", help="For the outputs; a folder is made where it is missing.", metavar="DIR|s3://BUCKET/PREFIX"
    ),
]
LocalFolder = Annotated[
    Path, typer.Argument(help="Folder of finished outputs.", parser=parse_local, metavar="DIR", show_default=False)
]
MaskOption = Annotated[
    str,
    typer.Option(
        "--mask", help="Mask file (non-zero = missing), a folder of masks, auto or none.", metavar="FILE|DIR|auto|none"
    ),
]
ScaleOption = Annotated[Scale | None, typer.Option("--scale", help="Enlargement.")]
LongSide = Annotated[int | None, typer.Option("--long-side", min=1, help="Long side of the output in pixels.")]
BoxOption = Annotated[
    Box | None, typer.Option("--box", parser=_parse_box, metavar="y,x,h,w", help="Restore one region, input pixels.")
]
Model = Annotated[str | None, typer.Option("--model", help="Embedded name or .safetensors file.")]
DegradationOption = Annotated[Degradation, typer.Option("--degradation", help="What the picture went through.")]
Fidelity = Annotated[
    float | None,
    typer.Option("--fidelity", min=0, max=1, help="0: most texture, 1: fewest errors (what is done without it)."),
]
Formats = Annotated[list[Format], typer.Option("--format", help="May be given more than once.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="auto is fp32.")]
MaxMemory = Annotated[
    int | None, typer.Option("--max-memory", parser=parse_bytes, metavar="4GB", help="Limit of one process.")
]
Page = Annotated[int | None, typer.Option("--page", min=0, help="Page of a TIFF with several, counted from 0.")]
StripMetadata = Annotated[
    bool, typer.Option("--strip-metadata", help="Carry the colour profile, but no EXIF, XMP, IPTC or resolution.")
]
TiffCompression = Annotated[Compression, typer.Option("--tiff-compression", help="Of TIFF outputs; all lossless.")]
Replace = Annotated[bool, typer.Option("--replace", help="Swap earlier outputs of another plan.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Refuse inputs with more pixels than this.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per picture on stdout.")]
DEFAULT_FORMATS = [Format.OME_ZARR, Format.PNG]
