"""Three photographs that come with scikit-image, damaged, restored, and laid side by side: `make demo`.

A cup of coffee is repaired at its own size, a cat is repaired and enlarged four times, and a portrait of 512x512 px
grows to 8192x8192 px. Everything lands in `demo-out/`; nothing is fetched from a network.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray

from demo.sheet import Detail, make_sheet
from engine.geometry import Box, Size
from engine.request import Request
from engine.restoration import Job, Receipt, Restorer
from engine.tiling.execute import ShardEnd
from engine.tiling.plan import Plan
from engine.train import damage

OUT = Path("demo-out")
FORMATS = ("ome-zarr", "tiff", "png")
PAPER = (235, 228, 214)
"""RGB of the bare paper where a picture is damaged."""
LINE_EVERY_S = 5.0

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """One photograph, what happens to it, and where to look."""

    file: str
    scale: int
    damage_seed: int
    details: tuple[Detail, ...]

    @property
    def name(self) -> str:
        return Path(self.file).stem


EXAMPLES = (
    Example("coffee.png", 1, 6, (Detail("Rim and spoon", Box(160, 300, 260, 450)),)),
    Example("chelsea.png", 4, 7, (Detail("Eye", Box(60, 110, 160, 260)), Detail("Whiskers", Box(190, 60, 290, 210)))),
    Example(
        "astronaut.png", 16, 3, (Detail("Face", Box(84, 190, 148, 254)), Detail("Collar", Box(140, 160, 204, 224)))
    ),
)


def main() -> None:
    started = time.monotonic()
    restorer = Restorer()
    card = restorer.checkpoint.card
    print(f"model {card.name}, {card.parameters:,} parameters, loaded in {time.monotonic() - started:.1f} s")
    for folder in ("damaged", "restored"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    made = [(example, *run(example, restorer)) for example in EXAMPLES]
    print(f"\nThree photographs in {time.monotonic() - started:.0f} s:")
    for example, receipt, seconds, sheet in made:
        found = ", found finished" if receipt.shards_reused == receipt.shards_total else ""
        print(
            f"\n{example.name}, x{example.scale}: {receipt.seconds:.1f} s{found}; {seconds:.1f} s with damage and sheet"
        )
        print(f"  damaged       {damaged_path(example)}, mask {mask_path(example)}")
        for path in receipt.outputs:
            print(f"  restored      {path}")
        print(f"  before/after  {sheet}")


def run(example: Example, restorer: Restorer) -> tuple[Receipt, float, Path]:
    """Damage, restore and compare one photograph: receipt, seconds, sheet."""
    started = time.monotonic()
    intact = photograph(example.file)
    mask = draw_damage(Size(*intact.shape[:2]), seed=example.damage_seed)
    damaged = np.where(mask[..., None], np.array(PAPER, np.uint8), intact)
    save(damaged_path(example), damaged)
    save(mask_path(example), mask.astype(np.uint8)[..., None] * 255)
    print(
        f"\n{example.name}: {100 * mask.mean():.1f} % missing, {intact.shape[1]}x{intact.shape[0]} px, x{example.scale}"
    )
    job = Job(damaged_path(example), mask_path(example), OUT / "restored", example.name, FORMATS, replace=True)
    receipt = restorer.restore(job, Request(scale=example.scale), progress())
    sheet = OUT / f"{example.name}-before-after.png"
    zarr_path = next(path for path in receipt.outputs if path.suffix == ".zarr")
    save(sheet, make_sheet(intact, damaged, mask, zarr_path, scale=example.scale, details=example.details))
    return receipt, time.monotonic() - started, sheet


def photograph(file: str) -> Image:
    """(h, w, 3) RGB of a picture in the installed scikit-image, read from its own folder."""
    return load(Path(skimage.data.__file__).parent / file)


def draw_damage(size: Size, *, seed: int) -> Mask:
    """What happened to the print: two cracks, scratches, a stroke of a brush, spots and a stain."""
    cracked = damage.cracks(size, seed=seed) | damage.cracks(size, seed=seed + 50)
    worn = damage.scratches(size, seed=seed) | damage.spots(size, seed=seed)
    return cracked | worn | damage.strokes(size, seed=seed) | damage.blobs(size, seed=seed)


def progress() -> Callable[[ShardEnd, Plan], None]:
    """Prints a line every few seconds while shards are made."""
    started = last = time.monotonic()
    done = 0

    def advance(_end: ShardEnd, plan: Plan) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last > LINE_EVERY_S or (done == plan.grid.num_shards and now - started > LINE_EVERY_S):
            last = now
            print(f"  {done} of {plan.grid.num_shards} shards, {now - started:.0f} s", flush=True)

    return advance


def damaged_path(example: Example) -> Path:
    return OUT / "damaged" / f"{example.name}.png"


def mask_path(example: Example) -> Path:
    return OUT / "damaged" / f"{example.name}.mask.png"


def load(path: Path) -> Image:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise SystemExit(f"{path}: cannot be read; is scikit-image installed with its pictures?")
    return np.ascontiguousarray(bgr[..., ::-1]).astype(np.uint8)


def save(path: Path, pixels: Image) -> None:
    """(h, w, 3) RGB or (h, w, 1) grey as PNG."""
    if not cv2.imwrite(str(path), pixels[..., ::-1]):
        raise SystemExit(f"{path}: cannot be written")


if __name__ == "__main__":
    main()
