"""What is missing: every common kind of mask file means the same pixels, and every wrong one is refused."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.errors import MaskMismatch, MaskUnavailable, NothingKnown, UnreadableInput, UnsupportedInput
from engine.geometry import Box, Size
from engine.mask import DETECTED, Mask, array_mask, find_mask, no_mask, read_mask

SIZE = Size(83, 61)
MISSING = np.random.default_rng(1).random((SIZE.h, SIZE.w)) < 0.2


def whole(mask: Mask) -> np.ndarray:
    return mask.read(Box.of(mask.size))


def rgba(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([rgb, rgb, rgb, alpha]).astype(np.uint8))


def palette() -> Image.Image:
    image = Image.fromarray(MISSING.astype(np.uint8) * 7, mode="P")
    image.putpalette([0, 0, 0] + [0] * 18 + [0, 0, 200])
    return image


WRITERS = {
    "one bit.png": lambda path: Image.fromarray(MISSING).save(path),
    "fax.tif": lambda path: Image.fromarray(MISSING).save(path, compression="group4"),
    "grey.png": lambda path: Image.fromarray(MISSING.astype(np.uint8)).save(path),
    "palette.png": lambda path: palette().save(path),
    "palette.tif": lambda path: palette().save(path),
    "blue.png": lambda path: Image.fromarray(np.dstack([MISSING * 0, MISSING * 0, MISSING]).astype(np.uint8)).save(
        path
    ),
    "faint 16 bit.tif": lambda path: tifffile.imwrite(path, MISSING.astype(np.uint16)),
    "opaque.png": lambda path: rgba(MISSING * 255, MISSING * 0 + 255).save(path),
    "alpha.png": lambda path: rgba(MISSING * 0, MISSING * 3).save(path),
    "white alpha.png": lambda path: rgba(MISSING * 0 + 255, MISSING * 255).save(path),
    "brush.png": lambda path: rgba(MISSING * 255, MISSING * 255).save(path),
    "la.png": lambda path: Image.fromarray(np.dstack([MISSING * 9, MISSING * 0 + 255]).astype(np.uint8), "LA").save(
        path
    ),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_means_the_same(name, tmp_path):
    WRITERS[name](tmp_path / name)
    mask = read_mask(tmp_path / name, size=SIZE, scratch=tmp_path / "s")
    assert np.array_equal(whole(mask), MISSING)
    assert (mask.size, mask.num_missing, mask.any) == (SIZE, np.count_nonzero(MISSING), True)
    box = Box(5, 6, 50, 21)
    part = mask.read(box)
    assert part.dtype == np.bool_
    assert np.array_equal(part, MISSING[box.slices])


def test_many_strips_are_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.mask._STRIP_PIXELS", 9 * SIZE.w)
    Image.fromarray(MISSING).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")
    assert np.array_equal(whole(mask), MISSING)
    assert mask.num_missing == MISSING.sum()


def test_orientation_turns_a_mask_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(MISSING).copy()).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(whole(read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")), MISSING)


def test_a_jpeg_mask_covers_the_damage(tmp_path):
    block = np.zeros((SIZE.h, SIZE.w), np.uint8)
    block[16:40, 24:48] = 255
    Image.fromarray(block).save(tmp_path / "m.jpg", quality=60)
    read = whole(read_mask(tmp_path / "m.jpg", size=SIZE, scratch=tmp_path / "s"))
    assert read[block > 0].all()
    assert not read[60:].any()


def test_colours_under_transparency_are_refused(tmp_path):
    rgba(np.where(MISSING, 0, 255), MISSING * 255).save(tmp_path / "m.png")
    with pytest.raises(UnsupportedInput, match="without transparency"):
        read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")


def test_an_empty_mask_is_fine(tmp_path):
    Image.fromarray(MISSING & False).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")
    assert (mask.any, mask.num_missing) == (False, 0)
    assert mask.sha256 not in ("none", "")
    assert not whole(mask).any()


def test_a_full_mask_is_refused(tmp_path):
    Image.fromarray(MISSING | True).save(tmp_path / "m.png")
    with pytest.raises(NothingKnown, match=r"5,063 of 5,063"):
        read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")
    with pytest.raises(NothingKnown):
        array_mask(MISSING | True)


@pytest.mark.parametrize("size", [Size(SIZE.w, SIZE.h), Size(SIZE.h, SIZE.w + 1)])
def test_another_size_is_refused_with_both(size, tmp_path):
    Image.fromarray(MISSING).save(tmp_path / "m.png")
    with pytest.raises(MaskMismatch) as caught:
        read_mask(tmp_path / "m.png", size=size, scratch=tmp_path / "s")
    assert str(size) in str(caught.value)
    assert str(SIZE) in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_cut_off_mask_is_refused(tmp_path):
    Image.fromarray(MISSING).save(tmp_path / "m.png")
    data = (tmp_path / "m.png").read_bytes()
    (tmp_path / "m.png").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UnreadableInput):
        read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")


def test_only_the_mask_itself_is_left_in_scratch(tmp_path):
    Image.fromarray(np.dstack([MISSING] * 3).astype(np.uint8)).save(tmp_path / "m.png")
    read_mask(tmp_path / "m.png", size=SIZE, scratch=tmp_path / "s")
    assert [path.stat().st_size for path in (tmp_path / "s").rglob("*.raw")] == [SIZE.num_pixels]


def test_none_and_arrays(tmp_path):
    nothing = no_mask(SIZE)
    assert (nothing.any, nothing.sha256, nothing.size) == (False, "none", SIZE)
    assert nothing.read(Box(1, 2, 4, 9)).shape == (3, 7)
    assert not whole(nothing).any()
    mask = array_mask(MISSING)
    assert np.array_equal(whole(mask), MISSING)
    assert mask.num_missing == MISSING.sum()
    assert mask.sha256 != array_mask(~MISSING).sha256
    for one in (nothing, mask):
        with pytest.raises(ValueError, match="outside"):
            one.read(Box(0, 0, SIZE.h + 1, 1))
    for bad in (MISSING.astype(np.uint8), MISSING[..., None]):
        with pytest.raises(UnsupportedInput, match="bool"):
            array_mask(bad)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_find_mask_in_a_folder(tmp_path):
    image, masks = tmp_path / "in" / "a.b.jpg", tmp_path / "masks"
    touch(image, masks / "a.b.tif", masks / "a.png")
    assert find_mask(masks, image=image) == masks / "a.b.tif"
    touch(masks / "a.b.jpg")
    assert find_mask(masks, image=image) == masks / "a.b.jpg"
    touch(masks / "a.b.mask.png")
    assert find_mask(masks, image=image) == masks / "a.b.mask.png"
    assert find_mask(masks / "a.png", image=image) == masks / "a.png"


def test_another_picture_of_the_same_stem_is_no_mask(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "a.jpg")
    with pytest.raises(MaskUnavailable, match=r"a\.mask\.png"):
        find_mask(tmp_path, image=tmp_path / "a.png")
    touch(tmp_path / "a.mask.png")
    assert find_mask(tmp_path, image=tmp_path / "a.png") == tmp_path / "a.mask.png"


def test_a_picture_is_never_its_own_mask(tmp_path):
    image = tmp_path / "a.png"
    touch(image)
    with pytest.raises(MaskUnavailable, match=r"a\.mask\.png"):
        find_mask(tmp_path, image=image)
    touch(tmp_path / "a.mask.png")
    assert find_mask(tmp_path, image=image) == tmp_path / "a.mask.png"


def test_find_mask_says_what_is_wrong(tmp_path):
    image = tmp_path / "in" / "a.jpg"
    assert find_mask("none", image=image) is None
    assert find_mask(DETECTED, image=image) is None  # it is found later
    with pytest.raises(MaskUnavailable, match="does not exist"):
        find_mask(tmp_path / "absent", image=image)
    touch(tmp_path / "m" / "a.png", tmp_path / "m" / "a.tif")
    with pytest.raises(MaskUnavailable, match="2 masks fit"):
        find_mask(tmp_path / "m", image=image)
