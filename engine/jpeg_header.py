"""A JPEG's first frame: ITU-T T.81, annex B. Adobe's inverted CMYK and YCCK are left to the decoder."""

from io import BufferedReader
from pathlib import Path

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size
from engine.picture_header import Header, big_endian, listed

_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_MAX_MARKERS = 2000
_MAX_FILL_BYTES = 4096
_COMMENT = 0xFE
_APPLICATION = range(0xE0, 0xF0)
_NAME_BYTES = 16
_JFIF = b"JFIF\0"
_KEPT = (
    (0xE0, _JFIF),
    (0xE1, b"Exif\0"),
    (0xE1, b"http://ns.adobe."),  # XMP; its extended part is told of with the packet
    (0xE2, b"ICC_PROFILE\0"),
    (0xED, b"Photoshop 3.0\0"),
    (0xEE, b"Adobe"),
)
"""Application segments that are carried, or that the decoder needs."""
_FURTHER_PICTURES = b"MPF\0"
_UNITS_PER_MM = {1: 25.4, 2: 10.0}


def read_header(file: BufferedReader, path: Path) -> Header:
    """Raises UnsupportedInput for lossless, arithmetic and 12-bit frames, UnreadableInput where there is none."""
    segments: list[tuple[int, bytes]] = []
    marker, body, interleaved = _frame(file, path, segments)
    precision, size, channels = body[0], Size(h=big_endian(body[1:3]), w=big_endian(body[3:5])), body[5]
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8:
        raise UnsupportedInput(
            f"{path}: a JPEG of kind SOF{marker - 0xC0} with {precision} bits. Save it as PNG or TIFF."
        )
    if channels not in (1, 3, 4):
        raise UnsupportedInput(
            f"{path}: a JPEG of {channels} channels; grey, RGB and CMYK are restored. Convert it to RGB."
        )
    if min(size.h, size.w) == 0:
        raise UnsupportedInput(f"{path}: a JPEG that does not state its height ({size} px). Save it anew.")
    # progressive files, and channels one after another, are decoded from all coefficients at once
    coefficient_bytes = 0 if marker != 0xC2 and interleaved else 2 * size.num_pixels * channels
    return Header(
        "jpeg",
        size,
        3 if channels == 4 else channels,
        "uint8",
        coefficient_bytes,
        conversion="cmyk" if channels == 4 else "",
        resolution_px_per_mm=_resolution(segments),
        left_out=_left_out(segments),
    )


def _density(segments: list[tuple[int, bytes]]) -> tuple[int, int, int]:
    """Unit, x and y of the JFIF segment (ITU-T T.871, 10.1); zeros where there is none."""
    jfif = next((body for marker, body in segments if marker == 0xE0 and body.startswith(_JFIF)), b"")
    return big_endian(jfif[7:8]), big_endian(jfif[8:10]), big_endian(jfif[10:12])


def _resolution(segments: list[tuple[int, bytes]]) -> tuple[float, float] | None:
    """(y, x) pixels per mm, where the unit is the inch or the centimetre."""
    unit, x, y = _density(segments)
    if unit not in _UNITS_PER_MM or min(x, y) == 0:
        return None
    return y / _UNITS_PER_MM[unit], x / _UNITS_PER_MM[unit]


def _left_out(segments: list[tuple[int, bytes]]) -> tuple[str, ...]:
    comments = sum(marker == _COMMENT for marker, _ in segments)
    found = ["the JPEG comment" if comments == 1 else f"{comments} JPEG comments"] * bool(comments)
    others = [(marker, body) for marker, body in segments if marker != _COMMENT and not _is_kept(marker, body)]
    if any(body.startswith(_FURTHER_PICTURES) for _, body in others):
        found.append("further pictures in the same file (MPF)")
    names = [f"APP{marker - 0xE0}" for marker, body in others if not body.startswith(_FURTHER_PICTURES)]
    found += [f"the JPEG segments {listed(names)}"] * bool(names)
    unit, x, y = _density(segments)
    if unit == 0 and x != y:
        found.append("a shape of the pixels without a resolution (JFIF)")
    return tuple(found)


def _is_kept(marker: int, body: bytes) -> bool:
    return any(marker == kept and body.startswith(name) for kept, name in _KEPT)


def _frame(file: BufferedReader, path: Path, segments: list[tuple[int, bytes]]) -> tuple[int, bytes, bool]:
    """The first start-of-frame marker, what it holds (at least 6 bytes), whether its first scan has all channels.

    `segments` gets the comments and application segments before it, each with its first bytes.
    """
    file.seek(2)
    frame, body = 0, b""
    for _ in range(_MAX_MARKERS):
        marker = _next_marker(file)
        if marker in _BARE_MARKERS:
            continue
        length = big_endian(file.read(2))
        if length < 2 or marker == 0xD9 or (marker in _FRAMES and frame):
            break
        if marker == 0xDA:
            if not frame:
                break
            return frame, body, file.read(1) == body[5:6]
        if marker in _FRAMES:
            frame, body = marker, file.read(length - 2)
            if len(body) < 6 or len(body) != length - 2:
                break
        else:
            start = file.tell()
            if marker == _COMMENT or marker in _APPLICATION:
                segments.append((marker, file.read(min(length - 2, _NAME_BYTES))))
            file.seek(start + length - 2)
    raise UnreadableInput(f"{path}: the JPEG header is damaged or cut off. Copy or scan it anew.")


def _next_marker(file: BufferedReader) -> int:
    """The code behind the next 0xFF; 0xD9, the end, where there is none."""
    if file.read(1) != b"\xff":
        return 0xD9
    for _ in range(_MAX_FILL_BYTES):
        code = file.read(1)
        if code != b"\xff":
            return code[0] if code else 0xD9
    return 0xD9
