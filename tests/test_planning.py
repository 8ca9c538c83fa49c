"""A plan is known before a pixel is read: sizes, tiles, memory, and why not."""

import re
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import NotEnoughMemory, OutputTooLarge, PlanError
from engine.geometry import Box, Size
from engine.image import ArrayPicture
from engine.models.card import Card
from engine.models.cra_srgan.config import SCALES, full, lite
from engine.models.cra_srgan.generator import CraSrgan
from engine.planning import (
    MAX_TILE_PX,
    MIN_TILE_PX,
    drawing_order,
    halo_cost,
    make_plan,
    memory_bytes,
    network_operations,
    tiling_for,
)
from engine.render import Tiling
from engine.request import Request, drawn_box, output_region, output_size, render_scale

SIZE = Size(300, 450)


def card_of(config) -> Card:
    network = CraSrgan(config)
    return Card(
        name="any",
        network="cra-srgan",
        task="joint",
        scales=SCALES,
        context_px={str(scale): network.context_px(scale) for scale in SCALES},
        align_px=8,
        degradation="clean",
        licence="none",
        config=config,
        sha256="0" * 64,
        parameters=1_400_000,
    )


CARD = card_of(lite())


def planned(request: Request, *, h: int = 60, w: int = 90, channels: int = 3):
    source = ArrayPicture(np.zeros((h, w, channels), np.uint8))
    return make_plan(request, source, CARD, name="a", input_sha256="i", mask_sha256="none")


def numbers(error: BaseException) -> list[int]:
    return [int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", str(error))]


@pytest.mark.parametrize("scale", SCALES)
def test_the_output_is_the_input_times_the_scale(scale):
    assert output_size(Request(scale=scale), SIZE) == SIZE.scaled(scale)
    assert output_size(Request(scale=scale, box=Box(3, 5, 10, 100)), SIZE) == Size(7 * scale, 95 * scale)


@pytest.mark.parametrize(("long_side", "scale"), [(1, 1), (450, 1), (451, 2), (900, 2), (1801, 8), (7200, 16)])
def test_a_long_side_takes_the_next_scale_up(long_side, scale):
    request = Request(long_side_px=long_side)
    assert render_scale(request, SIZE) == scale
    size = output_size(request, SIZE)
    assert size.long_side == long_side
    assert abs(size.h - 300 * long_side / 450) <= 0.5 or size.h == 1


def test_what_cannot_be_reached_is_refused_with_both_numbers():
    with pytest.raises(OutputTooLarge) as caught:
        render_scale(Request(long_side_px=7201), SIZE)
    assert {7201, 7200} <= set(numbers(caught.value))
    with pytest.raises(PlanError, match="3 is not one of"):
        render_scale(Request(scale=3), SIZE)


@pytest.mark.parametrize("box", [Box(0, 0, 301, 10), Box(-1, 0, 5, 5), Box(4, 4, 4, 9), Box(0, 440, 10, 451)])
def test_a_box_outside_the_picture_is_refused_with_its_numbers(box):
    with pytest.raises(PlanError, match="450x300") as caught:
        output_region(Request(box=box), SIZE)
    assert f"{box.y0},{box.x0},{box.y1 - box.y0},{box.x1 - box.x0}" in str(caught.value)


def test_an_output_too_large_to_address_is_refused():
    with pytest.raises(OutputTooLarge, match="1048576"):
        planned(Request(scale=16), h=1, w=70_000)


@pytest.mark.parametrize("scale", SCALES)
def test_less_memory_gives_smaller_tiles_that_fit(scale):
    size = Size(2000, 2000)
    tiling, needed = tiling_for(Request(scale=scale), size, CARD, 3, "uint8")
    assert tiling.tile_px == MAX_TILE_PX
    assert needed == memory_bytes(CARD, tiling, scale, 3, "uint8")
    smallest = memory_bytes(CARD, replace(tiling, tile_px=64, block_px=min(64, tiling.block_px)), scale, 3, "uint8")
    limit = (needed + smallest) // 2
    smaller, fits = tiling_for(Request(scale=scale, max_memory_bytes=limit), size, CARD, 3, "uint8")
    assert fits <= limit
    assert smaller.tile_px <= tiling.tile_px
    if smallest < needed:
        assert smaller.tile_px < tiling.tile_px


@pytest.mark.parametrize("scale", [1, 4])
def test_too_little_memory_is_refused_with_both_numbers(scale):
    with pytest.raises(NotEnoughMemory) as caught:
        tiling_for(Request(scale=scale, max_memory_bytes=10**8), SIZE, CARD, 3, "uint8")
    found = numbers(caught.value)
    assert 10**8 in found
    assert max(found) > 10**8


def test_tiles_that_were_asked_for_are_kept_or_refused():
    tiling, _ = tiling_for(Request(scale=2, tile_px=192), SIZE, CARD, 3, "uint8")
    assert tiling.tile_px == 192
    for tile_px in (100, 32, 63):
        with pytest.raises(PlanError, match=str(tile_px)):
            tiling_for(Request(tile_px=tile_px), SIZE, CARD, 3, "uint8")
    with pytest.raises(NotEnoughMemory):
        tiling_for(Request(scale=4, tile_px=512, max_memory_bytes=10**9), SIZE, CARD, 3, "uint8")


@pytest.mark.parametrize(("h", "w"), [(1, 1), (37, 64), (65, 65), (1, 10_000)])
@pytest.mark.parametrize("scale", SCALES)
def test_tiles_are_aligned_and_blocks_lie_inside_them(h, w, scale):
    tiling, _ = tiling_for(Request(scale=scale), Size(h, w), CARD, 3, "uint8")
    assert tiling.tile_px % CraSrgan.ALIGN_PX == 0
    assert MIN_TILE_PX <= tiling.tile_px <= MAX_TILE_PX
    assert tiling.block_px <= tiling.tile_px


CHANGES = [
    Request(scale=4),
    Request(scale=2, box=Box(0, 0, 60, 89)),
    Request(long_side_px=180),
    Request(scale=2, precision="bf16"),
    Request(scale=2, tile_px=64),
    Request(scale=2, batch=4),
]


@pytest.mark.parametrize("request_", CHANGES)
def test_what_changes_a_pixel_changes_the_plan(request_):
    assert planned(request_)[0].plan_id != planned(Request(scale=2))[0].plan_id


def test_what_changes_no_pixel_leaves_the_plan():
    usual, same = planned(Request(scale=2))[0], planned(Request(scale=2, max_memory_bytes=1 << 40))[0]
    assert usual.plan_id == same.plan_id
    assert planned(Request(scale=2, precision="fp32"))[0].plan_id == usual.plan_id  # auto is fp32


def test_unknown_precision_is_refused():
    with pytest.raises(PlanError, match="fp16"):
        planned(Request(precision="fp16"))


@pytest.mark.parametrize(("long_side", "scale"), [(None, 4), (301, 4), (130, 2)])
def test_the_drawn_regions_cover_their_boxes(long_side, scale):
    """Boxes of the output, cut as shards are, need regions that lie inside the region and touch each other."""
    size, region = Size(60, 90), Box(5, 7, 45, 80)
    request = Request(scale=scale, long_side_px=long_side, box=region)
    target = output_size(request, size)
    scale = render_scale(request, size)
    covered = np.zeros((60, 90), bool)
    for y in range(0, target.h, 32):
        for x in range(0, target.w, 32):
            box = Box(y, x, min(y + 32, target.h), min(x + 32, target.w))
            drawn, have = drawn_box(target, region, scale, box)
            assert region.contains(drawn)
            assert have == drawn.shifted(-region.y0, -region.x0).scaled(scale)
            covered[drawn.slices] = True
    assert covered[region.slices].all()
    assert covered.sum() == region.size.num_pixels


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("config", [lite(), full()], ids=["lite", "full"])
def test_larger_tiles_waste_less(scale, config):
    card = card_of(config)
    costs = [halo_cost(card, Tiling(tile, min(tile, 256), 1), scale) for tile in (64, 128, 256, 512)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0
    four = network_operations(card, Tiling(128, 128, 1), Size(256, 256).scaled(scale), scale)
    assert four == pytest.approx(4 * network_operations(card, Tiling(128, 128, 1), Size(128, 128).scaled(scale), scale))


@pytest.mark.parametrize(("h", "w", "scale"), [(1024, 1100, 16), (1300, 600, 8), (700, 900, 4), (50, 60, 2)])
def test_each_tile_is_encoded_once_and_each_shard_drawn_once(h, w, scale):
    plan, tiling = planned(Request(scale=scale), h=h, w=w)
    keys = list(drawing_order(plan, tiling))
    assert sorted(keys) == sorted(plan.grid.all_keys())
    assert [key.level for key in keys] == sorted(key.level for key in keys)
    side = tiling.tile_px * scale
    tiles = [
        (y, x)
        for key in keys
        if key.level == 0
        for box in [plan.grid.box(key)]
        for y in range(box.y0 // side, -(-box.y1 // side))
        for x in range(box.x0 // side, -(-box.x1 // side))
    ]
    changes = [tile for before, tile in zip([None, *tiles], tiles, strict=False) if tile != before]
    assert len(changes) == len(set(changes)), "a tile is left and taken up again"
