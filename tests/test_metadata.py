"""What a file says besides its pixels: found in every container, corrected on the way out, taken off when asked."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from engine import exif
from engine.errors import UnsupportedInput
from engine.geometry import Size
from engine.image import decode, probe
from engine.metadata import MAX_BLOCK_BYTES, Metadata, iptc_resource

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
        texts.add_text("Owner", "a name")
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


def read(path: Path, fmt: str) -> Metadata:
    path = path.rename(path.with_suffix(f".{fmt}"))
    info = probe(path)
    decode(info, path.parent / "scratch")  # the decoder is not disturbed
    return info.metadata


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
    texts = ("the PNG text 'Owner'", "the PNG text 'Title'")
    assert found.left_out == {"png": texts, "jpeg": ("Photoshop's image resources",)}.get(fmt, ())


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
def test_stripped_keeps_the_profile_and_nothing_else(fmt, tmp_path):
    before = read(written(tmp_path / "a", fmt), fmt)
    found = before.stripped()
    assert found == Metadata(icc=ICC, left_out=found.left_out)
    asked = "EXIF, XMP, resolution, as asked" if fmt == "webp" else "EXIF, XMP, IPTC, resolution, as asked"
    others = {"png": ["PNG texts: 2"], "jpeg": ["Photoshop's image resources"]}.get(fmt, [])
    assert found.left_out == (*others, asked)


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
def test_what_the_output_changes(fmt, tmp_path):
    found = read(written(tmp_path / "a", fmt, orientation=6), fmt)
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


RATIO, INCH, CENTIMETRE = 1, 2, 3


def with_resolution(path: Path, fmt: str, unit: int, x: int, y: int) -> Path:
    """In the container itself, not in EXIF."""
    image, data = Image.fromarray(PIXELS), io.BytesIO()
    if fmt == "tiff":
        tifffile.imwrite(
            path, PIXELS, photometric="rgb", metadata=None, resolution=((x, 1), (y, 1)), resolutionunit=unit
        )
        return path
    image.save(data, SUFFIX[fmt])
    stored = data.getvalue()
    if fmt == "jpeg":
        stored = stored[:13] + struct.pack(">BHH", unit - 1, x, y) + stored[18:]
    else:
        body = b"pHYs" + struct.pack(">IIB", x * 100, y * 100, unit != RATIO)
        stored = stored[:33] + struct.pack(">I", 9) + body + struct.pack(">I", zlib.crc32(body)) + stored[33:]
    path.write_bytes(stored)
    return path


@pytest.mark.parametrize(
    ("fmt", "unit", "px_per_mm"),
    [
        ("png", CENTIMETRE, (15.0, 30.0)),
        ("jpeg", INCH, (150 / 25.4, 300 / 25.4)),
        ("jpeg", CENTIMETRE, (15.0, 30.0)),
        ("tiff", INCH, (150 / 25.4, 300 / 25.4)),
        ("tiff", CENTIMETRE, (15.0, 30.0)),
        *((fmt, RATIO, None) for fmt in ("png", "jpeg", "tiff")),
    ],
)
def test_a_resolution_is_one_with_a_unit(fmt, unit, px_per_mm, tmp_path):
    found = read(with_resolution(tmp_path / "a", fmt, unit, 300, 150), fmt)
    assert found.resolution_px_per_mm == (None if px_per_mm is None else pytest.approx(px_per_mm, rel=1e-12))
    assert any("a shape of the pixels" in what for what in found.left_out) is (px_per_mm is None)
    square = read(with_resolution(tmp_path / "b", fmt, unit, 300, 300), fmt)
    assert (square.resolution_px_per_mm is None) is (px_per_mm is None)
    assert square.left_out == ()


@pytest.mark.parametrize("fmt", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize(("unit", "factor"), [(INCH, 25.4), (CENTIMETRE, 10)])
def test_the_resolution_of_exif_is_read_in_every_container(unit, factor, fmt, tmp_path):
    block = Image.Exif()
    block[ExifTags.Base.XResolution], block[ExifTags.Base.YResolution] = 300.0, 150.0
    block[ExifTags.Base.ResolutionUnit] = unit
    Image.fromarray(PIXELS).save(tmp_path / "a", SUFFIX[fmt], exif=block)
    assert read(tmp_path / "a", fmt).resolution_px_per_mm == pytest.approx((150 / factor, 300 / factor), rel=1e-12)
    block[ExifTags.Base.Orientation] = 6
    Image.fromarray(PIXELS).save(tmp_path / "b", SUFFIX[fmt], exif=block)
    assert read(tmp_path / "b", fmt).resolution_px_per_mm == pytest.approx((300 / factor, 150 / factor), rel=1e-12)


@pytest.mark.parametrize("fmt", ["png", "jpeg"])
def test_a_ratio_in_exif_does_not_take_the_unit_of_its_container(fmt, tmp_path):
    block = Image.Exif()
    block[ExifTags.Base.XResolution], block[ExifTags.Base.YResolution] = 300.0, 150.0
    block[ExifTags.Base.ResolutionUnit] = RATIO
    Image.fromarray(PIXELS).save(tmp_path / "a", SUFFIX[fmt], exif=block, dpi=(127, 127))
    assert read(tmp_path / "a", fmt).resolution_px_per_mm == pytest.approx((5, 5), rel=1e-3)


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (300, 0), (0, 0)])
def test_no_resolution_is_made_of_a_zero(numerator, denominator):
    fields = exif.resolution_fields((1.0, 1.0), ">")
    fields[exif.X_RESOLUTION] = exif.Field(exif.RATIONAL, struct.pack(">II", numerator, denominator))
    assert exif.resolution(fields, ">") is None


def test_a_tiffs_resolution_is_read_as_the_fraction_that_it_is(tmp_path):
    """Not through a float of 7 digits."""
    x, y = Fraction(1_234_567_891, 1_000_003), Fraction(4_000_000_007, 3)
    densities = tuple((side.numerator, side.denominator) for side in (x, y))
    tifffile.imwrite(
        tmp_path / "a", PIXELS, photometric="rgb", metadata=None, resolution=densities, resolutionunit=CENTIMETRE
    )
    assert read(tmp_path / "a", "tiff").resolution_px_per_mm == (float(y / 10), float(x / 10))


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
    found = read(path, "jpeg")
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


def png_with(path: Path, *chunks: tuple[bytes, bytes], mode: str = "RGB") -> Path:
    data = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(data, "PNG")
    extra = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path.write_bytes(data.getvalue()[:33] + extra + data.getvalue()[33:])
    return path


GAMMA_22, GAMMA_10 = (b"gAMA", struct.pack(">I", 45455)), (b"gAMA", struct.pack(">I", 100_000))
PRIMARIES = (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
PERCEPTUAL = (b"sRGB", b"\0")
PROFILE = (b"iCCP", b"icc\0\0" + zlib.compress(ICC))


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        ([GAMMA_22, PRIMARIES], ("the PNG colour chunks cHRM, gAMA",)),
        ([(b"gAMA", struct.pack(">I", 45900))], ("the PNG colour chunks gAMA",)),
        ([PERCEPTUAL], ("the PNG colour chunks sRGB",)),
        ([PERCEPTUAL, GAMMA_10], ("the PNG colour chunks gAMA, sRGB",)),
        ([PROFILE, GAMMA_10], ("the PNG colour chunks gAMA",)),
        ([(b"gAMA", bytes(4))], ("the PNG colour chunks gAMA",)),
        ([(b"cICP", bytes([12, 13, 0, 1]))], ("the PNG colour chunks cICP",)),
        ([(b"tIME", bytes([7, 207, 1, 2, 3, 4, 5])), (b"prVt", b"words")], ("the PNG chunks prVt, tIME",)),
        ([(b"sBIT", b"\5\6\5"), (b"bKGD", bytes(6))], ("the PNG chunks bKGD, sBIT",)),
        ([], ()),
    ],
)
def test_chunks_of_a_png_that_are_not_carried_are_told(chunks, told, tmp_path):
    assert read(png_with(tmp_path / "a", *chunks), "png").left_out == told


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([(b"cICP", bytes([9, 16, 0, 1]))], r"HDR picture \(PQ, cICP transfer 16\).*Convert"),
        ([(b"cICP", bytes([9, 18, 0, 1])), PERCEPTUAL], r"HDR picture \(HLG, cICP transfer 18\).*Convert"),
        ([GAMMA_10], r"a gamma of 1 \(gAMA\).*0\.45455.*Convert"),
        ([(b"gAMA", struct.pack(">I", 55_556)), PRIMARIES], r"a gamma of 0\.55556"),
    ],
)
def test_colours_that_outputs_cannot_state_are_refused(chunks, said, tmp_path):
    with pytest.raises(UnsupportedInput, match=said):
        read(png_with(tmp_path / "a", *chunks), "png")


def test_a_profile_that_the_decoder_drops_is_told(tmp_path):
    found = read(png_with(tmp_path / "a", PROFILE, mode="L"), "png")
    assert found.icc is None
    assert found.left_out == ("an ICC profile that is damaged, or not for grey pictures",)


def test_what_a_jpeg_holds_besides_is_told(tmp_path):
    image, data = Image.fromarray(PIXELS), io.BytesIO()
    image.save(data, "MPO", save_all=True, append_images=[Image.fromarray(255 - PIXELS)], comment=b"words")
    stored = data.getvalue()
    other = b"".join(b"\xff" + bytes([marker, 0, 7]) + b"words" for marker in (0xEB, 0xEC, 0xFE))
    (tmp_path / "a").write_bytes(stored[:2] + other + stored[2:])
    assert read(tmp_path / "a", "jpeg").left_out == (
        "2 JPEG comments",
        "further pictures in the same file (MPF)",
        "the JPEG segments APP11, APP12",
    )


def test_tags_of_a_tiff_that_are_not_carried_are_told(tmp_path):
    many = [(65000 + number, "H", 1, 1, True) for number in range(20)]
    tags = [
        (33550, "d", 3, (1.0, 1.0, 0.0), True),
        (34735, "H", 4, (1, 1, 0, 0), True),
        (318, "2I", 2, (3127, 10000, 3290, 10000), True),
        (319, "2I", 6, (64, 100, 33, 100, 30, 100, 60, 100, 15, 100, 6, 100), True),
        (285, "s", 0, "a page", True),
        (297, "H", 2, (3, 7), True),
    ]
    tifffile.imwrite(tmp_path / "a", PIXELS, photometric="rgb", metadata=None, extratags=[*tags, *many])
    assert read(tmp_path / "a", "tiff").left_out == (
        "the TIFF colour tags PrimaryChromaticities, WhitePoint",
        "the place on the earth (GeoTIFF)",
        f"the TIFF tags {', '.join(['297', *(str(65000 + number) for number in range(11))])} and 9 more",
    )
