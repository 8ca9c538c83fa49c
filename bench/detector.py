"""What the damage detector finds of films' artefacts on intact pictures, and what it does to pictures without any.

    python bench/detector.py --photos DIR --overlays DIR [--clean DIR ...] [--model FILE] [--choose] [--card]

Each overlay (RGBA; its alpha is how much it covers) is enlarged to a square picture's side and laid on it; a pixel is
damaged where alpha is above 0.1. The same pictures are measured enlarged 2x and 4x, too (every fourth overlay at 4x).
Precision and recall allow for 2 px and are pooled over all pixels of a row. The row `inverted` is apart: the overlays
with their colours inverted. Clean pictures are restored with the mask that is found in them; their PSNR is over the
whole picture, at most 100 dB.

--choose measures at several thresholds, without clean pictures' restoration, for the choice on training data.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from quality import references

from engine.detection import DamageDetector
from engine.evaluate.metrics import psnr
from engine.image import ArrayPicture
from engine.models.card import find
from engine.models.checkpoint import with_numbers
from engine.request import Request
from engine.restoration import Restorer
from engine.train.overlays import COVERED

TOLERANCE_PX = 2
MOST_DB = 100.0
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(slots=True)
class Counted:
    """Pixels: found, of these right, damaged, of these found."""

    found: int = 0
    right: int = 0
    damaged: int = 0
    recalled: int = 0

    def add(self, found: Mask, damaged: Mask) -> None:
        self.found += int(found.sum())
        self.right += int((found & _grown(damaged)).sum())
        self.damaged += int(damaged.sum())
        self.recalled += int((damaged & _grown(found)).sum())

    @property
    def f1(self) -> float:
        precision, recall = self.right / max(1, self.found), self.recalled / max(1, self.damaged)
        return 2 * precision * recall / max(1e-9, precision + recall)


def _grown(mask: Mask) -> Mask:
    side = 2 * TOLERANCE_PX + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of square intact pictures")
    parser.add_argument("--overlays", type=Path, required=True, help="folder of kinds, each a folder of RGBA pictures")
    parser.add_argument("--clean", type=Path, action="append", default=[], help="folder of intact pictures")
    parser.add_argument("--model", default="detector")
    parser.add_argument("--limit", type=int, help="only so many overlays, evenly from all")
    parser.add_argument("--enlarged", type=int, action="append", help="only these enlargements")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--card", action="store_true", help="write the figures on the model's card")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photos = [picture for _, picture in references(options.photos, None)]
    overlays = sorted(options.overlays.rglob("*.png"))
    overlays = overlays[:: max(1, len(overlays) // options.limit)] if options.limit else overlays
    scales = options.enlarged or (1, 2, 4)
    detector = DamageDetector(options.model)
    thresholds = THRESHOLDS if options.choose else (detector.threshold,)
    counted: dict[float, dict[str, Counted]] = {threshold: {} for threshold in thresholds}
    for names, picture, damaged in _cases(photos, overlays, scales):
        likely = np.concatenate([*detector.probabilities(ArrayPicture(picture))])
        for threshold, rows in counted.items():
            for name in names:
                rows.setdefault(name, Counted()).add(likely >= threshold, damaged)
    clean = [np.concatenate([*detector.probabilities(ArrayPicture(photo))]) for photo in photos]
    numbers: dict[str, float] = {}
    for threshold, rows in counted.items():
        numbers = {f"F1, {name}": round(one.f1, 3) for name, one in sorted(rows.items())}
        shares = [float((likely >= threshold).mean()) for likely in clean]
        numbers |= {"found on clean photos, mean share": round(fmean(shares), 6)}
        print(f"threshold {threshold:g}: {json.dumps(numbers)}, most {max(shares):.4%}", flush=True)
    for folder in [] if options.choose else options.clean:
        found = _restored(detector, folder)
        numbers |= {f"{folder.name}, restored: mean dB": round(fmean(found.values()), 1)}
        numbers |= {f"{folder.name}, restored: least dB": round(min(found.values()), 1)}
        print(f"{folder.name}: mean {fmean(found.values()):.1f} dB, {min(found, key=lambda n: found[n])} the least: "
              f"{min(found.values()):.1f} dB", flush=True)  # fmt: skip
    if options.card:
        with_numbers(find(options.model), {"command": "python bench/detector.py", **numbers})


def _cases(
    photos: Sequence[Image], overlays: Sequence[Path], scales: Sequence[int]
) -> Iterator[tuple[list[str], Image, Mask]]:
    """The rows that a case counts in, what is given, and what is damaged in it."""
    for number, path in enumerate(overlays):
        photo = photos[number % len(photos)]
        side = min(photo.shape[:2])
        photo = photo[:side, :side]
        rgba = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert rgba is not None
        opaque = rgba[..., 3:].astype(np.float32) / 255
        layer = cv2.resize(np.dstack([rgba[..., 2::-1] * opaque, opaque]), (side, side), interpolation=cv2.INTER_LINEAR)
        colour, alpha = layer[..., :3], layer[..., 3]
        rest = photo * (1 - alpha[..., None])
        covered, inverted = rest + colour, rest + 255 * alpha[..., None] - colour
        for scale in scales:
            if scale == 4 and number % 4:
                continue
            size = (side * scale, side * scale)
            given = cv2.resize(covered, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else covered
            cover = cv2.resize(alpha, size, interpolation=cv2.INTER_LINEAR) if scale > 1 else alpha
            yield ["all", path.parent.name, f"x{scale}"], _rounded(given), np.asarray(cover > COVERED)
        yield ["inverted"], _rounded(inverted), np.asarray(alpha > COVERED)


def _rounded(picture: NDArray[np.float32]) -> Image:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _restored(detector: DamageDetector, folder: Path) -> dict[str, float]:
    """PSNR of clean pictures that were restored with what is found in them."""
    restorer = Restorer()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, picture in references(folder, None):
            mask = np.concatenate([*detector.strips(ArrayPicture(picture))])
            made = restorer.array(picture, mask, Request(), scratch=Path(scratch)) if mask.any() else picture
            found[name] = min(MOST_DB, psnr(picture, made))
    return found


if __name__ == "__main__":
    main()
