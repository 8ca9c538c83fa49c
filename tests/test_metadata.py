"""What a file says besides its pixels: found in every container, corrected on the way out, taken off when asked."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from engine import exif, vips
from engine.errors import UnsupportedInput
from engine.geometry import Size
from engine.metadata import MAX_BLOCK_BYTES, Metadata, iptc_resource, read_metadata

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">a packet \xc3\xa4</x:xmpmeta>'
IPTC = b"\x1c\x02\x00\x00\x02\x00\x04\x1c\x02\x78\x00\x09a caption"
MAKER_NOTE = bytes(range(256)) * 3
PIXELS = np.arange(30 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 40, 3)
SUFFIX = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "webp": "WebP"}


def exif_of(*, orientation: int = 1) -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.ImageDescription] = "a description"
    block[ExifTags.Base.Artist] = "an artist"
    block[ExifTags.Base.Orientation] = orientation
    block[ExifTags.Base.XResolution] = 300.0
    block[ExifTags.Base.YResolution] = 150.0
    block[ExifTags.Base.ResolutionUnit] = 2
    inner = block.get_ifd(ExifTags.IFD.Exif)
    inner[ExifTags.Base.DateTimeOriginal] = "2020:02:02 02:02:02"
    inner[ExifTags.Base.ExifImageWidth] = 40
    inner[ExifTags.Base.ExifImageHeight] = 30
    inner[ExifTags.Base.MakerNote] = MAKER_NOTE
    inner[ExifTags.Base.ExposureTime] = TiffImagePlugin.IFDRational(1, 125)
    block.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    block.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 14.5)
    return block


def written(path: Path, fmt: str, *, orientation: int = 1) -> Path:
    """A picture with all four blocks, by Pillow."""
    block, image = exif_of(orientation=orientation), Image.fromarray(PIXELS)
    if fmt == "png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        digits = iptc_resource(IPTC).hex()
        texts.add_text("Raw profile type iptc", f"\niptc\n{len(digits) // 2:8}\n{digits}\n", zip=True)
        texts.add_text("Title", "a title")
        image.save(path, "PNG", exif=block, icc_profile=ICC, pnginfo=texts)
    elif fmt == "tiff":
        block[700], block[33723] = XMP, IPTC
        for pointer in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):  # or Pillow leaves them out of a TIFF
            block[pointer] = dict(block.get_ifd(pointer))
        image.save(path, "TIFF", exif=block, icc_profile=ICC)
    else:
        image.save(path, SUFFIX[fmt], exif=block, icc_profile=ICC, xmp=XMP, quality=90)
        if fmt == "jpeg":
            data = path.read_bytes()
            body = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x02ab" + iptc_resource(IPTC)
            path.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:])
    return path


def read(path: Path, fmt: str, *, orientation: int = 1, channels: int = 3) -> Metadata:
    with path.open("rb") as file:
        image = vips.load(file, fmt)
        found = read_metadata(image, fmt, channels=channels, orientation=orientation, file=file)
        assert image.crop(0, image.height - 1, 1, 1).avg() >= 0  # the decoder was not disturbed
        return found


def with_pillow(block: bytes) -> Image.Exif:
    found = Image.Exif()
    found.load(b"Exif\0\0" + block)
    return found


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
def test_every_block_is_found_byte_for_byte(fmt, tmp_path):
    found = read(written(tmp_path / "a", fmt), fmt)
    assert found.icc == ICC
    assert found.xmp == XMP
    assert found.iptc == (None if fmt == "webp" else IPTC)
    block = with_pillow(found.exif)
    assert block[ExifTags.Base.ImageDescription] == "a description"
    assert block.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] == MAKER_NOTE
    assert block.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 8.0, 14.5)
    assert found.left_out == (("the PNG text 'Title'",) if fmt == "png" else ())


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
def test_stripped_keeps_the_profile_and_nothing_else(fmt, tmp_path):
    found = read(written(tmp_path / "a", fmt), fmt).stripped()
    assert found == Metadata(icc=ICC)


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
def test_what_the_output_changes(fmt, tmp_path):
    found = read(written(tmp_path / "a", fmt, orientation=6), fmt, orientation=6)
    found = Metadata(exif=found.exif, resolution_px_per_mm=(600 / 25.4, 1200 / 25.4))
    before, after = with_pillow(found.exif), with_pillow(found.corrected_exif(Size(70_000, 160)))
    changed = {ExifTags.Base.Orientation: 1, ExifTags.Base.XResolution: 1200, ExifTags.Base.YResolution: 600}
    assert {tag: after[tag] for tag in changed} == changed
    pointers = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    assert {tag: v for tag, v in after.items() if tag not in changed and tag not in pointers} == {
        tag: v for tag, v in before.items() if tag not in changed and tag not in pointers
    }
    inner = after.get_ifd(ExifTags.IFD.Exif)
    assert (inner[ExifTags.Base.ExifImageWidth], inner[ExifTags.Base.ExifImageHeight]) == (160, 70_000)
    assert inner[ExifTags.Base.MakerNote] == MAKER_NOTE
    assert inner[ExifTags.Base.ExposureTime] == 1 / 125
    assert after.get_ifd(ExifTags.IFD.GPSInfo) == before.get_ifd(ExifTags.IFD.GPSInfo)


def test_nothing_else_in_the_block_moves(tmp_path):
    found = read(written(tmp_path / "a", "jpeg"), "jpeg")
    same = found.corrected_exif(Size(30, 40))
    assert len(same) == len(found.exif)
    at = found.exif.index(MAKER_NOTE)
    assert same[at : at + len(MAKER_NOTE)] == MAKER_NOTE
    assert sum(a != b for a, b in zip(same, found.exif, strict=True)) <= 16


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("last", [True, False])
def test_the_thumbnail_is_cut_out(order, last):
    picture = io.BytesIO()
    Image.fromarray(PIXELS).save(picture, "JPEG")
    text = exif.Field(exif.ASCII, "Müller\0".encode())
    block = exif.block_of(exif.Exif(order, main={315: text, 274: exif.Field(3, struct.pack(order + "H", 8))}))
    second_at = len(block)
    picture_at = second_at + 2 + 2 * 12 + 4
    fields = struct.pack(order + "H", 2)
    fields += struct.pack(order + "HHII", 0x201, 4, 1, picture_at)
    fields += struct.pack(order + "HHII", 0x202, 4, 1, len(picture.getvalue())) + bytes(4)
    link_at = 8 + 2 + 2 * 12
    block = block[:link_at] + struct.pack(order + "I", second_at) + block[link_at + 4 :]
    block += fields + picture.getvalue() + (b"" if last else b"behind")
    after = exif.corrected(block, size=Size(8, 8), resolution_px_per_mm=None)
    assert b"\xff\xd8" in block
    assert b"\xff\xd8" not in after
    assert len(after) == (second_at if last else len(block))
    assert after.endswith(b"behind") != last
    assert with_pillow(after)[274] == 1
    assert exif.parse(after).main[315] == text


def test_umlauts_and_types_survive_both_byte_orders():
    main = {
        315: exif.Field(exif.ASCII, "Jürgen Straße\0".encode()),
        271: exif.Field(exif.ASCII, "Hänsel\0".encode("latin-1")),
        40091: exif.Field(1, "Titel ä".encode("utf-16-le")),
        33434: exif.Field(10, struct.pack("<ii", -1, 3)),
        50000: exif.Field(12, struct.pack("<d", 2.5)),
    }
    before = exif.Exif("<", main=main, exif={37121: exif.Field(7, b"\1\2\3\0")}, interop={1: exif.Field(2, b"R98\0")})
    turned = exif.parse(exif.block_of(before.in_order(">")))
    assert turned.order == ">"
    assert turned.main[33434].data == struct.pack(">ii", -1, 3)
    assert turned.in_order("<") == before


def test_a_layout_description_is_not_carried(tmp_path):
    for name, description in (("a", '{"shape": [30, 40, 3]}'), ("b", "ImageJ=1.11a\nimages=2\n")):
        path = tmp_path / name
        tifffile.imwrite(path, PIXELS, photometric="rgb", metadata=None, description=description, software="x")
        found = read(path, "tiff")
        assert 270 not in with_pillow(found.exif)
        assert with_pillow(found.exif)[305] == "x"
        assert found.left_out == ("a description of the layout of the file itself",)


def test_a_profile_for_other_channels_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS[..., 0]).save(path, icc_profile=ICC)
    found = read(path, "jpeg", channels=1)
    assert found.icc is None
    assert found.left_out == ("an ICC profile that is not for grey pictures",)


def test_a_damaged_block_is_named_and_left_out(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\0")
    found = read(path, "jpeg")
    assert found.exif is None
    assert "EXIF block that cannot be read" in found.left_out[0]


@pytest.mark.parametrize("tag", [700, 33723, 305])
def test_a_block_beyond_the_limit_is_refused_with_both_numbers(tag, tmp_path):
    path = tmp_path / "a.tif"
    big = bytes(MAX_BLOCK_BYTES + 1)
    kind = {700: 1, 33723: 7, 305: 2}[tag]
    tifffile.imwrite(
        path, PIXELS, photometric="rgb", metadata=None, software=False, extratags=[(tag, kind, 1, big, True)]
    )
    with pytest.raises(UnsupportedInput, match=r"16,777,21[78] bytes.*16,777,216"):
        read(path, "tiff")


def test_random_damage_is_never_more_than_a_missing_block():
    """No exception but the typed one, whatever the bytes: also none from the corrections."""
    rng = np.random.default_rng(5)
    good = exif_of().tobytes()[6:]
    survived = 0
    for _ in range(400):
        block = bytearray(good)
        for at in rng.integers(0, 400, rng.integers(1, 12)):
            block[at] = rng.integers(0, 256)
        block = bytes(block[: rng.integers(0, len(block))]) if rng.random() < 0.2 else bytes(block)
        try:
            exif.check(block)
        except exif.ExifError:
            continue
        exif.parse(exif.corrected(block, size=Size(5, 70_000), resolution_px_per_mm=(30.0, 2.0)))
        assert exif.parse(exif.block_of(exif.parse(block))) == exif.parse(block)
        survived += 1
    assert survived > 100


def test_json_keeps_every_block_and_notices_a_change():
    before = Metadata(ICC, exif_of().tobytes()[6:], XMP, IPTC, (11.8, 5.9))
    stored = before.archived(Size(30, 40))
    after = Metadata.from_archived(stored, name="a.zarr")
    assert (after.icc, after.xmp, after.iptc, after.resolution_px_per_mm) == (ICC, XMP, IPTC, (11.8, 5.9))
    assert after.exif == before.corrected_exif(Size(30, 40))
    assert Metadata.from_archived({}, name="a.zarr") == Metadata()
    with pytest.raises(UnsupportedInput, match=r"a\.zarr: xmp has sha256"):
        Metadata.from_archived(stored | {"xmp": stored["icc_profile"]}, name="a.zarr")
    with pytest.raises(UnsupportedInput, match="cannot be read"):
        Metadata.from_archived(stored | {"iptc": "*"}, name="a.zarr")


def test_an_enlarged_original_has_more_pixels_in_a_millimetre():
    assert Metadata(resolution_px_per_mm=(2.0, 3.0)).enlarged(4) == Metadata(resolution_px_per_mm=(8.0, 12.0))
    assert Metadata(icc=ICC).enlarged(4) == Metadata(icc=ICC)
