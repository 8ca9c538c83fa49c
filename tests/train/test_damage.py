import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.geometry import Size
from engine.train import damage

KINDS = [
    damage.strokes,
    damage.cracks,
    damage.blobs,
    damage.missing_corner,
    damage.scratches,
    damage.spots,
]
SHARES = [damage.LIGHT, damage.MEDIUM, damage.HEAVY]


@given(
    h=st.integers(16, 200),
    w=st.integers(16, 200),
    seed=st.integers(0, 2**63),
    share=st.sampled_from([*SHARES, (0.0, 0.02), (0.7, 0.95)]),
)
@settings(deadline=None, max_examples=60)
def test_share_is_kept_at_any_size(h, w, seed, share):
    mask = damage.damage_mask(Size(h, w), seed=seed, share=share)
    assert mask.shape == (h, w)
    assert mask.dtype == np.bool_
    assert share[0] <= mask.mean() <= share[1]


@pytest.mark.parametrize("size", [Size(16, 2000), Size(2000, 16), Size(16, 16)])
@pytest.mark.parametrize("share", SHARES)
def test_share_is_kept_on_strips_and_on_the_smallest_picture(size, share):
    assert share[0] <= damage.damage_mask(size, seed=3, share=share).mean() <= share[1]


def test_the_whole_range_of_a_share_is_used():
    shares = [damage.damage_mask(Size(64, 64), seed=seed, share=damage.HEAVY).mean() for seed in range(60)]
    assert min(shares) < 0.34
    assert max(shares) > 0.46


def test_same_seed_same_bytes_and_another_seed_another_mask():
    size = Size(96, 128)
    first, again, other = (damage.damage_mask(size, seed=seed, share=damage.MEDIUM) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("draw", KINDS)
@pytest.mark.parametrize("size", [Size(16, 16), Size(90, 300), Size(256, 256)])
def test_each_kind_marks_some_pixels_and_repeats_itself(draw, size):
    marked = 0
    for seed in range(12):
        mask = draw(size, seed=seed)
        assert mask.shape == (size.h, size.w)
        assert np.array_equal(mask, draw(size, seed=seed))
        marked += mask.any()
    assert marked >= 10


@pytest.mark.parametrize("seed", range(8))
def test_a_missing_corner_holds_exactly_one_corner(seed):
    mask = damage.missing_corner(Size(80, 120), seed=seed)
    assert mask[[0, 0, -1, -1], [0, -1, 0, -1]].sum() == 1
    assert cv2.connectedComponents(mask.astype(np.uint8))[0] == 2


def test_widths_grow_with_the_picture():
    def widest_px(side_px):
        masks = [damage.strokes(Size(side_px, side_px), seed=seed) for seed in range(12)]
        return max(2 * cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5).max() for m in masks)

    assert widest_px(512) == pytest.approx(4 * widest_px(128), rel=0.35)


def test_thin_and_thick_damage_both_occur():
    masks = [damage.damage_mask(Size(256, 256), seed=seed, share=damage.MEDIUM) for seed in range(20)]
    radii = [cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5).max() for m in masks]
    opened = [cv2.morphologyEx(m.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) for m in masks]
    thin = [1 - o.sum() / m.sum() for m, o in zip(masks, opened, strict=True)]
    assert max(radii) > 12
    assert max(thin) > 0.3
    assert min(thin) < 0.15


def _slenderness(mask):
    """The area over that of the largest disc in it: little above 1 for what is compact, many for what is long."""
    return mask.sum() / (np.pi * cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5).max() ** 2)


def _lines(mask):
    """(n, 2) of the components of 20 px or more: how wide a box along each is over its length, and its direction."""
    num, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    found = []
    for label in range(1, num):
        points = np.argwhere(labels == label)[:, ::-1]
        if len(points) >= 20:
            _, _, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
            along, across = np.ptp((points - points.mean(0)) @ axes.T, axis=0)
            found.append((across / along, np.arctan2(*axes[0])))
    return np.array(found).reshape(-1, 2)


def test_blobs_are_solid_and_compact():
    for seed in range(20):
        mask = damage.blobs(Size(256, 256), seed=seed)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        assert len(outlines) == 1  # in one piece, without a hole in it
        assert _slenderness(mask) < 4


def test_cracks_wander_and_scratches_run_straight_side_by_side():
    drawn = [[draw(Size(256, 256), seed=seed) for seed in range(60)] for draw in (damage.cracks, damage.scratches)]
    for masks in drawn:
        slender = [_slenderness(mask) for mask in masks]
        assert np.quantile(slender, 0.1) > 8  # some leave the picture at once
        assert np.median(slender) > 20
    cracks, scratches = ([_lines(mask) for mask in masks if mask.sum() > 60] for masks in drawn)
    assert np.median([one[:, 0].max() for one in cracks]) > 0.2
    assert np.median([one[:, 0].max() for one in scratches]) < 0.1
    bundles = [abs(np.exp(2j * one[:, 1]).mean()) for one in scratches if len(one) > 1]
    assert len(bundles) > 30
    assert np.quantile(bundles, 0.2) > 0.95


def test_spots_are_small_and_several():
    numbers = []
    for seed in range(20):
        plane = damage.spots(Size(256, 256), seed=seed).astype(np.uint8)
        num, _, boxes, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        assert boxes[1:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max() <= 0.06 * 256  # two may touch
        numbers.append(num - 1)
    assert 4 <= min(numbers) < 12
    assert 20 < max(numbers) <= 30


@pytest.mark.parametrize(
    ("size", "share"),
    [
        (Size(15, 64), damage.LIGHT),
        (Size(64, 15), damage.LIGHT),
        (Size(16, 16), (0.103, 0.104)),
        (Size(64, 64), (0.5, 0.4)),
        (Size(64, 64), (0.9, 1.2)),
        (Size(64, 64), (-0.2, -0.1)),
    ],
)
def test_what_cannot_be_drawn_is_refused(size, share):
    with pytest.raises(ValueError, match=r"px or more|no number of pixels"):
        damage.damage_mask(size, seed=0, share=share)


def _cover(side_px=100, alpha=255):
    cover = np.zeros((side_px, side_px), np.uint8)
    cover[40:60, 20:90] = alpha
    return cover


def test_film_mask_repeats_itself_and_moves_with_the_seed():
    size = Size(70, 110)
    masks = [damage.film_mask(_cover(), size, seed=seed) for seed in (1, 1, 2)]
    assert masks[0].shape == (70, 110)
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize(("alpha", "missing"), [(20, False), (60, True)])
def test_film_mask_takes_alpha_above_a_tenth(alpha, missing):
    masks = [damage.film_mask(_cover(alpha=alpha), Size(64, 64), seed=seed) for seed in range(6)]
    assert any(mask.any() for mask in masks) == missing


def test_film_mask_keeps_a_hair_in_one_piece_when_it_shrinks():
    cover = np.zeros((400, 400), np.uint8)
    cover[199:202] = 255
    for seed in range(10):
        mask = damage.film_mask(cover, Size(150, 150), seed=seed)
        assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] <= 2


def test_film_mask_refuses_more_than_a_cover():
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        damage.film_mask(np.zeros((8, 8, 3), np.uint8), Size(32, 32), seed=0)


def test_film_mask_scales_to_30_to_130_percent_of_the_long_side():
    cover, long_px, scales = np.zeros((200, 120), np.uint8), 300, []
    cv2.circle(cover, (60, 100), 30, 255, -1)  # 0.15 of the long side
    for seed in range(150):
        mask = damage.film_mask(cover, Size(240, long_px), seed=seed)
        if mask.any() and not (mask[[0, -1]].any() or mask[:, [0, -1]].any()):  # all of the disc is seen
            scales.append((mask.sum() / np.pi) ** 0.5 / (0.15 * long_px))
    assert 0.3 <= min(scales) < 0.4
    assert 1.15 < max(scales) < 1.3 * 1.05
