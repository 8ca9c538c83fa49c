"""What is asked for one picture, and how many pixels that makes. Needs no network."""

from dataclasses import dataclass

from engine.errors import OutputTooLarge, PlanError
from engine.geometry import Box, Size, ceil_div
from engine.models.cra_srgan.config import SCALES
from engine.resample import source_box


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for; None leaves the choice to the plan."""

    scale: int = 1
    long_side_px: int | None = None
    """Long side of the whole picture's output; takes the place of `scale`."""
    box: Box | None = None
    """Region in input pixels."""
    precision: str = "auto"
    device: str = "cpu"
    """"cpu" or "cuda". Their pixels differ in the last bits, so their plans do."""
    page: int | None = None
    """Of a TIFF with several, counted from 0."""
    strip_metadata: bool = False
    """Carry nothing but the colour profile."""
    max_memory_bytes: int | None = None
    tile_px: int | None = None
    batch: int = 1


def render_scale(request: Request, size: Size) -> int:
    """The smallest scale of the network that reaches the request."""
    if request.long_side_px is None:
        if request.scale not in SCALES:
            raise PlanError(f"scale {request.scale} is not one of {SCALES}; use --long-side for other sizes")
        return request.scale
    for scale in SCALES:
        if size.long_side * scale >= request.long_side_px:
            return scale
    largest = size.long_side * SCALES[-1]
    raise OutputTooLarge(
        f"a long side of {request.long_side_px} px is asked of a picture of {size}; {largest} px is the most "
        "(x16): restore to that size first, then again"
    )


def output_region(request: Request, size: Size) -> Box:
    """The input pixels to restore. Raises PlanError where the box is not inside the picture."""
    whole = Box.of(size)
    if request.box is None:
        return whole
    if request.box.empty or not whole.contains(request.box):
        b = request.box
        raise PlanError(
            f"the box y,x,h,w = {b.y0},{b.x0},{b.y1 - b.y0},{b.x1 - b.x0} is not inside the picture of {size} "
            "(width x height); give --box inside it"
        )
    return request.box


def output_size(request: Request, size: Size) -> Size:
    """Pixels of the output."""
    region = output_region(request, size).size
    if request.long_side_px is None:
        return region.scaled(render_scale(request, size))
    longest, wanted = size.long_side, request.long_side_px
    return Size(max(1, round(region.h * wanted / longest)), max(1, round(region.w * wanted / longest)))


def drawn_box(plan_size: Size, region: Box, scale: int, box: Box) -> tuple[Box, Box]:
    """For a box of the output: the input region to draw, and what that is in pixels of the enlarged region."""
    enlarged = region.size.scaled(scale)
    touched = source_box(box, source=enlarged, target=plan_size)
    inner = Box(touched.y0 // scale, touched.x0 // scale, ceil_div(touched.y1, scale), ceil_div(touched.x1, scale))
    return inner.shifted(region.y0, region.x0), inner.scaled(scale)
