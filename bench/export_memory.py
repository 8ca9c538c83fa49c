"""Peak memory that an export to pyramidal TIFF adds, from a synthetic reader.

    python bench/export_memory.py [SIDE_PX] [--compression none|lzw|deflate|zstd]

The process notes its resident size after its imports and one small export; the kernel's high-water mark tells the
rest.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

from engine.geometry import Box, Size
from engine.memory import process_memory
from engine.metadata import Metadata
from engine.tiling.export import TIFF_COMPRESSIONS, export

MAX_ADDED_BYTES = 300 << 20
GRAIN = np.random.default_rng(0).integers(0, 64, (512, 512, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", type=int, default=16384, metavar="SIDE_PX")
    parser.add_argument("--compression", choices=TIFF_COMPRESSIONS, default="deflate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engine-export-") as name:
        path = Path(name, "picture.tif")
        write(path, 1024, options.compression)
        before, started = process_memory("VmRSS"), time.monotonic()
        write(path, options.side, options.compression)
        seconds, added = time.monotonic() - started, process_memory("VmHWM") - before
        with tifffile.TiffFile(path) as file:
            last = file.pages[0].asarray()[-64:, -64:] if options.side <= 4096 else None
            levels = [level.shape for level in file.series[0].levels]
        assert last is None or np.array_equal(last, synthetic(Box(0, 0, options.side, options.side))[-64:, -64:])
        print(f"{options.side} px, {options.compression}: {path.stat().st_size / 2**20:.0f} MiB in {seconds:.0f} s")
        print(f"levels {', '.join(f'{shape[1]}x{shape[0]}' for shape in levels)}")
    print(f"added {added / 2**20:.1f} MiB (at most {MAX_ADDED_BYTES >> 20})")
    raise SystemExit(0 if added <= MAX_ADDED_BYTES else 1)


def write(path: Path, side_px: int, compression: str) -> None:
    sizes = [Size(side_px, side_px)]
    while sizes[-1].long_side > 512:
        sizes.append(sizes[-1].divided(2))
    export(
        lambda _, box: synthetic(box),
        level_sizes=sizes,
        channels=3,
        dtype="uint8",
        fmt="tiff",
        path=path,
        metadata=Metadata(),
        tiff_compression=compression,
    )


def synthetic(box: Box) -> np.ndarray:
    """A ramp with grain: codecs find something to do."""
    y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1]
    return ((y // 64 + x // 64) % 192).astype(np.uint8)[..., None] + GRAIN[y % 512, x % 512]


if __name__ == "__main__":
    main()
