"""Colours as cameras, printers and years leave them. Changed in what is given and in what is wanted alike: to take it
back is another task, and a restoration must not do it unasked. Seeded and pure; pictures are (h, w, 3) uint8.
"""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHANGED = 0.3
"""Share of the pictures; of these every other one has faded, too."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_YELLOW = np.array([1.0, 0.92, 0.7], np.float32)
"""What a yellowed white reflects, at most."""


def recoloured(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture, now and then with other colours."""
    if rng.random() >= CHANGED:
        return picture
    x = jittered(picture.astype(np.float32) / np.float32(255), rng)
    if rng.random() < 0.5:
        x = faded(x, rng)
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def jittered(x: Floats, rng: np.random.Generator) -> Floats:
    """(h, w, 3) in [0, 1]: another gamma, saturation and balance of the channels."""
    grey = (x @ LUMA)[..., None]
    y = grey + rng.uniform(0.4, 1.4) * (x - grey)
    y = np.clip(y * rng.uniform(0.9, 1.1, 3), 0, 1) ** (0.75 * 1.8 ** rng.random())
    return y.astype(np.float32)


def faded(x: Floats, rng: np.random.Generator) -> Floats:
    """(h, w, 3) in [0, 1]: blacks that are grey, whites that are dim and yellow."""
    black, white = rng.uniform(0, 0.25), rng.uniform(0.75, 1.0)
    return ((black + x * (white - black)) * _YELLOW ** rng.random()).astype(np.float32)
