"""Before/after sheets: the whole picture side by side, then details large enough to judge.

A sheet is (h, w, 3) uint8 RGB. Its columns are damaged, restored and original where the picture keeps its size, and
damaged, a classical repair (Telea 2004, then bicubic enlargement) and restored where it grows.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from engine.evaluate.baselines import bicubic_up, telea
from engine.geometry import Box

MARGIN_PX = 28
GAP_PX = 16
TEXT_PX = 22
LABEL_PX = 44
PAGE = (250, 249, 246)
INK = (40, 40, 40)
FRAME = (255, 196, 0)
WIDE_PX = 1024
"""Column of an enlarged picture: 64 input pixels at x16, one for one."""
NARROW_PX = 600
"""Column of a picture restored at its own size."""
AROUND_PX = 16
"""Input pixels around a detail that the classical repair sees."""

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Detail:
    """A part of the picture shown large."""

    name: str
    box: Box
    """Input pixels."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture with what stands above it."""

    label: str
    pixels: Image


def make_sheet(
    intact: Image, damaged: Image, mask: Mask, restored: Path, *, scale: int, details: tuple[Detail, ...]
) -> Image:
    """The sheet of one picture; `restored` is its OME-Zarr."""
    column = NARROW_PX if scale == 1 else WIDE_PX
    rows = [_whole_row(intact, damaged, mask, restored, scale, details, column)]
    rows += [_detail_row(intact, damaged, mask, restored, scale, detail, column) for detail in details]
    return laid_out(rows, column)


def _whole_row(
    intact: Image, damaged: Image, mask: Mask, restored: Path, scale: int, details: tuple[Detail, ...], column: int
) -> list[Panel]:
    h, w = intact.shape[:2]
    shown = [
        (f"Damaged: {w} x {h} px, {100 * mask.mean():.1f} % missing", damaged),
        (f"Restored: {w * scale} x {h * scale} px", _whole(restored, column)),
    ]
    if scale == 1:
        shown.append(("Original", intact))
    else:
        shown.insert(1, ("Telea, then bicubic", telea(damaged, mask)))
    return [Panel(label, framed(smooth(pixels, column), details, column / w)) for label, pixels in shown]


def _detail_row(
    intact: Image, damaged: Image, mask: Mask, restored: Path, scale: int, detail: Detail, column: int
) -> list[Panel]:
    box = detail.box
    shown = [
        (f"{detail.name}: {box.size.w} x {box.size.h} px of the damaged picture", damaged[box.slices]),
        (f"{detail.name}: restored", read(restored, 0, box.scaled(scale))),
    ]
    if scale == 1:
        shown.append((f"{detail.name}: original", intact[box.slices]))
    else:
        around = box.grown(AROUND_PX).intersection(Box(0, 0, *mask.shape))
        repaired = bicubic_up(telea(damaged[around.slices], mask[around.slices]), scale)
        inner = box.shifted(-around.y0, -around.x0).scaled(scale)
        shown.insert(1, (f"{detail.name}: Telea, then bicubic x{scale}", repaired[inner.slices]))
        shown[2] = (f"{detail.name}: restored x{scale}", shown[2][1])
    return [Panel(label, blocky(pixels, column)) for label, pixels in shown]


def _whole(restored: Path, column_px: int) -> Image:
    """The whole picture from the smallest level of the pyramid that still fills a column."""
    group = zarr.open_group(restored, mode="r")
    levels = [level for level in range(len(list(group.array_keys()))) if group[str(level)].shape[2] >= column_px]
    level = levels[-1] if levels else 0
    _, h, w = group[str(level)].shape
    return read(restored, level, Box(0, 0, h, w))


def read(restored: Path, level: int, box: Box) -> Image:
    """(h, w, 3) of a box of one level of an OME-Zarr picture."""
    planes = np.asarray(zarr.open_group(restored, mode="r")[str(level)][(slice(None), *box.slices)])
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def smooth(pixels: Image, column_px: int) -> Image:
    """As wide as a column, for a look at the whole."""
    return _resized(pixels, column_px, cv2.INTER_CUBIC)


def blocky(pixels: Image, column_px: int) -> Image:
    """As wide as a column, pixels visible, for a look at a detail."""
    return _resized(pixels, column_px, cv2.INTER_NEAREST)


def _resized(pixels: Image, column_px: int, enlarging: int) -> Image:
    h, w = pixels.shape[:2]
    way = cv2.INTER_AREA if w > column_px else enlarging
    return np.asarray(cv2.resize(pixels, (column_px, round(h * column_px / w)), interpolation=way), np.uint8)


def framed(pixels: Image, details: tuple[Detail, ...], factor: float) -> Image:
    """A copy with a thin frame around each detail."""
    out = pixels.copy()
    for detail in details:
        y0, x0, y1, x1 = (round(side * factor) for side in (detail.box.y0, detail.box.x0, detail.box.y1, detail.box.x1))
        cv2.rectangle(out, (x0, y0), (x1 - 1, y1 - 1), FRAME, 2)
    return out


def laid_out(rows: list[list[Panel]], column_px: int) -> Image:
    """Rows of labelled panels on a page."""
    columns = max(len(row) for row in rows)
    width = 2 * MARGIN_PX + columns * column_px + (columns - 1) * GAP_PX
    heights = [LABEL_PX + max(panel.pixels.shape[0] for panel in row) + GAP_PX for row in rows]
    page = PillowImage.new("RGB", (width, 2 * MARGIN_PX + sum(heights) - GAP_PX), PAGE)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT_PX)
    y = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for index, panel in enumerate(row):
            x = MARGIN_PX + index * (column_px + GAP_PX)
            draw.text((x, y + (LABEL_PX - TEXT_PX) // 2 - 4), panel.label, INK, font)
            page.paste(PillowImage.fromarray(panel.pixels), (x, y + LABEL_PX))
        y += height
    return np.asarray(page, np.uint8)
