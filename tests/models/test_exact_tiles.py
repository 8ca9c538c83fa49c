"""A tile equals the same pixels of the whole, whatever the tiles, the blocks, the batches and the threads.

"Whole" is the same code with one tile that covers the picture. With a random network nothing is silent: every last
layer and gate adds to the picture, so that a pixel of halo too few shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.render
from engine.geometry import Box, Size, round_up
from engine.guide import make_guide
from engine.image import ArrayPicture
from engine.mask import Mask, array_mask, no_mask
from engine.models.checkpoint import Checkpoint, load
from engine.models.runner import Encoded, TorchRunner
from engine.render import Renderer, Tiling
from engine.residual import aggregate
from tests.networks import TINY, random_model

PRIME = 131


@dataclass
class FloatPicture:
    """A picture of floats: with it the renderer's own code returns what the network said, not rounded."""

    pixels: np.ndarray
    channels: int = 3
    dtype: str = "float32"

    @property
    def size(self) -> Size:
        return Size(*self.pixels.shape[:2])

    def read(self, box: Box) -> np.ndarray:
        return self.pixels[box.slices].copy()


@pytest.fixture
def floats(monkeypatch):
    monkeypatch.setattr(engine.render, "from_rgb_float", lambda rgb, **_: rgb)
    monkeypatch.setattr(engine.render, "to_rgb_float", lambda pixels: pixels)
    monkeypatch.setattr("engine.guide.to_rgb_float", lambda pixels: pixels)
    monkeypatch.setattr("engine.residual.to_rgb_float", lambda pixels: pixels)


@pytest.fixture(scope="module")
def random_tiny(tmp_path_factory) -> Checkpoint:
    return random_model(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def random_lite(tmp_path_factory) -> Checkpoint:
    return random_model(tmp_path_factory.mktemp("lite"), load("lite").card.config, seed=1)


@pytest.fixture(scope="module")
def default() -> Checkpoint:
    return load("lite")


def runner_of(checkpoint: Checkpoint, threads: int = 1) -> TorchRunner:
    return TorchRunner(checkpoint, precision="fp32", threads=threads)


def picture(h: int, w: int) -> np.ndarray:
    """Waves, edges and grain, (h, w, 3) uint8, away from black and white."""
    rng = np.random.default_rng(h * 1000 + w)
    y, x = np.mgrid[:h, :w]
    waves = np.sin(y / 7)[..., None] * np.cos(x / 5)[..., None] * np.array([30, -25, 20])
    pixels = 128 + waves + 25 * ((x // 16 + y // 11) % 2)[..., None] + rng.normal(0, 8, (h, w, 3))
    return np.clip(np.rint(pixels), 40, 215).astype(np.uint8)


def holes(h: int, w: int) -> np.ndarray:
    """Scratches and blots over about a fifth; never everything."""
    rng = np.random.default_rng(h + w)
    missing = np.zeros((h, w), bool)
    for _ in range(1 + h * w // 600):
        y, x = rng.integers(h), rng.integers(w)
        missing[y : y + rng.integers(1, 20), x : x + rng.integers(1, 12)] = True
    missing[0, 0] = False
    return missing


def renderer(
    pixels: np.ndarray | FloatPicture,
    missing: np.ndarray | None,
    runner: TorchRunner,
    scale: int,
    tiling: Tiling,
    scratch: Path,
) -> Renderer:
    source = pixels if isinstance(pixels, FloatPicture) else ArrayPicture(pixels)
    mask: Mask = no_mask(source.size) if missing is None else array_mask(missing)
    guide = make_guide(source, mask, runner)
    detail = None if guide is None else aggregate(source, mask, guide, scratch)
    return Renderer(source, mask, guide, detail, runner, scale=scale, tiling=tiling)


def whole_tiling(size: Size) -> Tiling:
    side = max(64, round_up(size.long_side, 64))
    return Tiling(side, side, 1)


def drawn(pixels, missing, runner, scale, tiling, scratch) -> np.ndarray:
    made = renderer(pixels, missing, runner, scale, tiling, scratch)
    return made.draw(Box.of(Size(*(pixels.pixels if isinstance(pixels, FloatPicture) else pixels).shape[:2])))


SIZES = [(1, 1), (37, 65), (127, 128), (129, PRIME), (PRIME, 1)]
TILINGS = {
    1: [Tiling(64, 64, 1), Tiling(64, 64, 4), Tiling(512, 512, 1)],
    2: [Tiling(64, 64, 1), Tiling(64, 32, 4), Tiling(128, 64, 1), Tiling(512, 512, 1)],
    4: [Tiling(64, 32, 1), Tiling(128, 64, 4)],
    8: [Tiling(64, 32, 4), Tiling(128, 64, 1)],
    16: [Tiling(64, 32, 1), Tiling(128, 32, 4)],
}
LARGEST = {1: 200, 2: 200, 4: 140, 8: 70, 16: 70}
"""Sides of pictures worth the time at each scale."""


def cases() -> Iterator[object]:
    for scale, tilings in TILINGS.items():
        for h, w in SIZES:
            if max(h, w) <= LARGEST[scale]:
                for with_mask in (False, True):
                    if not (with_mask and h == w == 1):
                        mark = "mask" if with_mask else "intact"
                        yield pytest.param(scale, h, w, with_mask, tilings, id=f"x{scale}-{h}x{w}-{mark}")


@pytest.mark.parametrize(("scale", "h", "w", "with_mask", "tilings"), list(cases()))
def test_stored_bytes_are_those_of_one_tile(scale, h, w, with_mask, tilings, random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)  # larger pictures get residuals and enlarged hints too
    runner = runner_of(random_tiny)
    pixels, missing = picture(h, w), holes(h, w) if with_mask else None
    whole = drawn(pixels, missing, runner, scale, whole_tiling(Size(h, w)), tmp_path)
    assert whole.shape == (h * scale, w * scale, 3)
    for tiling in tilings:
        assert np.array_equal(drawn(pixels, missing, runner, scale, tiling, tmp_path), whole), tiling


@pytest.mark.parametrize("model", ["random_lite", "default"])
@pytest.mark.parametrize(
    ("scale", "h", "w", "tilings"),
    [
        (1, 97, 127, [Tiling(64, 64, 4)]),
        (2, 65, 97, [Tiling(64, 32, 4)]),
        (4, 37, 97, [Tiling(64, 64, 1), Tiling(64, 32, 4)]),
        (8, 37, 65, [Tiling(64, 32, 1)]),
        (16, 17, 65, [Tiling(64, 32, 1)]),
    ],
    ids=["x1", "x2", "x4", "x8", "x16"],
)
def test_the_sizes_that_are_shipped_are_exact(model, scale, h, w, tilings, request, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)
    runner = runner_of(request.getfixturevalue(model))
    pixels, missing = picture(h, w), holes(h, w)
    whole = drawn(pixels, missing, runner, scale, whole_tiling(Size(h, w)), tmp_path)
    for tiling in tilings:
        assert np.array_equal(drawn(pixels, missing, runner, scale, tiling, tmp_path), whole), tiling


@pytest.mark.parametrize("model", ["random_tiny", "random_lite"])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_random_network_adds_much_and_saturates_little(model, scale, request, tmp_path, floats):
    """Otherwise the equalities above would say little."""
    checkpoint = request.getfixturevalue(model)
    pixels = FloatPicture(picture(48, 48).astype(np.float32) / 255)
    runner = runner_of(checkpoint)
    output = drawn(pixels, None, runner, scale, Tiling(64, 64, 1), tmp_path)
    planes = [np.pad(pixels.pixels[..., c], 4, mode="reflect") for c in range(3)]
    bicubic = np.stack([runner.enlarge_plane(plane, scale.bit_length() - 1) for plane in planes], -1)
    assert (output - bicubic).std() >= 0.05
    assert ((output <= 0) | (output >= 1)).mean() < 0.1


def test_a_random_head_adds_much_and_saturates_little(random_tiny, tmp_path, floats, monkeypatch):
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)
    pixels, missing = FloatPicture(picture(96, 96).astype(np.float32) / 255), holes(96, 96)
    made = renderer(pixels, missing, runner_of(random_tiny), 1, Tiling(128, 128, 1), tmp_path)
    filled = made._sampled(made._guide.fill, Box(0, 0, 96, 96)) + made._details(Box(0, 0, 96, 96))
    output = made.draw(Box(0, 0, 96, 96))
    assert (output - filled)[missing].std() >= 0.05
    assert ((output <= 0) | (output >= 1))[missing].mean() < 0.1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("with_mask", [False, True])
def test_convolutions_are_equal_bit_for_bit(scale, with_mask, tmp_path_factory, tmp_path, floats, monkeypatch):
    """All that is not attention: the head, the trunk, the edges, the frequencies, the correction, the stages."""
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)
    runner = runner_of(random_model(tmp_path_factory.mktemp("plain"), replace(TINY, fusion=False, clean=True)))
    pixels = FloatPicture(picture(61, 101).astype(np.float32) / 255)
    missing = holes(61, 101) if with_mask else None
    whole = drawn(pixels, missing, runner, scale, Tiling(128, 128, 1), tmp_path)
    assert with_mask or scale == 1 or whole.std() > 0.05
    for tiling in (Tiling(64, 64, 1), Tiling(64, 32, 4)):
        assert np.array_equal(drawn(pixels, missing, runner, scale, tiling, tmp_path), whole), tiling


@pytest.mark.parametrize("model", ["random_tiny", "random_lite", "default"])
def test_attention_is_equal_to_a_ten_thousandth(model, request, tmp_path, floats, monkeypatch):
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)
    runner = runner_of(request.getfixturevalue(model))
    pixels, missing = FloatPicture(picture(61, 101).astype(np.float32) / 255), holes(61, 101)
    whole = drawn(pixels, missing, runner, 2, Tiling(128, 128, 1), tmp_path)
    for tiling in (Tiling(64, 64, 1), Tiling(64, 32, 4)):
        assert np.abs(drawn(pixels, missing, runner, 2, tiling, tmp_path) - whole).max() <= 1e-4


@pytest.mark.parametrize("scale", [1, 4])
def test_threads_change_nothing(scale, random_tiny, tmp_path):
    """The number of processors is no part of the plan."""
    pixels, missing = picture(77, 90), holes(77, 90)
    guides = [make_guide(ArrayPicture(pixels), array_mask(missing), runner_of(random_tiny, n)) for n in (1, 2)]
    assert all(np.array_equal(getattr(guides[0], name), getattr(guides[1], name)) for name in ("fill", "features"))
    assert torch.equal(guides[0].rows.weights, guides[1].rows.weights)
    try:
        one, two = (
            drawn(pixels, missing, runner_of(random_tiny, threads), scale, Tiling(64, 64, 1), tmp_path)
            for threads in (1, 2)
        )
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(one, two)


BOXES = [Box(0, 0, 1, 1), Box(13, 29, 50, 96), Box(63, 64, 66, 65), Box(7, 1, 77, 100), Box(76, 99, 77, 100)]


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_a_box_is_those_pixels_of_the_whole(scale, random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.guide.GUIDE_PX", 24)
    pixels, missing = picture(77, 100), holes(77, 100)
    made = renderer(pixels, missing, runner_of(random_tiny), scale, Tiling(64, 32, 2), tmp_path)
    whole = made.draw(Box(0, 0, 77, 100))
    for box in BOXES:
        assert np.array_equal(made.draw(box), whole[box.scaled(scale).slices]), box


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("scale", [1, 4])
def test_every_kind_of_picture_is_exact(channels, dtype, scale, random_tiny, tmp_path):
    rng = np.random.default_rng(channels)
    depth = np.iinfo(dtype).max
    pixels = (rng.random((66, 90, channels)) * depth).astype(dtype)
    missing = holes(66, 90)
    whole = drawn(pixels, missing, runner_of(random_tiny), scale, Tiling(128, 128, 1), tmp_path)
    assert whole.dtype == dtype
    assert np.array_equal(drawn(pixels, missing, runner_of(random_tiny), scale, Tiling(64, 64, 1), tmp_path), whole)


def flat(h: int, w: int) -> np.ndarray:
    return np.full((h, w, 3), 128, np.uint8)


def ramp(h: int, w: int) -> np.ndarray:
    return np.repeat(np.rint(np.linspace(60, 190, w)).astype(np.uint8)[None, :, None], h, 0).repeat(3, 2)


@pytest.mark.parametrize("make", [flat, ramp])
@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("model", ["random_tiny", "default"])
def test_no_step_at_the_borders_of_tiles(make, scale, model, request, tmp_path):
    runner = runner_of(request.getfixturevalue(model))
    output = drawn(make(64, 192), None, runner, scale, Tiling(64, 32, 1), tmp_path).astype(int)
    steps = np.abs(np.diff(output, axis=1)).max((0, 2))
    borders = np.zeros(steps.size, bool)
    borders[32 * scale - 1 :: 32 * scale] = True
    assert steps[borders].max() <= steps[~borders].max()


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_a_shorter_halo_shows(half, random_tiny, tmp_path, floats, monkeypatch):
    """The control: where the outermost window or pixel of the halo is a guess, tiles differ from the whole."""
    pixels = FloatPicture(picture(100, 100).astype(np.float32) / 255)
    runner = runner_of(random_tiny)
    whole = drawn(pixels, None, runner, 4, Tiling(128, 128, 1), tmp_path)
    if half == "encode":
        monkeypatch.setattr(Renderer, "_composites", _mirrored_composites(8))
    else:
        monkeypatch.setattr(TorchRunner, "decode", _mirrored_decode(1))
    assert not np.array_equal(drawn(pixels, None, runner, 4, Tiling(64, 32, 1), tmp_path), whole)


def _mirrored_composites(short_px: int):
    true = Renderer._composites

    def composites(self, tiles, margin_px):
        inner = true(self, tiles, margin_px - short_px)
        return np.pad(inner, ((0, 0), (short_px, short_px), (short_px, short_px), (0, 0)), mode="reflect")

    return composites


def _mirrored_decode(short_px: int):
    true = TorchRunner.decode

    def decode(self, encoded, places, side_px, levels):
        blocks = []
        for y, x in places:
            ys, xs = (slice(start + short_px, start + side_px - short_px) for start in (y, x))
            features, planes = (
                torch.nn.functional.pad(part[..., ys, xs], (short_px,) * 4, mode="reflect")
                for part in (encoded.features, encoded.picture)
            )
            blocks.append(true(self, Encoded(features, planes), [(0, 0)], side_px, levels))
        return np.concatenate(blocks)

    return decode
