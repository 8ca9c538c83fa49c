"""Which picture format a file holds, and what its header says, read without any decoder.

The magic bytes decide the format. What is not one of the pictures that are restored is refused here, before a decoder
sees a single byte of it. Every format has a module of its own: `png_header`, `jpeg_header`, `tiff_header`,
`webp_header`, `jpeg2000_header`.
"""

from io import BufferedReader
from pathlib import Path

from engine import jpeg2000_header, jpeg_header, png_header, tiff_header, webp_header
from engine.errors import DisguisedInput, UnreadableInput, UnsupportedInput
from engine.picture_header import MAX_WORKING_BYTES, Header

__all__ = ["MAX_WORKING_BYTES", "PICTURE_SUFFIXES", "SUFFIXES", "Header", "check_png_end", "format_of", "read_header"]

SUFFIXES = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "tiff": (".tif", ".tiff", ".btf", ".tf8"),
    "webp": (".webp",),
    "jpeg2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
}
"""The names under which a format is accepted."""

PICTURE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg2000"),
    (jpeg2000_header.CODESTREAM, "jpeg2000"),
)
_CONVERT = "Convert it to PNG or TIFF."
_OTHER_MAGIC = (
    (b"GIF8", "GIF", _CONVERT),
    (b"RIFF", "RIFF (AVI or WAV)", "Save the frame that is meant as PNG or TIFF."),
    (b"BM", "BMP", _CONVERT),
    (b"%PDF", "PDF", "Export the page as TIFF, at the resolution of the scan."),
    (b"%!PS", "PostScript", "Export the page as TIFF, at the resolution of the scan."),
    (b"\xc5\xd0\xd3\xc6", "PostScript", "Export the page as TIFF, at the resolution of the scan."),
    (b"8BPS", "Photoshop", "Save it flattened, as TIFF."),
    (b"PK\x03\x04", "ZIP", "Unpack it and give the picture."),
    (b"\x1f\x8b", "gzip", "Unpack it and give the picture."),
    (b"\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    (b"\xff\x0a", "JPEG XL", _CONVERT),
    (b"\0\0\1\0", "icon", _CONVERT),
    (b"\x76\x2f\x31\x01", "OpenEXR", "Convert it to TIFF."),
    (b"SIMPLE  =", "FITS", "Convert it to TIFF."),
    (b"AT&TFORM", "DjVu", "Export the page as TIFF."),
    *((b"P%d" % num, "PBM, PGM or PPM", _CONVERT) for num in range(1, 8)),
    (b"#?RADIANCE", "Radiance HDR", "Convert it to TIFF."),
    (b"#!", "script", "Give a picture."),
    (b"<", "XML, SVG or HTML", _CONVERT),
)


def read_header(file: BufferedReader, path: Path, *, page: int | None = None) -> Header:
    """The header of an open file, or of one of its pages, counted from 0. Raises the InputError that says why not."""
    head = file.read(16)
    if not head:
        raise UnreadableInput(f"{path}: the file is empty (0 bytes). Give a picture.")
    found = format_of(head)
    _check_name(path, found, head)
    file.seek(0)
    if found == "tiff":
        return tiff_header.read_header(file, path, page=page)
    if page:
        raise UnsupportedInput(f"{path}: page {page} is asked for, a {found} file has 1. Leave --page away, or give 0.")
    if found == "png":
        return png_header.read_header(file, path)
    if found == "jpeg":
        return jpeg_header.read_header(file, path)
    return webp_header.read_header(file, path) if found == "webp" else jpeg2000_header.read_header(file, path)


def format_of(head: bytes) -> str | None:
    """The format that a file's first 16 bytes are of; None where it is none that is restored."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def check_png_end(file: BufferedReader, path: Path) -> None:
    """Raises an InputError unless the chunks of a PNG reach its IEND."""
    png_header.check_end(file, path)


def _check_name(path: Path, found: str | None, head: bytes) -> None:
    suffix = path.suffix.lower()
    named = next((name for name, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if found is not None and named != found:
        raise DisguisedInput(
            f"{path}: the content is {found.upper()}, the name ends in '{path.suffix}'. "
            f"Rename it to '{path.stem}{SUFFIXES[found][0]}'."
        )
    if found is None:
        other, remedy = _other(head) if len(head) >= 12 else (None, _CONVERT)
        if named is not None and other is not None:
            raise DisguisedInput(f"{path}: the name says {named.upper()}, the content is {other}. {remedy}")
        if named is not None:
            raise UnreadableInput(f"{path}: damaged, or not a {named.upper()} at all: it starts with {head[:8]!r}.")
        raise UnsupportedInput(f"{path}: {other or 'not a picture format that is known'}. {remedy}")


def _other(head: bytes) -> tuple[str | None, str]:
    """What a file is that is not restored, where that is known, and what to do with it."""
    if head[4:8] == b"ftyp":
        return "HEIC, AVIF or a film", _CONVERT
    return next(((name, remedy) for magic, name, remedy in _OTHER_MAGIC if head.startswith(magic)), (None, _CONVERT))
