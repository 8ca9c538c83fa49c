"""Restored holes in large photographs are as lively as their surroundings: the residual path works.

    python bench/hole_energy.py PHOTO... [--holes N] [--model NAME|FILE]

Seeded ellipses of 80 to 260 px radius are cut from each photograph and restored at scale 1. The gradient energy of a
region is the mean squared gradient of its luma; inside a hole it should be 0.5 to 1.5 times that of the ring of 2 to
40 px around the hole. The same quotient of the intact photograph stands beside it.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import fmean, median

import cv2
import numpy as np
import pyvips
from numpy.typing import NDArray

from engine.evaluate.metrics import gradient_energy
from engine.request import Request
from engine.restoration import Restorer

LEAST, MOST = 0.5, 1.5
RADIUS_PX = (80, 260)
RING_PX = (2, 40)
APART_PX = 120
"""Least distance between two holes, so that no ring reaches into another hole."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO")
    parser.add_argument("--holes", type=int, default=7, help="in each photograph")
    parser.add_argument("--model", help="embedded name or .safetensors file")
    options = parser.parse_args()
    restorer = Restorer(model=options.model)
    found: list[tuple[float, float]] = []
    print("| photograph | hole | radius px | restored | intact |\n|---|---:|---:|---:|---:|")
    for seed, path in enumerate(options.photos):
        photo = pyvips.Image.new_from_file(str(path)).autorot().numpy()[..., :3]
        holes = cut(photo.shape[:2], options.holes, seed=seed)
        damaged = photo.copy()
        damaged[np.any(holes, axis=0)] = 255
        with tempfile.TemporaryDirectory() as scratch:
            restored = restorer.array(damaged, np.any(holes, axis=0), Request(scale=1), scratch=Path(scratch))
        for index, hole in enumerate(holes):
            after, before = (quotient(picture, hole) for picture in (restored, photo))
            radius_px = round(float(np.sqrt(hole.sum() / np.pi)))
            print(f"| {path.name} | {index + 1} | {radius_px} | {after:.2f} | {before:.2f} |", flush=True)
            found.append((after, before))
    after = [pair[0] for pair in found]
    inside = sum(LEAST <= value <= MOST for value in after)
    print(
        f"\nmean {fmean(after):.2f}, median {median(after):.2f}; {inside} of {len(after)} within {LEAST} to {MOST} "
        f"(intact: {sum(LEAST <= pair[1] <= MOST for pair in found)})"
    )


def cut(shape: tuple[int, int], num_holes: int, *, seed: int) -> list[NDArray[np.bool_]]:
    """Ellipses that lie apart from each other and inside the picture."""
    rng = np.random.default_rng(seed)
    taken = np.zeros(shape, np.uint8)
    holes: list[NDArray[np.bool_]] = []
    while len(holes) < num_holes:
        reach = rng.integers(*RADIUS_PX, size=2, endpoint=True)
        edge = int(reach.max()) + APART_PX
        centre = (int(rng.integers(edge, shape[1] - edge)), int(rng.integers(edge, shape[0] - edge)))
        angle = float(rng.uniform(0, 180))
        hole = np.zeros(shape, np.uint8)
        cv2.ellipse(hole, centre, (int(reach[0]), int(reach[1])), angle, 0, 360, 1, -1)
        if (hole & taken).any():
            continue
        cv2.ellipse(taken, centre, (int(reach[0]) + APART_PX, int(reach[1]) + APART_PX), angle, 0, 360, 1, -1)
        holes.append(hole.astype(bool))
    return holes


def quotient(picture: NDArray[np.uint8], hole: NDArray[np.bool_]) -> float:
    """Energy inside the hole over the energy of its ring."""
    distance = cv2.distanceTransform((~hole).astype(np.uint8), cv2.DIST_L2, 5)
    ring = (distance >= RING_PX[0]) & (distance <= RING_PX[1])
    return gradient_energy(picture, where=hole) / gradient_energy(picture, where=ring)


if __name__ == "__main__":
    main()
