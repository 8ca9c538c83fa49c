"""A JPEG's first frame: ITU-T T.81, annex B. Adobe's inverted CMYK and YCCK are left to the decoder."""

import os
from io import BufferedReader
from pathlib import Path

from engine.errors import UnreadableInput, UnsupportedInput
from engine.geometry import Size
from engine.picture_header import Header, big_endian

_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_MAX_MARKERS = 2000
_MAX_FILL_BYTES = 4096


def read_header(file: BufferedReader, path: Path) -> Header:
    """Raises UnsupportedInput for lossless, arithmetic and 12-bit frames, UnreadableInput where there is none."""
    marker, body, interleaved = _frame(file, path)
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
    if channels == 4:
        return Header("jpeg", size, 3, "uint8", coefficient_bytes, conversion="cmyk")
    return Header("jpeg", size, channels, "uint8", coefficient_bytes)


def _frame(file: BufferedReader, path: Path) -> tuple[int, bytes, bool]:
    """The first start-of-frame marker, what it holds (at least 6 bytes), whether its first scan has all channels."""
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
            file.seek(length - 2, os.SEEK_CUR)
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
