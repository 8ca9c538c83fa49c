"""From a request and a header to a plan: sizes, tile shapes, memory and disk, before a pixel is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import product

import numpy as np
import torch

from engine.errors import NotEnoughMemory, OutputTooLarge, PlanError
from engine.geometry import Size, ceil_div, round_up
from engine.image import Layout
from engine.models.card import Card
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.local import LocalHalf
from engine.render import Tiling
from engine.request import Request, output_region, output_size, render_scale
from engine.residual import WORKING_SET_BYTES
from engine.tiling.grid import SHARD_PX, Grid, ShardKey
from engine.tiling.plan import MAX_SIDE_PX, Plan, canvas_bytes

PIXEL_VERSION = 3
"""Raised only when the same plan would give other pixels; guarded by golden hashes."""

MAX_TILE_PX = 256
MIN_TILE_PX = 64
DRAWN_SIDE_PX = 1024
"""Output pixels a side that the network draws at once."""

PROCESS_BYTES = 800 << 20
"""The interpreter with torch and the libraries, and what allocators keep."""

JP2_SAMPLE_BYTES = 14
"""What encoding JPEG 2000 holds per sample: the picture, 32-bit coefficients and the code blocks of noise."""

SUPPORTED_PRECISION = {"auto": "fp32", "fp32": "fp32", "bf16": "bf16"}


def tiling_for(
    request: Request, size: Size, card: Card, channels: int, dtype: str, *, shard_px: int | None = None
) -> tuple[Tiling, int]:
    """The largest tiles that fit the memory, and the bytes one process needs with them.

    None is larger than the picture, and no more is enlarged at once than a shard holds: what lies beyond would be
    thrown away.
    """
    scale = render_scale(request, size)
    drawn_px = min(DRAWN_SIDE_PX, shard_px or SHARD_PX)
    widest = request.tile_px or MAX_TILE_PX
    if widest % CraSrgan.ALIGN_PX or widest < MIN_TILE_PX:
        raise PlanError(f"tiles of {widest} px: a multiple of {CraSrgan.ALIGN_PX}, at least {MIN_TILE_PX}, is needed")
    tile_px = min(widest, max(MIN_TILE_PX, round_up(size.long_side, 64)))
    while True:
        tiling = Tiling(tile_px, min(tile_px, drawn_px // scale), request.batch)
        needed = memory_bytes(card, tiling, scale, channels, dtype)
        limit = request.max_memory_bytes
        if limit is None or needed <= limit:
            return tiling, needed
        if request.tile_px is not None or tile_px // 2 < MIN_TILE_PX or tile_px % 16:
            raise NotEnoughMemory(
                f"{needed:,} bytes of memory are needed with tiles of {tile_px} px, {limit:,} are allowed; "
                "raise --max-memory or lower the scale"
            )
        tile_px //= 2


def memory_bytes(card: Card, tiling: Tiling, scale: int, channels: int, dtype: str) -> int:
    """Upper bound of one process's memory: the widest layers, the shard, the residual's working set."""
    config = card.sizes
    levels = scale.bit_length() - 1
    across = 3 * config.head_channels // config.head_cell_px**2 + 3 * config.guide_channels
    head = tiling.batch * (tiling.tile_px + 2 * card.context_px["1"]) ** 2 * 4 * (across + 40)
    widest = head
    if levels:
        local = _shape_of(config)
        encoded = (tiling.tile_px + 2 * local.encode_margin_px(levels)) ** 2 * 4 * 5 * config.trunk_channels
        kept = (tiling.tile_px + 2 * local.decode_margin_px(levels)) ** 2 * 4 * config.stage_channels[0]
        widest = max(head, encoded, kept + tiling.batch * _decode_bytes(config.stage_channels, local, tiling, levels))
    shard = 3 * SHARD_PX**2 * channels * (1 if dtype == "uint8" else 2)
    return PROCESS_BYTES + 4 * card.parameters + max(widest, 2 * WORKING_SET_BYTES) + shard


@cache
def _shape_of(config: Config) -> LocalHalf:
    """A network without weights, for its margins."""
    with torch.device("meta"):
        return LocalHalf(config, padding="valid")


def _decode_bytes(widths: tuple[int, ...], local: LocalHalf, tiling: Tiling, levels: int) -> int:
    margins = local.stage_margins(levels)
    most = 0
    for level in range(levels):
        side = (tiling.block_px << level) + 2 * margins[level].features_px
        grown = 4 * widths[level + 1] if level + 1 < len(widths) else 12
        most = max(most, side**2 * 4 * (3 * widths[level] + 2 * grown + 60))
    return most


def make_plan(
    request: Request,
    layout: Layout,
    card: Card,
    *,
    name: str,
    input_sha256: str,
    mask_sha256: str,
    formats: Sequence[str] = (),
    shard_px: int | None = None,
) -> tuple[Plan, Tiling]:
    """The plan of one picture. Raises PlanError where the request cannot be met."""
    size = output_size(request, layout.size)
    if size.long_side > MAX_SIDE_PX:
        raise OutputTooLarge(
            f"{name}: the output would be {size}, {MAX_SIDE_PX} px a side is the most; lower the scale or use --box"
        )
    scale = render_scale(request, layout.size)
    tiling, ram = tiling_for(request, layout.size, card, layout.channels, layout.dtype, shard_px=shard_px)
    if "jp2" in formats:
        ram = max(ram, PROCESS_BYTES + JP2_SAMPLE_BYTES * size.num_pixels * layout.channels)
    grid = Grid(size) if shard_px is None else Grid(size, shard_px=shard_px)
    return Plan(
        name=name,
        size=size,
        channels=layout.channels,
        dtype=layout.dtype,
        grid=grid,
        input_sha256=input_sha256,
        mask_sha256=mask_sha256,
        model=card.name,
        model_sha256=card.sha256,
        parameters=_parameters(request, layout.size, scale, tiling),
        projected_ram_bytes=ram,
        projected_disk_bytes=disk_bytes(layout, grid, has_mask=mask_sha256 != "none", formats=formats),
    ), tiling


def _parameters(request: Request, size: Size, scale: int, tiling: Tiling) -> Mapping[str, int | float | str]:
    region = output_region(request, size)
    return {
        "scale": scale,
        "long_side_px": request.long_side_px or 0,
        "box": f"{region.y0},{region.x0},{region.size.h},{region.size.w}",
        "precision": resolved_precision(request.precision),
        "page": request.page or 0,
        "metadata": "stripped" if request.strip_metadata else "carried",
        "tile_px": tiling.tile_px,
        "block_px": tiling.block_px,
        "batch": tiling.batch,
        "backend": f"torch {torch.__version__}" + ("" if request.device == "cpu" else f" on {request.device}"),
        "pixel_version": PIXEL_VERSION,
    }


def resolved_precision(precision: str) -> str:
    """`auto` is fp32: bf16 is faster but moves pixels by up to a few levels."""
    if precision not in SUPPORTED_PRECISION:
        raise PlanError(f"precision {precision!r} is not one of {', '.join(SUPPORTED_PRECISION)}")
    return SUPPORTED_PRECISION[precision]


def disk_bytes(layout: Layout, grid: Grid, *, has_mask: bool, formats: Sequence[str]) -> int:
    """Upper bound: the canvas uncompressed, as much again for each export (a TIFF has all levels) and for one on its
    way, the map of generated pixels, input and mask staged, residuals of 30 % holes."""
    item = 1 if layout.dtype == "uint8" else 2
    staged = layout.size.num_pixels * (layout.channels * item + (2 if has_mask else 0))
    detail = int(0.3 * layout.size.num_pixels * 6) if has_mask else 0
    generated = grid.size.num_pixels if has_mask else 0
    on_its_way = max(0 if set(formats) <= {"ome-zarr"} else grid.size.num_pixels * layout.channels * item, generated)
    outputs = kept_bytes(layout, grid, has_mask=has_mask, formats={"ome-zarr", *formats})  # a step, if no output
    return outputs + on_its_way + staged + detail


def kept_bytes(layout: Layout, grid: Grid, *, has_mask: bool, formats: Collection[str]) -> int:
    """Upper bound of the outputs: uncompressed; a TIFF has all levels, as the canvas does."""
    pyramid = canvas_bytes(grid, layout.channels, layout.dtype)
    flat = grid.size.num_pixels * layout.channels * np.dtype(layout.dtype).itemsize
    outputs = [pyramid if fmt in ("ome-zarr", "tiff") else flat for fmt in formats]
    return sum(outputs) + (grid.size.num_pixels if has_mask else 0)


def drawing_order(plan: Plan, tiling: Tiling) -> Iterator[ShardKey]:
    """All shards, the full size first and there those of one tile together, so that each tile is encoded once."""
    rows, columns = (ceil_div(side, plan.grid.shard_px) for side in (plan.size.h, plan.size.w))
    across = max(1, tiling.tile_px * int(plan.parameters["scale"]) // plan.grid.shard_px)
    for top, left in product(range(0, rows, across), range(0, columns, across)):
        inside = product(range(top, min(top + across, rows)), range(left, min(left + across, columns)))
        yield from (ShardKey(0, iy, ix) for iy, ix in inside)
    for level in range(1, len(plan.grid.level_sizes)):
        yield from plan.grid.keys(level)


def halo_cost(card: Card, tiling: Tiling, scale: int) -> float:
    """Share of the network's work that is spent on halos and thrown away, relative to the work kept."""
    done, kept = _operations(card, tiling, scale)
    return done / kept - 1


def network_operations(card: Card, tiling: Tiling, output: Size, scale: int) -> float:
    """Multiply-adds for an output, halos included; inpainting counts as if every tile had a hole."""
    done, _ = _operations(card, tiling, scale)
    tiles = ceil_div(output.h, tiling.tile_px * scale) * ceil_div(output.w, tiling.tile_px * scale)
    return done * tiles


def _operations(card: Card, tiling: Tiling, scale: int) -> tuple[float, float]:
    """Multiply-adds for one tile: with its halo, and for its own pixels alone."""
    config, local, levels = card.sizes, _shape_of(card.sizes), scale.bit_length() - 1
    tile = tiling.tile_px
    cell = config.head_cell_px**2
    blocks = 2 * len(config.head_dilations) * config.head_channels / cell
    head = 9 * config.head_channels * (config.guide_channels + 8 + blocks)
    if levels == 0:
        return head * float(tile + 2 * local.head.margin_px) ** 2, head * float(tile) ** 2
    trunk = 9 * config.trunk_channels**2 * (2 * config.trunk_blocks + 3)
    encode = head + trunk
    done = encode * float(tile + 2 * local.encode_margin_px(levels)) ** 2
    kept = encode * float(tile) ** 2
    margins, blocks = local.stage_margins(levels), ceil_div(tile, tiling.block_px) ** 2
    for level in range(levels):
        width = config.stage_channels[level]
        grown = 4 * config.stage_channels[level + 1] if level + 1 < len(config.stage_channels) else 0
        work = 9 * width * (2 * config.stage_blocks[level] * width + 12 + grown) + 5000  # bicubic, back-projection
        done += work * blocks * float((tiling.block_px << level) + 2 * margins[level].features_px) ** 2
        kept += work * float(tile << level) ** 2
    return done, kept
