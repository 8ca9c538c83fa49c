"""Damaged copies of pictures, each a function of its number, and what the decoders make of them.

Apart from the test, because the process that decodes has to import it, and should not import more than it needs.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.geometry import Box
from engine.image import decode, probe

MAX_PIXELS = 1 << 24
_EXTREMES = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Seed = tuple[str, bytes]
"""File name and content."""


def mutant(seeds: Sequence[Seed], number: int) -> Seed:
    """The damaged file of a number: seeds in turn, then the kinds of damage in turn."""
    name, intact = seeds[number % len(seeds)]
    rng = np.random.default_rng(number)
    data = bytearray(intact)
    kind = (number // len(seeds)) % 6
    if kind == 0:  # a few bytes, anywhere
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            data[at] = rng.integers(256)
    elif kind == 1:  # one bit of the first bytes, where headers are
        data[rng.integers(0, min(len(data), 400))] ^= 1 << rng.integers(8)
    elif kind == 2:  # cut off
        del data[rng.integers(0, len(data)) :]
    elif kind == 3:  # the end of another file
        other = seeds[rng.integers(len(seeds))][1]
        data[rng.integers(0, len(data)) :] = other[rng.integers(0, len(other)) :]
    elif kind == 4:  # a number that nobody expects
        size = int(rng.choice([2, 4, 8]))
        at = int(rng.integers(0, max(1, min(len(data), int(rng.choice([64, 1000, len(data)]))) - size)))
        value = _EXTREMES[rng.integers(len(_EXTREMES))] % (1 << 8 * size)
        data[at : at + size] = value.to_bytes(size, str(rng.choice(["little", "big"])))
    else:  # a piece moved, doubled or lost
        start, at = rng.integers(0, len(data), 2)
        piece = data[start : start + rng.integers(1, 200)]
        if rng.integers(2):
            del data[start : start + len(piece)]
        data[at:at] = piece
    return name, bytes(data)


def outcome(path: Path, scratch: Path) -> str:
    """ "decoded", or the code of the InputError that the file met. Whatever else is raised is a defect."""
    try:
        info = probe(path, max_pixels=MAX_PIXELS)
        picture = decode(info, scratch)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - this is no test, it is what the test runs
        return error.code
    pixels = picture.read(Box.of(picture.size))
    picture.raw.path.unlink()
    assert pixels.shape == (info.size.h, info.size.w, info.channels)
    assert pixels.dtype == info.dtype
    assert pixels.dtype.kind == "u" or np.isfinite(pixels).all()
    return "decoded"


def outcomes(seeds: Sequence[Seed], numbers: Sequence[int], folder: Path) -> list[tuple[int, str, float]]:
    """Number, outcome (or "untyped: " and the defect) and seconds of each mutant."""
    folder.mkdir(exist_ok=True)
    done: list[tuple[int, str, float]] = []
    for number in numbers:
        name, data = mutant(seeds, number)
        path = folder / f"{number}-{name}"
        path.write_bytes(data)
        started = time.perf_counter()
        try:
            found = outcome(path, folder / "scratch")
        except Exception as error:
            found = f"untyped: {type(error).__name__}: {error}"
        done.append((number, found, time.perf_counter() - started))
        path.unlink()
    return done
