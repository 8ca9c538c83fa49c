"""Folders of pictures as an archive has them: all formats and sizes, and files that are broken or hostile.

Does nothing by itself. Every function tells what becomes of each picture: its name, and the reason code or None.
"""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import tifffile
from _batch_setup import pixels
from numpy.typing import NDArray

from engine.geometry import Size
from engine.train.damage import LIGHT, MIN_SIDE_PX, damage_mask

Fates = dict[str, str | None]

KINDS = [
    *((".tif", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 3, 4)),
    *((".png", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 3, 4)),
    *((".jpg", "uint8", channels) for channels in (1, 3)),
]
LONGEST_PX = 6000
HUGE = Size(8192, 8192)
SMALL_PX = 64
BAD_EVERY = 20
DAMAGED_EVERY = 3
DAMAGED_PX = 512
"""Side of the part that damage is limited to: an archive's large scans have holes here and there."""
BOMB_PX = 100_000
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY = 0
_NO_MASK, _OTHER_MASK = "mask-unavailable", "mask-mismatch"


def mixed(folder: Path, masks: Path, *, count: int, seed: int) -> Fates:
    """Pictures of 1 to 6,000 px a side, the most of them small, and one of 8192x8192; every twentieth is bad."""
    rng = np.random.default_rng(seed)
    bad = [*BAD, ("mask of another size.png", _OTHER_MASK, None), ("no mask.png", _NO_MASK, None)]
    fates: Fates = {}
    for number in range(count):
        box = f"box {number % 5}"
        (folder / box).mkdir(parents=True, exist_ok=True)
        (masks / box).mkdir(parents=True, exist_ok=True)
        size = Size(*(round(LONGEST_PX ** rng.random()) for _ in range(2)))
        if number % BAD_EVERY == BAD_EVERY // 2:
            kind, code, make = bad[number // BAD_EVERY % len(bad)]
            name = f"{box}/scan {number:03} {kind}"
            data = make(seed) if make is not None else _encoded(".png", _pixels(Size(SMALL_PX, SMALL_PX), seed))
            (folder / name).write_bytes(data)
            fates[str(Path(name).with_suffix(""))] = code
            if code != _NO_MASK:  # the mask of a file that cannot be read is not looked at
                _write(_mask_of(masks / name), np.zeros((SMALL_PX + 1, SMALL_PX), np.uint8))
            continue
        suffix, dtype, channels = KINDS[number % len(KINDS)]
        if number < len(_GIVEN):
            size = _GIVEN[number]
        name = f"{box}/scan {number:03}{suffix}"
        one = 100_003 * seed + number
        _write(folder / name, _pixels(size, one, dtype=dtype, channels=channels))
        _write(_mask_of(masks / name), _mask(size, one, damaged=number % DAMAGED_EVERY == 0))
        fates[str(Path(name).with_suffix(""))] = None
    return fates


_GIVEN = [HUGE, Size(1, 1), Size(LONGEST_PX, 1), Size(4000, LONGEST_PX)]


def small(folder: Path, *, count: int, seed: int, bad: bool = False) -> Fates:
    """Pictures of 64 px; every twentieth is bad where that is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    fates: Fates = {}
    for number in range(count):
        if bad and number % BAD_EVERY == BAD_EVERY // 2:
            kind, code, make = BAD[number // BAD_EVERY % len(BAD)]
            name, data = f"scan {number:05} {kind}", make(seed + number)
        else:
            one = 100_003 * seed + number
            name, code = f"scan {number:05}.png", None
            data = _encoded(".png", _pixels(Size(SMALL_PX, SMALL_PX), one))
        (folder / name).write_bytes(data)
        fates[Path(name).stem] = code
    return fates


def _pixels(size: Size, seed: int, *, dtype: str = "uint8", channels: int = 3) -> NDArray[np.uint8 | np.uint16]:
    """(h, w, c): grey, RGB or RGBA; 16 bits are all used."""
    rgb = pixels(size, seed=seed)
    found = {1: rgb[..., :1], 3: rgb, 4: np.concatenate([rgb, 255 - rgb[..., :1]], 2)}[channels]
    return found if dtype == "uint8" else found.astype(np.uint16) * 256 + found[::-1]


def _mask(size: Size, seed: int, *, damaged: bool) -> NDArray[np.uint8]:
    """Damage in one part of the picture, or an empty mask: a batch takes masks for all pictures, or for none."""
    mask = np.zeros((size.h, size.w), np.uint8)
    part = mask[-DAMAGED_PX:, -DAMAGED_PX:]
    if damaged and min(part.shape) >= MIN_SIDE_PX:
        part[damage_mask(Size(*part.shape), seed=seed, share=LIGHT)] = 255
    return mask


def _mask_of(path: Path) -> Path:
    return path.with_suffix(".mask.png")


def _write(path: Path, array: NDArray[np.uint8 | np.uint16]) -> None:
    if path.suffix == ".tif":
        _write_tiff(path, array)
    else:
        path.write_bytes(_encoded(path.suffix, array))


def _write_tiff(path: Path | BytesIO, array: NDArray[np.uint8 | np.uint16], *, pages: int = 1) -> None:
    with tifffile.TiffWriter(path) as writer:
        for _ in range(pages):
            writer.write(
                array.squeeze(2) if array.shape[2] == 1 else array,
                photometric="minisblack" if array.shape[2] == 1 else "rgb",
                extrasamples=["unassalpha"] if array.shape[2] == 4 else None,
                rowsperstrip=64,
                metadata=None,
            )


def _encoded(suffix: str, array: NDArray[np.uint8 | np.uint16]) -> bytes:
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1] if suffix == ".png" else []
    return cv2.imencode(suffix, array, options)[1].tobytes()


# What is bad.


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _cut(suffix: str, seed: int) -> bytes:
    data = _encoded(suffix, _pixels(Size(SMALL_PX, SMALL_PX), seed))
    return data[: len(data) // 2]


def _bomb(_: int) -> bytes:
    """A header that announces 10,000 million pixels, and next to nothing behind it."""
    header = struct.pack(">IIBBBBB", BOMB_PX, BOMB_PX, 8, _GREY, 0, 0, 0)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + _chunk(b"IEND", b"")


def _animated(seed: int) -> bytes:
    data = _encoded(".png", _pixels(Size(SMALL_PX, SMALL_PX), seed))
    end = len(_PNG) + 25  # of IHDR
    return data[:end] + _chunk(b"acTL", struct.pack(">II", 2, 0)) + data[end:]


def _pages(seed: int) -> bytes:
    file = BytesIO()
    _write_tiff(file, _pixels(Size(SMALL_PX, SMALL_PX), seed), pages=2)
    return file.getvalue()


def _text(_: int) -> bytes:
    return b"Box 3 was lost in the flood.\n" * 40


BAD: list[tuple[str, str, Callable[[int], bytes]]] = [
    ("cut.png", "unreadable-input", lambda seed: _cut(".png", seed)),
    ("cut.jpg", "unreadable-input", lambda seed: _cut(".jpg", seed)),
    ("empty.tif", "unreadable-input", lambda _: b""),
    ("bomb.png", "too-many-pixels", _bomb),
    ("text.png", "unreadable-input", _text),
    ("animated.png", "unsupported-input", _animated),
    ("pages.tif", "unsupported-input", _pages),
    ("jpeg called.png", "disguised-input", lambda s: _encoded(".jpg", _pixels(Size(SMALL_PX, SMALL_PX), s))),
]
"""The end of the name, the reason code, and the file from a seed."""
