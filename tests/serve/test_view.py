"""What is shown is what is stored: slices of the pyramid, and before that the overview with what is there."""

import cv2
import numpy as np
import pytest

from engine.errors import StorageError
from engine.geometry import Box, Size
from engine.serve.iiif import parse
from engine.serve.view import Difference, Growing, Stored, encode, level_for, resized, shown
from engine.tiling.canvas import Canvas
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard

SIZE = Size(301, 467)


def plan(size: Size = SIZE, *, channels: int = 3, dtype: str = "uint8") -> Plan:
    return Plan(
        name="restored",
        size=size,
        channels=channels,
        dtype=dtype,
        grid=Grid(size, chunk_px=64, shard_px=128),
        input_sha256="0" * 64,
        mask_sha256="none",
        model="test",
        model_sha256="1" * 64,
        parameters={"scale": 1},
        projected_ram_bytes=1,
        projected_disk_bytes=1,
    )


def picture(size: Size = SIZE, channels: int = 3, dtype: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(size.h)
    small = rng.integers(0, np.iinfo(dtype).max, (size.h // 8 + 2, size.w // 8 + 2, channels)).astype(dtype)
    return cv2.resize(small, (size.w, size.h), interpolation=cv2.INTER_CUBIC).reshape(size.h, size.w, channels)


def draw(canvas: Canvas, pixels: np.ndarray, keys=None) -> None:
    halve = HalveShard(canvas)
    for key in canvas.grid.all_keys() if keys is None else keys:
        canvas.write(key, pixels[canvas.grid.box(key).slices] if key.level == 0 else halve(key))


@pytest.fixture
def canvas(tmp_path):
    with Canvas.open(plan(), tmp_path) as opened:
        yield opened


def png(view, path: str) -> np.ndarray:
    request = parse(path, view.level_sizes[0])
    pixels, _ = shown(view, request)
    decoded = cv2.imdecode(np.frombuffer(encode(pixels, request), np.uint8), cv2.IMREAD_UNCHANGED)
    return decoded[..., ::-1] if decoded.ndim == 3 else decoded


def test_a_tile_is_the_slice_of_the_pyramid(canvas):
    pixels = picture()
    draw(canvas, pixels)
    view = Stored(canvas)
    for level, size in enumerate(canvas.grid.level_sizes):
        whole = canvas.read(Box.of(size), level=level)
        factor = 1 << level
        for y in range(0, size.h, 64):
            for x in range(0, size.w, 64):
                box = Box(y, x, y + 64, x + 64).intersection(Box.of(size))
                at = box.scaled(factor).intersection(Box.of(SIZE))
                path = f"{at.x0},{at.y0},{at.size.w},{at.size.h}/{box.size.w},{box.size.h}/0/default.png"
                assert np.array_equal(png(view, path), whole[box.slices])


@pytest.mark.parametrize("harm", ["gone", "cut short", "a bit flipped"])
def test_a_damaged_shard_is_no_answer(canvas, harm):
    draw(canvas, picture())
    view = Stored(canvas)
    key = next(iter(canvas.grid.all_keys()))
    path = canvas.object_path(key)
    stored = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut short":
        path.write_bytes(stored[: len(stored) // 2])
    else:
        stored[len(stored) // 3] ^= 1
        path.write_bytes(stored)
    with pytest.raises(StorageError, match=key.name):
        view.read(canvas.grid.box(key), level=key.level)


@pytest.mark.parametrize(
    ("rotation", "turn"),
    [
        ("90", lambda a: np.rot90(a, -1)),
        ("180", lambda a: np.rot90(a, 2)),
        ("270", np.rot90),
        ("!0", np.fliplr),
        ("!90", lambda a: np.rot90(np.fliplr(a), -1)),  # mirrored first (4.3)
    ],
)
def test_turned_and_mirrored(canvas, rotation, turn):
    pixels = picture()
    draw(canvas, pixels)
    assert np.array_equal(png(Stored(canvas), f"full/max/{rotation}/default.png"), turn(pixels))


def test_grey_quality_and_sixteen_bits(tmp_path, canvas):
    draw(canvas, picture())
    grey = png(Stored(canvas), "full/max/0/gray.png")
    assert grey.shape == (SIZE.h, SIZE.w)
    with Canvas.open(plan(dtype="uint16"), tmp_path / "deep") as deep:
        pixels = picture(dtype="uint16")
        draw(deep, pixels)
        found = png(Stored(deep), "full/max/0/default.png").astype(int)
    assert np.abs(found - np.rint(pixels / 257.0)).max() <= 1


def test_transparent_pixels_are_white(tmp_path):
    with Canvas.open(plan(channels=4), tmp_path) as canvas:
        pixels = picture(channels=4)
        pixels[..., 3] = 0
        draw(canvas, pixels)
        assert (png(Stored(canvas), "full/max/0/default.png") == 255).all()


def test_a_growing_picture_shows_overview_then_what_is_stored(canvas):
    pixels = picture()
    overview = np.full((20, 31, 3), 77, np.uint8)
    view = Growing(canvas, overview)
    found = view.read(Box(0, 0, 100, 200), level=0)
    assert not found.final
    assert (found.pixels == 77).all()

    draw(canvas, pixels, [key for key in canvas.grid.keys(0) if (key.iy, key.ix) == (1, 1)])
    found = view.read(Box(100, 100, 270, 270), level=0)
    assert not found.final
    assert np.array_equal(found.pixels[28:156, 28:156], pixels[128:256, 128:256])
    assert (found.pixels[:28] == 77).all()
    from_afar = view.read(Box.of(canvas.grid.level_size(2)), level=2)  # its own shards are far from there
    assert not from_afar.final
    assert (
        abs(
            from_afar.pixels[34:62, 34:62].astype(int) - pixels[136:248, 136:248].reshape(28, 4, 28, 4, 3).mean((1, 3))
        ).max()
        <= 1
    )

    draw(canvas, pixels)
    for level, size in enumerate(canvas.grid.level_sizes):
        found = view.read(Box.of(size), level=level)
        assert found.final
        assert np.array_equal(found.pixels, canvas.read(Box.of(size), level=level))


def test_what_stands_in_for_a_large_part_is_read_only_as_fine_as_it_may_be(canvas, monkeypatch):
    draw(canvas, picture(), canvas.grid.keys(0))
    whole = Box.of(canvas.grid.level_size(2))
    read: list[int] = []
    stored = canvas.read
    monkeypatch.setattr(canvas, "read", lambda box, *, level: (read.append(level), stored(box, level=level))[1])
    view = Growing(canvas, np.full((20, 31, 3), 77, np.uint8))
    assert (view.read(whole, level=2).pixels != 77).mean() > 0.9
    assert set(read) == {0}
    read.clear()
    monkeypatch.setattr("engine.serve.view.MOST_READ_PX", 15 * whole.size.num_pixels)
    assert (view.read(whole, level=2).pixels == 77).all()
    assert not read


@pytest.mark.parametrize("box", [Box(0, 0, 128, 128), Box(100, 100, 270, 270)], ids=["a shard", "parts of four"])
def test_what_is_published_while_it_is_read_is_not_final(tmp_path, canvas, monkeypatch, box):
    """Zarr reads what is gone as zeros; a browser would keep them for a year."""
    draw(canvas, picture())
    view = Growing(canvas, np.full((20, 31, 3), 77, np.uint8))

    class Arrays:
        def __getitem__(self, level: int):
            if canvas.root.exists():
                canvas.root.rename(tmp_path / "published")
            return arrays[level]

    arrays = canvas._arrays
    monkeypatch.setattr(canvas, "_arrays", Arrays())
    found = view.read(box, level=0)
    assert not found.final
    assert (found.pixels == 77).all()


def test_the_difference_is_nothing_where_nothing_was_restored(tmp_path, canvas):
    pixels = picture()
    draw(canvas, pixels)
    changed = pixels.copy()
    changed[50:60, 70:90] ^= 255
    with Canvas.open(plan(), tmp_path / "changed") as other:
        draw(other, changed)
        found = Difference(Stored(other), Stored(canvas)).read(Box.of(SIZE), level=0).pixels
    assert np.array_equal(found, cv2.absdiff(changed, pixels))


def test_the_difference_of_an_enlargement_is_small(tmp_path, canvas):
    draw(canvas, picture())
    whole = SIZE.scaled(4)
    with Canvas.open(plan(whole), tmp_path / "large") as large:
        draw(large, resized(picture(), whole, Box.of(whole)))
        view = Difference(Stored(large), Stored(canvas))
        for box in (Box(0, 0, 256, 256), Box(512, 512, 768, 768), Box(1100, 1700, whole.h, whole.w)):
            assert view.read(box, level=0).pixels.max() <= 2


@pytest.mark.parametrize("whole", [Size(1204, 1868), Size(75, 117), SIZE])
def test_where_a_box_lies_changes_no_pixel(whole):
    pixels = picture()
    complete = resized(pixels, whole, Box.of(whole))
    for y in range(0, whole.h, 97):
        for x in range(0, whole.w, 101):
            box = Box(y, x, y + 97, x + 101).intersection(Box.of(whole))
            assert np.abs(resized(pixels, whole, box).astype(int) - complete[box.slices]).max() <= 1


def test_no_answer_has_much_read():
    sizes = Grid(Size(30_000, 30_000)).level_sizes
    for path in ("full/1,16000/0/default.jpg", "full/max/0/default.jpg", "0,0,20000,9/16000,9/0/default.jpg"):
        request = parse(path, sizes[0])
        _, box = level_for(request.region, request.size, sizes)
        assert box.size.num_pixels <= 1 << 24
