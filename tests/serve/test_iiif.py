"""The Image API's parameters, as https://iiif.io/api/image/3.0/ has them; pictures of odd sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.geometry import Box, Size
from engine.serve.iiif import (
    MAX_AREA_PX,
    MAX_SIDE_PX,
    BadRequestError,
    NotOfferedError,
    canonical,
    image_information,
    parse,
)
from engine.tiling.grid import Grid

FULL = Size(613, 1001)


def asked(path: str, full: Size = FULL) -> tuple[Box, Size]:
    found = parse(f"{path}/0/default.jpg", full)
    return found.region, found.size


@pytest.mark.parametrize(
    ("region", "box"),
    [
        ("full", Box(0, 0, 613, 1001)),
        ("square", Box(0, 194, 613, 807)),
        ("0,0,1001,613", Box(0, 0, 613, 1001)),
        ("10,20,30,40", Box(20, 10, 60, 40)),
        ("990,600,100,100", Box(600, 990, 613, 1001)),  # cropped at the edges (4.1)
        ("pct:0,0,100,100", Box(0, 0, 613, 1001)),
        ("pct:41.6,7.5,40,70", Box(46, 416, 475, 816)),
        ("pct:.5,0,10,10", Box(0, 5, 61, 105)),
    ],
)
def test_regions(region, box):
    assert asked(f"{region}/max")[0] == box


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("max", Size(613, 1001)),
        ("500,", Size(306, 500)),
        (",300", Size(300, 490)),
        ("pct:50", Size(306, 500)),
        ("1001,613", Size(613, 1001)),
        ("200,400", Size(400, 200)),  # distorted
        ("!400,400", Size(245, 400)),
        ("!5000,5000", Size(613, 1001)),  # as large as it is, never larger
        ("!1,1", Size(1, 1)),
        ("1,", Size(1, 1)),
    ],
)
def test_sizes(size, expected):
    assert asked(f"full/{size}")[1] == expected


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ("0", (False, 0)),
        ("90", (False, 1)),
        ("180", (False, 2)),
        ("270.0", (False, 3)),
        ("360", (False, 0)),
        ("!0", (True, 0)),
        ("!90", (True, 1)),
    ],
)
def test_rotations(rotation, expected):
    found = parse(f"full/max/{rotation}/default.png", FULL)
    assert (found.mirrored, found.quarter_turns) == expected


@pytest.mark.parametrize("quality", ["default", "color", "gray"])
@pytest.mark.parametrize("fmt", ["jpg", "png", "webp"])
def test_qualities_and_formats(quality, fmt):
    found = parse(f"full/max/0/{quality}.{fmt}", FULL)
    assert (found.quality, found.fmt) == (quality, fmt)


@pytest.mark.parametrize(
    "path",
    [
        "full/max/0",
        "full/max/0/default.jpg/more",
        "all/max/0/default.jpg",
        "1,2,3/max/0/default.jpg",
        "0,0,0,10/max/0/default.jpg",
        "1001,0,10,10/max/0/default.jpg",
        "-1,0,10,10/max/0/default.jpg",
        "pct:0,0,0.01,100/max/0/default.jpg",
        "pct:a,0,1,1/max/0/default.jpg",
        "full/0,/0/default.jpg",
        "full/,0/0/default.jpg",
        "full/0,0/0/default.jpg",
        "full/!0,10/0/default.jpg",
        "full/1002,/0/default.jpg",
        "full/,614/0/default.jpg",
        "full/pct:101/0/default.jpg",
        "full/pct:0/0/default.jpg",
        "full/full/0/default.jpg",
        "full//0/default.jpg",
        "full/max/361/default.jpg",
        "full/max/-90/default.jpg",
        "full/max/abc/default.jpg",
        "full/max/!/default.jpg",
        "full/max/0/native.jpg",
        "full/max/0/default.exe",
        "full/max/0/default",
        "full/max/0/.jpg",
        f"full/{'9' * 5000},/0/default.jpg",
        f"{'1' * 40},0,1,1/max/0/default.jpg",
        "full/\u0661,/0/default.jpg",
    ],
)
def test_what_is_no_request(path):
    with pytest.raises(BadRequestError):
        parse(path, FULL)


@pytest.mark.parametrize(
    "path",
    [
        "full/^max/0/default.jpg",
        "full/^2000,/0/default.jpg",
        "full/max/22.5/default.jpg",
        "full/max/0/bitonal.jpg",
        "full/max/0/default.tif",
    ],
)
def test_what_is_not_offered(path):
    with pytest.raises(NotOfferedError):
        parse(path, FULL)


def test_no_answer_is_larger_than_told():
    huge = Size(70_001, 90_001)
    assert asked("full/max", huge)[1].num_pixels <= MAX_AREA_PX
    assert asked("full/!60000,60000", huge)[1].num_pixels <= MAX_AREA_PX
    with pytest.raises(BadRequestError):
        asked("full/9000,9000", huge)
    for thin in (Size(1, 1 << 24), Size(1 << 24, 1)):
        size = asked("full/max", thin)[1]
        assert min(size.h, size.w) >= 1
        assert size.num_pixels <= MAX_AREA_PX
        assert size.long_side <= MAX_SIDE_PX
    long = Size(50, 70_000)  # more than a WebP has
    assert asked("full/max", long)[1] == Size(11, MAX_SIDE_PX)
    assert asked("full/!70000,70000", long)[1].long_side <= MAX_SIDE_PX
    with pytest.raises(BadRequestError, match="16383 px a side are the most"):
        asked("full/16384,", long)


@given(
    h=st.integers(1, 5000), w=st.integers(1, 5000), path=st.text(alphabet="0123456789,!^pct:maxfulsq./", max_size=40)
)
def test_anything_is_answered_or_refused(h, w, path):
    try:
        found = parse(f"{path}/0/default.jpg", Size(h, w))
    except (BadRequestError, NotOfferedError):
        return
    assert Box.of(Size(h, w)).contains(found.region)
    assert not found.region.empty
    assert 1 <= found.size.h <= found.region.size.h
    assert 1 <= found.size.w <= found.region.size.w
    assert found.size.num_pixels <= MAX_AREA_PX


@pytest.mark.parametrize(
    ("path", "spelling"),
    [
        ("0,0,1001,613/1001,/0/default.jpg", "full/max/0/default.jpg"),
        ("pct:0,0,50,50/max/360/gray.png", "0,0,500,306/max/0/gray.png"),
        ("full/max/0/color.png", "full/max/0/default.png"),
        ("square/,100/!90.0/default.jpg", "194,0,613,613/100,100/!90/default.jpg"),
    ],
)
def test_one_spelling(path, spelling):
    assert canonical(parse(path, FULL), FULL) == spelling
    assert canonical(parse(spelling, FULL), FULL) == spelling


def test_information_tells_what_can_be_asked():
    grid = Grid(Size(5003, 8191))
    info = image_information("http://here/iiif/3/x", grid.size, grid.level_sizes)
    assert (info["width"], info["height"], info["profile"]) == (8191, 5003, "level2")
    for size in info["sizes"]:
        assert asked(f"full/{size['width']},{size['height']}", grid.size)[1] == Size(size["height"], size["width"])
    (tiles,) = info["tiles"]
    for factor in tiles["scaleFactors"]:
        side = tiles["width"] * factor
        x, y = (grid.size.w - 1) // side * side, (grid.size.h - 1) // side * side
        region, size = asked(f"{x},{y},{side},{side}/max", grid.size)  # the last tile of this level
        wanted = -(-region.size.w // factor), -(-region.size.h // factor)
        assert asked(f"{x},{y},{side},{side}/{wanted[0]},{wanted[1]}", grid.size)[1] == Size(wanted[1], wanted[0])
        assert size.num_pixels >= wanted[0] * wanted[1] or region.size.num_pixels > MAX_AREA_PX
