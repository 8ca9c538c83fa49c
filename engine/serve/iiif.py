"""What an IIIF Image API 3.0 request asks for, in pixels (https://iiif.io/api/image/3.0/); nothing is drawn here.

    {region}/{size}/{rotation}/{quality}.{format}

Compliance level 2, and mirroring. Not offered: enlarging (`^`), arbitrary angles, `bitonal`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from engine.geometry import Box, Size

TILE_PX = 512
MAX_AREA_PX = 1 << 22
"""Of one answer."""
MAX_SIDE_PX = 16383
"""Of one answer: WebP has no more."""
FORMATS: Mapping[str, str] = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
QUALITIES = ("default", "color", "gray")
_KNOWN_FORMATS = frozenset((*FORMATS, "tif", "gif", "jp2", "pdf"))
_KNOWN_QUALITIES = frozenset((*QUALITIES, "bitonal"))
_CONTEXT = "http://iiif.io/api/image/3/context.json"
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_BOX_PX = re.compile(r"(\d+),(\d+),(\d+),(\d+)", re.ASCII)
_BOX_PERCENT = re.compile(rf"pct:({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})", re.ASCII)
_SIDES = re.compile(r"(\d+),(\d+)", re.ASCII)
_MOST_DIGITS = 12


class BadRequestError(ValueError):
    """Not a request of the Image API, or one of no pixels (400)."""


class NotOfferedError(ValueError):
    """A request of the Image API that this service does not answer (501)."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What to draw."""

    region: Box
    """Inside the picture, in pixels of the full size."""
    size: Size
    """Of the answer before it is turned."""
    mirrored: bool
    """Left and right, before it is turned."""
    quarter_turns: int
    """Clockwise, 0 to 3."""
    quality: str
    fmt: str


def parse(path: str, full: Size) -> ImageRequest:
    """The request of the last four parts of an address, of a picture of size `full`.

    Raises BadRequestError and NotOfferedError.
    """
    parts = path.split("/")
    if len(parts) != 4 or len(path) > 200:
        raise BadRequestError("expected {region}/{size}/{rotation}/{quality}.{format}")
    region = _region(parts[0], full)
    mirrored, quarter_turns = _rotation(parts[2])
    quality, _, fmt = parts[3].rpartition(".")
    _offered("quality", quality, QUALITIES, _KNOWN_QUALITIES)
    _offered("format", fmt, tuple(FORMATS), _KNOWN_FORMATS)
    return ImageRequest(region, _size(parts[1], region.size), mirrored, quarter_turns, quality, fmt)


def image_information(identifier: str, full: Size, level_sizes: Sequence[Size]) -> dict[str, object]:
    """`info.json` of a picture with a pyramid; `identifier`: its address."""
    sizes = [size for size in reversed(level_sizes) if size == _largest(size)]
    return {
        "@context": _CONTEXT,
        "id": identifier,
        "type": "ImageService3",
        "protocol": "http://iiif.io/api/image",
        "profile": "level2",
        "width": full.w,
        "height": full.h,
        "maxWidth": MAX_SIDE_PX,
        "maxHeight": MAX_SIDE_PX,
        "maxArea": MAX_AREA_PX,
        "sizes": [{"width": size.w, "height": size.h} for size in sizes],
        "tiles": [{"width": TILE_PX, "height": TILE_PX, "scaleFactors": [1 << n for n in range(len(level_sizes))]}],
        "preferredFormats": ["jpg"],
        "extraFormats": [name for name in FORMATS if name not in ("jpg", "png")],
        "extraQualities": [name for name in QUALITIES if name != "default"],
        "extraFeatures": ["mirroring", "profileLinkHeader", "canonicalLinkHeader"],
    }


def canonical(request: ImageRequest, full: Size) -> str:
    """The one spelling of a request (section 4.7)."""
    box, whole = request.region, Box.of(full)
    region = "full" if box == whole else f"{box.x0},{box.y0},{box.size.w},{box.size.h}"
    size = "max" if request.size == _largest(box.size) else f"{request.size.w},{request.size.h}"
    turned = f"{'!' if request.mirrored else ''}{90 * request.quarter_turns}"
    quality = "gray" if request.quality == "gray" else "default"
    return f"{region}/{size}/{turned}/{quality}.{request.fmt}"


def _region(text: str, full: Size) -> Box:
    whole = Box.of(full)
    if text == "full":
        return whole
    if text == "square":
        side = min(full.h, full.w)
        return Box(0, 0, side, side).shifted((full.h - side) // 2, (full.w - side) // 2)
    if found := _BOX_PX.fullmatch(text):
        x, y, w, h = (_int(part) for part in found.groups())
    elif found := _BOX_PERCENT.fullmatch(text):
        shares = [_fraction(part) / 100 for part in found.groups()]
        sides = (full.w, full.h, full.w, full.h)
        x, y, w, h = (round(share * side) for share, side in zip(shares, sides, strict=True))
    else:
        raise BadRequestError("the region is full, square, x,y,w,h or pct:x,y,w,h")
    box = Box(y, x, y + h, x + w).intersection(whole)
    if box.empty:
        raise BadRequestError(f"the region has no pixel of this picture of {full} (width x height)")
    return box


def _size(text: str, region: Size) -> Size:
    """Of the answer to a region. Raises what `parse` raises."""
    if text.startswith("^"):
        raise NotOfferedError("enlarging (^) is not offered: ask for the size of the region at most, or `max`")
    if text == "max":
        return _largest(region)
    if text.startswith("pct:"):
        if not re.fullmatch(_NUMBER, text[4:], re.ASCII):
            raise BadRequestError("the size is max, w, ,h pct:n w,h or !w,h")
        share = _fraction(text[4:]) / 100
        size = Size(round(region.h * share), round(region.w * share))
    elif text.startswith("!") and (found := _SIDES.fullmatch(text[1:])):
        w, h = (_int(part) for part in found.groups())
        return _confined(region, w, h)
    elif found := _SIDES.fullmatch(text):
        w, h = (_int(part) for part in found.groups())
        size = Size(h, w)
    elif re.fullmatch(r"\d+,", text, re.ASCII):
        w = _int(text[:-1])
        size = Size(max(1, round(Fraction(region.h * w, region.w))) if w else 0, w)
    elif re.fullmatch(r",\d+", text, re.ASCII):
        h = _int(text[1:])
        size = Size(h, max(1, round(Fraction(region.w * h, region.h))) if h else 0)
    else:
        raise BadRequestError("the size is max, w, ,h pct:n w,h or !w,h")
    if size.h < 1 or size.w < 1:
        raise BadRequestError("the size has no pixel")
    if size.h > region.h or size.w > region.w:
        raise BadRequestError(f"{size} (width x height) is more than the region's {region}; enlarging is not offered")
    if size.num_pixels > MAX_AREA_PX or size.long_side > MAX_SIDE_PX:
        raise BadRequestError(
            f"{size} (width x height) is asked for, {MAX_AREA_PX} pixels and {MAX_SIDE_PX} px a side are the most; "
            "ask for tiles"
        )
    return size


def _largest(region: Size) -> Size:
    """The region itself, or as much of it as an answer may hold."""
    shrink = min(math.sqrt(MAX_AREA_PX / region.num_pixels), MAX_SIDE_PX / region.long_side)
    if shrink >= 1:
        return region
    return Size(max(1, int(region.h * shrink)), max(1, int(region.w * shrink)))


def _confined(region: Size, w: int, h: int) -> Size:
    """As large as possible within (w, h), the region and what an answer may hold, in the region's shape."""
    if not w or not h:
        raise BadRequestError("the size has no pixel")
    most = _largest(region)
    shrink = min(Fraction(1), Fraction(w, region.w), Fraction(h, region.h), Fraction(most.w, region.w))
    return Size(min(max(1, round(region.h * shrink)), h, most.h), min(max(1, round(region.w * shrink)), w, most.w))


def _rotation(text: str) -> tuple[bool, int]:
    mirrored = text.startswith("!")
    number = text.removeprefix("!")
    if not re.fullmatch(_NUMBER, number, re.ASCII) or (angle := _fraction(number)) > 360:
        raise BadRequestError("the rotation is n or !n, 0 to 360 degrees")
    if angle % 90:
        raise NotOfferedError("rotations are offered by 0, 90, 180 and 270 degrees")
    return mirrored, int(angle // 90) % 4


def _offered(what: str, name: str, offered: Sequence[str], known: frozenset[str]) -> None:
    if name in offered:
        return
    message = f"the {what} is one of {', '.join(offered)}"
    raise NotOfferedError(message) if name in known else BadRequestError(message)


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise BadRequestError(f"a number has {len(text)} digits, {_MOST_DIGITS} are the most")
    return int(text)


def _fraction(text: str) -> Fraction:
    if len(text) > 2 * _MOST_DIGITS:
        raise BadRequestError(f"a number has {len(text)} digits, {2 * _MOST_DIGITS} are the most")
    return Fraction(text if text[0] != "." else f"0{text}")
