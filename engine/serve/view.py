"""Pictures as IIIF shows them: read from canvases, finished or on their way, and drawn for a screen.

What is shown is 8 bit sRGB through the picture's own profile, on white where it is transparent, as in
`engine.tiling.iiif`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
import pyvips
import tensorstore
from numpy.typing import NDArray

from engine import vips
from engine.errors import StorageError
from engine.geometry import Box, Size, ceil_div
from engine.resample import source_box
from engine.serve.iiif import ImageRequest
from engine.tiling.canvas import AnyCanvas, Canvas, Pixels
from engine.tiling.grid import ShardKey
from engine.tiling.iiif import for_the_web

MOST_READ_PX = 1 << 24
"""For one answer: four times as many as it may have. Of what stands in for it as many again."""
MOST_FINER = 3
"""Levels below the one asked for whose shards stand in for a missing one."""
MARGIN_PX = 4
"""Beside what is enlarged, so that where it was cut does not show."""
WEBP_QUALITY = 85
_JPEG = (  # 4:2:0, as image servers do: half of the time and of the bytes; exact pixels are asked for as PNG
    *(cv2.IMWRITE_JPEG_QUALITY, 90),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
)

_INTERPRETATION = {"uint8": ("b-w", "srgb"), "uint16": ("grey16", "rgb16")}
"""Libvips' words for grey and colour; without them it takes the fourth channel for black ink."""

Shown = NDArray[np.uint8]
"""(h, w, 3) or (h, w, 1)"""


@dataclass(frozen=True, slots=True)
class Read:
    """Pixels (h, w, c) of a picture, and whether they are final."""

    pixels: Pixels
    final: bool


class View(Protocol):
    """A picture with its pyramid."""

    @property
    def level_sizes(self) -> Sequence[Size]:
        """Full size first, each half of the one before, rounded up."""
        ...

    @property
    def profile(self) -> bytes | None:
        """ICC, of what `read` gives."""
        ...

    def read(self, box: Box, *, level: int) -> Read:
        """The pixels of a box inside a level."""
        ...


class Stored:
    """A finished canvas in a folder, read by TensorStore: zarr-python takes twice as long for a tile."""

    def __init__(self, canvas: Canvas, profile: bytes | None = None) -> None:
        self.profile = profile
        self._canvas = canvas
        self._arrays = [_array_at(canvas.root / str(level)) for level in range(len(self.level_sizes))]

    @property
    def level_sizes(self) -> Sequence[Size]:
        return self._canvas.grid.level_sizes

    def read(self, box: Box, *, level: int) -> Read:
        try:
            planes = self._arrays[level][:, *box.slices].read().result()
        except (ValueError, OSError):
            with self._canvas.damage_named(self._canvas.grid.keys_in(box, level=level)):
                raise
        return Read(cast("Pixels", cv2.merge(list(planes))).reshape(box.size.h, box.size.w, -1), final=True)


@dataclass(frozen=True, slots=True)
class Growing:
    """A canvas on its way: where a shard is missing, finer ones that are there stand in, or else the overview."""

    canvas: AnyCanvas
    overview: Pixels
    """(h, w, c) The whole picture, small, with its holes filled."""
    profile: bytes | None = None

    @property
    def level_sizes(self) -> Sequence[Size]:
        return self.canvas.grid.level_sizes

    def read(self, box: Box, *, level: int) -> Read:
        grid = self.canvas.grid
        keys = list(grid.keys_in(box, level=level))
        if all(self.canvas.is_done(key) for key in keys):
            try:
                return Read(self.canvas.read(box, level=level), final=True)
            except StorageError:  # struck, or moved to its final place, a moment ago
                pass
        pixels = resized(self.overview, grid.level_size(level), box)
        finest = level
        while finest > max(0, level - MOST_FINER) and box.size.num_pixels << 2 * (level - finest + 1) <= MOST_READ_PX:
            finest -= 1
        for key in keys:
            self._draw_over(pixels, box, level, finest, key, grid.box(key).intersection(box))
        return Read(pixels, final=False)

    def _draw_over(self, pixels: Pixels, box: Box, level: int, finest: int, key: ShardKey, part: Box) -> None:
        """Sets what is stored of `part` of a shard, or of those that it will be made from, in a box of `level`."""
        grid, factor = self.canvas.grid, 1 << (level - key.level)
        if self.canvas.is_done(key):
            try:
                stored = self.canvas.read(part, level=key.level)
            except StorageError:
                return
            target = Box(part.y0 // factor, part.x0 // factor, ceil_div(part.y1, factor), ceil_div(part.x1, factor))
            place = pixels[target.shifted(-box.y0, -box.x0).slices]
            place[:] = cv2.resize(stored, place.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(place.shape)
        elif key.level > finest:
            finer = part.scaled(2).intersection(Box.of(grid.level_size(key.level - 1)))
            for source in grid.keys_in(finer, level=key.level - 1):
                self._draw_over(pixels, box, level, finest, source, grid.box(source).intersection(finer))


@dataclass(frozen=True, slots=True)
class Difference:
    """How far each pixel of a restored picture has moved from the original, which may be smaller: 0 is black."""

    restored: View
    original: View

    @property
    def level_sizes(self) -> Sequence[Size]:
        return self.restored.level_sizes

    @property
    def profile(self) -> bytes | None:
        return None

    def read(self, box: Box, *, level: int) -> Read:
        after, whole = self.restored.read(box, level=level), self.level_sizes[level]
        sizes = self.original.level_sizes
        enough = max((n for n, size in enumerate(sizes) if size.long_side >= whole.long_side), default=0)
        size = sizes[enough]
        at = source_box(box, source=size, target=whole).grown(MARGIN_PX).intersection(Box.of(size))
        before = self.original.read(at, level=enough)
        colour = slice(None, 1 if after.pixels.shape[2] <= 2 else 3)  # alpha is no difference
        moved = cv2.absdiff(
            np.ascontiguousarray(after.pixels[..., colour]),
            np.ascontiguousarray(resized(before.pixels, whole, box, at=at, size=size)[..., colour]),
        )
        return Read(cast("Pixels", moved).reshape(*after.pixels.shape[:2], -1), after.final and before.final)


def is_for_good(view: View) -> bool:
    """Whether it will always show what it shows: what is on its way begins anew where the model is another one."""
    if isinstance(view, Difference):
        return is_for_good(view.restored) and is_for_good(view.original)
    return isinstance(view, Stored)


def resized(pixels: Pixels, whole: Size, box: Box, *, at: Box | None = None, size: Size | None = None) -> Pixels:
    """A box (h, w, c) of a picture that is enlarged or reduced to `whole`: where the box lies changes no pixel.

    `pixels` are the picture, or the part `at` of it where its size is `size`, with a margin of `MARGIN_PX`.
    """
    size = size or Size(*pixels.shape[:2])
    at = at or Box.of(size)
    down, right = size.h / whole.h, size.w / whole.w
    x, y = (box.x0 + 0.5) * right - 0.5 - at.x0, (box.y0 + 0.5) * down - 0.5 - at.y0  # pixel centres
    drawn = cv2.warpAffine(
        pixels,
        np.array([[right, 0, x], [0, down, y]], np.float64),
        (box.size.w, box.size.h),
        flags=(cv2.INTER_CUBIC if down < 1 else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cast("Pixels", drawn).reshape(box.size.h, box.size.w, pixels.shape[2])


def level_for(region: Box, size: Size, level_sizes: Sequence[Size]) -> tuple[int, Box]:
    """The smallest level that has all the detail of an answer of `size` to a region, and the region's box there.

    A smaller one where a distorting answer would have too much read.
    """
    found = 0, region
    for level, whole in enumerate(level_sizes):
        factor = 1 << level
        box = Box(region.y0 // factor, region.x0 // factor, ceil_div(region.y1, factor), ceil_div(region.x1, factor))
        box = box.intersection(Box.of(whole))
        if (box.size.h < size.h or box.size.w < size.w) and found[1].size.num_pixels <= MOST_READ_PX:
            break
        found = level, box
    return found


def shown(view: View, request: ImageRequest) -> tuple[Shown, bool]:
    """The answer's pixels before they are turned, and whether they are final."""
    level, box = level_for(request.region, request.size, view.level_sizes)
    read = view.read(box, level=level)
    pixels = read.pixels
    if box.size != request.size:
        pixels = cv2.resize(pixels, (request.size.w, request.size.h), interpolation=cv2.INTER_AREA)
        pixels = cast("Pixels", pixels).reshape(request.size.h, request.size.w, -1)
    if view.profile is None and pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return cast("Shown", pixels), read.final
    image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels))
    image = image.copy(interpretation=_INTERPRETATION[pixels.dtype.name][0 if pixels.shape[2] <= 2 else 1])
    if view.profile is not None:
        image = vips.carrying(image, {"icc-profile-data": view.profile})
    return _array(for_the_web(image)), read.final


def encode(pixels: Shown, request: ImageRequest) -> bytes:
    """The file that answers a request, from the pixels that it shows."""
    if request.quality == "gray" and pixels.shape[2] == 3:
        pixels = cast("Shown", cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[..., None]
    if request.mirrored:
        pixels = pixels[:, ::-1]
    pixels = np.ascontiguousarray(np.rot90(pixels, -request.quarter_turns))
    if request.fmt == "jpg":  # of the most answers, and twice as fast as by libvips
        done, data = cv2.imencode(
            ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else pixels, _JPEG
        )
        assert done
        return data.tobytes()
    image = pyvips.Image.new_from_array(pixels)
    image = image.copy(interpretation="b-w" if pixels.shape[2] == 1 else "srgb")
    nothing = pyvips.ForeignKeep.NONE
    if request.fmt == "png":
        return bytes(image.pngsave_buffer(compression=1, keep=nothing))
    return bytes(image.webpsave_buffer(Q=WEBP_QUALITY, effort=1, keep=nothing))


def _array_at(folder: Path) -> "tensorstore.TensorStore":
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "fill_missing_data_reads": False,  # black is no answer
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
    try:
        opened = tensorstore.open(spec, open=True, read=True)  # pyright: ignore[reportUnknownMemberType]
        return opened.result()
    except ValueError as error:
        raise StorageError(f"{folder}: cannot be opened ({error}); restore the picture again") from error


def _array(image: pyvips.Image) -> Shown:
    found = cast("Any", image).numpy()
    return found if found.ndim == 3 else found[..., None]
