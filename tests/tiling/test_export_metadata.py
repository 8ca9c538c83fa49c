"""What is carried into every output, read back by other libraries, and that nothing is there once it is stripped."""

import base64
import hashlib
import json
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
import zarr
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from engine import exif
from engine.errors import OutputUnsupported, StorageError
from engine.geometry import Size
from engine.image import probe
from engine.metadata import Metadata, iptc_resource
from engine.tiling import tiff_export
from engine.tiling.durable import DurableStore
from engine.tiling.export import SUFFIX, check_format, export
from engine.tiling.grid import Grid
from engine.tiling.layout import lay_out, stored_metadata
from engine.tiling.plan import Plan

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LONG_ICC = struct.pack(">I", len(ICC) + 153_600) + ICC[4:] + bytes(range(256)) * 600
"""More than two segments of a JPEG hold."""
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">a packet \xc3\xa4</x:xmpmeta>'
IPTC = b"\x1c\x02\x00\x00\x02\x00\x04\x1c\x02\x78\x00\x09a caption"
SIZE = Size(24, 40)
PIXELS = np.random.default_rng(3).integers(0, 256, (SIZE.h, SIZE.w, 3), dtype=np.uint8)
FILES = ("tiff", "png", "jpeg", "jp2")
EXIF = exif.block_of(
    exif.Exif(
        ">",
        main={
            270: exif.Field(exif.ASCII, "Ein Bild aus Köln\0".encode()),
            274: exif.Field(exif.SHORT, b"\0\6"),
            315: exif.Field(exif.ASCII, b"an artist\0"),
        },
        exif={
            36867: exif.Field(exif.ASCII, b"2020:02:02 02:02:02\0"),
            37500: exif.Field(exif.UNDEFINED, bytes(range(256))),
            33434: exif.Field(exif.RATIONAL, struct.pack(">II", 1, 125)),
            40962: exif.Field(exif.SHORT, b"\0\7"),
        },
        gps={
            1: exif.Field(exif.ASCII, b"N\0"),
            2: exif.Field(exif.RATIONAL, struct.pack(">6I", 48, 1, 8, 1, 29, 2)),
        },
        interop={1: exif.Field(exif.ASCII, b"R98\0")},
    )
)
ALL = Metadata(icc=ICC, exif=EXIF, xmp=XMP, iptc=IPTC, resolution_px_per_mm=(300 / 25.4, 600 / 25.4))


def write(path: Path, fmt: str, metadata: Metadata, pixels: np.ndarray = PIXELS, **options) -> Path:
    levels = [pixels]
    while max(levels[-1].shape[:2]) > 512:
        levels.append(levels[-1][::2, ::2])
    export(
        lambda level, box: levels[level][box.slices],
        level_sizes=[Size(*level.shape[:2]) for level in levels],
        channels=pixels.shape[2],
        dtype=pixels.dtype.name,
        fmt=fmt,
        path=path,
        metadata=metadata,
        **options,
    )
    return path


def again(path: Path) -> Metadata:
    return probe(path).metadata


def check_exif(found: Image.Exif) -> None:
    """As Pillow reads it."""
    assert found[270].encode("latin-1").decode() == "Ein Bild aus Köln"
    assert (found[315], found.get(274, 1)) == ("an artist", 1)
    inner, gps = found.get_ifd(ExifTags.IFD.Exif), found.get_ifd(ExifTags.IFD.GPSInfo)
    assert (inner[36867], inner[37500], inner[33434]) == ("2020:02:02 02:02:02", bytes(range(256)), 1 / 125)
    assert inner[40962] == SIZE.w
    assert (gps[1], gps[2]) == ("N", (48.0, 8.0, 14.5))


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg"])
def test_everything_round_trips(fmt, tmp_path):
    path = write(tmp_path / f"a{SUFFIX[fmt]}", fmt, ALL)
    found = again(path)
    assert (found.icc, found.xmp, found.iptc) == (ICC, XMP, IPTC)
    assert found.resolution_px_per_mm == pytest.approx(ALL.resolution_px_per_mm, rel=1e-3)
    before = exif.parse(ALL.corrected_exif(SIZE)).in_order("<")
    after = exif.parse(found.exif).in_order("<")
    own = {exif.ORIENTATION, exif.X_RESOLUTION, exif.Y_RESOLUTION, exif.RESOLUTION_UNIT}
    assert {t: f for t, f in after.main.items() if t not in own} == {t: f for t, f in before.main.items() if t != 274}
    assert after.parts[1:] == before.parts[1:]
    with Image.open(path) as image:
        check_exif(image.getexif())
        assert image.info["icc_profile"] == ICC
        dpi = image.info["dpi"]
        assert (float(dpi[0]), float(dpi[1])) == pytest.approx((600, 300), rel=1e-3)


@pytest.mark.parametrize("big", [False, True])
def test_the_directories_of_a_tiff(big, tmp_path, monkeypatch):
    if big:
        monkeypatch.setattr(tiff_export, "_CLASSIC_BYTES", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (700, 1100, 3), dtype=np.uint8)
    path = write(tmp_path / "a.tif", "tiff", Metadata(ICC, EXIF, XMP, IPTC), pixels)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff is big
        assert len(file.pages) == 1
        page = file.pages[0]
        assert page.tags[34665].value["DateTimeOriginal"] == "2020:02:02 02:02:02"
        assert page.tags[34665].value["ExposureTime"] == (1, 125)
        assert page.tags[34853].value["GPSLatitude"] == (48, 1, 8, 1, 29, 2)
        assert page.tags[700].value == XMP
        assert bytes(page.tags[33723].value) == IPTC
        assert page.tags[34675].value == ICC
        assert np.array_equal(page.asarray(), pixels)
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [(700, 1100, 3), (350, 550, 3), (175, 275, 3)]
        assert np.array_equal(levels[1].asarray(), pixels[::2, ::2])
    with Image.open(path) as image:
        inner = image.getexif().get_ifd(0x8769)
        assert inner[37500] == bytes(range(256))
        assert image.getexif().get_ifd(0xA005)[1] == "R98"
        assert image.getexif().get_ifd(0x8825)[2] == (48.0, 8.0, 14.5)
        assert np.array_equal(np.asarray(image), pixels)
    with_vips = pyvips.Image.new_from_file(str(path), fail_on="warning")
    assert bytes(with_vips.get("xmp-data")) == XMP
    assert np.array_equal(with_vips.numpy(), pixels)
    assert np.array_equal(pyvips.Image.new_from_file(str(path), subifd=0).numpy(), pixels[::2, ::2])


@pytest.mark.parametrize("compression", ["none", "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_tiff_compressions(compression, dtype, tmp_path):
    pixels = (np.mgrid[:600, :700].sum(0) % 200).astype(dtype)[..., None].repeat(4, 2)
    path = write(tmp_path / "a.tif", "tiff", Metadata(), pixels, tiff_compression=compression)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        names = {"none": "NONE", "lzw": "LZW", "deflate": "ADOBE_DEFLATE", "zstd": "ZSTD"}
        assert page.compression.name == names[compression]
        assert np.array_equal(page.asarray(), pixels)
    if compression != "zstd":  # the wheel's libtiff cannot read it
        assert np.array_equal(pyvips.Image.new_from_file(str(path), fail_on="warning").numpy(), pixels)
    if dtype == "uint8":
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert (path.stat().st_size < pixels.nbytes / 2) == (compression != "none")


def canary(number: int, folder: Path) -> tuple[Path, str, bytes]:
    """A picture in one of four containers with a word of its own in every place that holds words."""
    word = f"canary{number:04}"
    fmt = ("jpeg", "png", "tiff", "webp")[number % 4]
    path, image, block = folder / f"in{number}.{fmt}", Image.fromarray(PIXELS), Image.Exif()
    block[270], block[315], block[33432] = word, word, word
    inner = {36867: word, 37500: word.encode(), 37510: b"ASCII\0\0\0" + word.encode()}
    gps = {1: "N", 2: (number, 8.0, 14.5), 27: b"ASCII\0\0\0" + word.encode()}
    block.get_ifd(0x8769).update(inner)
    block.get_ifd(0x8825).update(gps)
    xmp = XMP.replace(b"a packet", word.encode())
    iptc = b"\x1c\x02\x78\0" + bytes([len(word)]) + word.encode()
    if fmt == "jpeg":
        image.save(path, "JPEG", exif=block, xmp=xmp, icc_profile=ICC, comment=word.encode())
        body = b"Photoshop 3.0\0" + iptc_resource(iptc)
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:])
    elif fmt == "png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
        texts.add_text("Comment", word)
        texts.add_text(word, "a word in the place of its key")
        texts.add_text("Raw profile type iptc", f"\niptc\n 1\n{iptc_resource(iptc).hex()}\n", zip=True)
        image.save(path, "PNG", exif=block, icc_profile=ICC, pnginfo=texts)
    elif fmt == "tiff":
        block[700], block[33723], block[0x8769], block[0x8825] = xmp, iptc, inner, gps
        image.save(path, "TIFF", exif=block, icc_profile=ICC)
    else:
        image.save(path, "WEBP", exif=block, xmp=xmp, icc_profile=ICC)
    return path, fmt, word.encode()


def holds(path: Path, word: bytes) -> bool:
    """Also where PNG keeps it: as hexadecimal digits, compressed."""
    data = path.read_bytes() if path.is_file() else b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())
    texts = ""
    if path.suffix == ".png":
        with Image.open(path) as image:
            texts = "".join(map(str, image.info.values())).replace("\n", "")
    return word in data or word.decode() in texts or word.hex() in texts or word.decode().encode("utf-16-le") in data


def test_a_hundred_canaries(tmp_path):
    for number in range(100):
        source, fmt, word = canary(number, tmp_path)
        found = probe(source).metadata
        assert word.decode() not in str(found.stripped().left_out)
        assert found.exif is not None
        assert found.xmp is not None
        assert (found.iptc is None) == (fmt == "webp")
        for target in FILES if number % 10 else (*FILES, "iiif"):
            path = write(tmp_path / f"a{SUFFIX[target]}", target, found.stripped())
            assert not holds(path, word), (fmt, target)
            if path.is_file() and target != "jp2":
                bare = again(path)
                assert (bare.exif, bare.xmp, bare.iptc, bare.icc) == (None, None, None, ICC)
        for target in (FILES[number // 4 % 4],):
            path = write(tmp_path / f"b{SUFFIX[target]}", target, found)
            assert holds(path, word), (fmt, target)
            if target != "jp2":
                carried = again(path)
                assert (carried.icc, carried.xmp, carried.iptc) == (found.icc, found.xmp, found.iptc)
                assert (
                    exif.parse(carried.exif).gps == exif.parse(found.exif).in_order(exif.parse(carried.exif).order).gps
                )


@pytest.mark.parametrize("fmt", ["tiff", "png", "jpeg", "jp2"])
def test_a_long_profile_is_byte_identical(fmt, tmp_path):
    path = write(tmp_path / f"a{SUFFIX[fmt]}", fmt, Metadata(icc=LONG_ICC))
    with Image.open(path) as image:
        found = image.info.get("icc_profile")
    assert (boxes(path.read_bytes())[b"colr"][3:] if fmt == "jp2" else found) == LONG_ICC


def test_what_does_not_fit_a_jpeg_is_refused():
    for block in ({"xmp": bytes(70_000)}, {"iptc": bytes(65_520)}, {"exif": bytes(65_528)}):
        metadata = Metadata(**block)
        with pytest.raises(OutputUnsupported, match=r"[67]\d,\d{3} bytes, a JPEG has room for 65,533.*strip-metadata"):
            check_format("jpeg", size=SIZE, channels=3, dtype="uint8", metadata=metadata)
        check_format("png", size=SIZE, channels=3, dtype="uint8", metadata=metadata)
        check_format("jpeg", size=SIZE, channels=3, dtype="uint8", metadata=metadata.stripped())


def test_a_profile_of_another_length_than_it_states_is_no_png(tmp_path):
    metadata = Metadata(icc=ICC + b"\0")
    with pytest.raises(OutputUnsupported, match=f"has {len(ICC) + 1} bytes and states {len(ICC)}.*tiff"):
        write(tmp_path / "a.png", "png", metadata)
    with Image.open(write(tmp_path / "a.tif", "tiff", metadata)) as image:
        assert image.info["icc_profile"] == metadata.icc


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The boxes of a JP2, flat; a uuid box under its uuid."""
    found, at = {}, 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + length if length else None]
        if kind in (b"jp2h", b"res "):
            found |= boxes(body)
        found[body[:16] if kind == b"uuid" else kind] = body[16:] if kind == b"uuid" else body
        at += length or len(data)
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_jpeg_2000_holds_the_pixels(channels, dtype, tmp_path):
    pixels = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (70, 90, channels), dtype=dtype, endpoint=True)
    data = write(tmp_path / "a.jp2", "jp2", Metadata(), pixels).read_bytes()
    assert np.array_equal(imagecodecs.jpeg2k_decode(data).reshape(pixels.shape), pixels)
    if dtype == "uint8":
        with Image.open(tmp_path / "a.jp2") as image:
            assert image.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
            assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    assert (b"cdef" in boxes(data)) == (channels in (2, 4))


def test_the_boxes_of_jpeg_2000(tmp_path):
    path = write(tmp_path / "a.jp2", "jp2", ALL)
    found = boxes(path.read_bytes())
    assert found[bytes.fromhex("be7acfcb97a942e89c71999491e3afac")] == XMP
    assert found[b"JpgTiffExif->JP2"] == ALL.corrected_exif(SIZE)
    assert found[bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38")] == IPTC
    numerator_y, below_y, numerator_x, below_x = struct.unpack(">4H", found[b"resc"][:8])
    assert numerator_y / below_y == pytest.approx(300 / 0.0254, rel=1e-3)
    assert numerator_x / below_x == pytest.approx(600 / 0.0254, rel=1e-3)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


def test_the_canvas_states_its_profile(tmp_path):
    size = Size(24, 40)
    plan = Plan("a", size, 3, "uint8", Grid(size), "0" * 64, "none", "m", "1" * 64, {}, 0, 0)
    lay_out(DurableStore(tmp_path), plan, metadata=ALL)
    stored = zarr.open_group(tmp_path, mode="r").attrs["archive"]
    assert base64.b64decode(stored["icc_profile"]) == ICC
    assert stored["icc_profile_sha256"] == hashlib.sha256(ICC).hexdigest()
    found = stored_metadata(tmp_path)
    assert (found.icc, found.exif, found.xmp, found.iptc) == (ICC, ALL.corrected_exif(size), XMP, IPTC)
    assert found.resolution_px_per_mm == pytest.approx(ALL.resolution_px_per_mm)
    lay_out(DurableStore(tmp_path), plan)
    assert "archive" not in zarr.open_group(tmp_path, mode="r").attrs
    assert stored_metadata(tmp_path) == Metadata()
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(StorageError, match=r"zarr\.json cannot be read"):
        stored_metadata(tmp_path)


@pytest.mark.parametrize(
    "archive",
    [
        5,
        "x",
        [1],
        *({"resolution_px_per_mm": sides} for sides in ("x", [], [1], [1e400, 1], [float("nan"), 1], [0, 1], 5)),
    ],
)
def test_an_archive_that_is_none_is_not_carried(tmp_path, archive):
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {"archive": archive}}))
    with pytest.raises(StorageError, match=r"zarr\.json cannot be read"):
        stored_metadata(tmp_path)
