"""Is this installation able to do its work?"""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from engine.detection import DamageDetector
from engine.errors import EngineError
from engine.geometry import Box
from engine.image import ArrayPicture
from engine.mask import no_mask
from engine.models.card import embedded, read_card
from engine.models.checkpoint import load
from engine.models.runner import TorchRunner
from engine.render import Renderer, Tiling

LIBRARIES = ("torch", "numpy", "zarr", "dask", "opencv-python", "pyvips", "tifffile", "safetensors")


def diagnose() -> Iterator[tuple[str, bool]]:
    """Findings, each with whether it is as it should be."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free_bytes = shutil.disk_usage(".").free
    yield f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} processors", True
    yield f"{memory_bytes / 2**30:.1f} GiB of memory", memory_bytes >= 2 << 30
    yield f"{free_bytes / 2**30:.1f} GiB free on this disk", free_bytes >= 1 << 30
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}", True
        except PackageNotFoundError:
            yield f"{name} is not installed", False
    models = embedded()
    yield f"{len(models)} embedded models: {', '.join(models) or 'none'}", bool(models)
    for name in models:
        try:
            detects = read_card(models[name]).task == "detect"
            same = _detected_tile_equals_whole(name) if detects else _tile_equals_whole(name)
            yield f"{name}: a tile {'equals' if same else 'DIFFERS FROM'} the same pixels of the whole", same
        except EngineError as error:
            yield f"{name}: {error}", False


def _detected_tile_equals_whole(model: str) -> bool:
    """What is found in a small picture in one tile and in four."""
    detector = DamageDetector(model)
    source = ArrayPicture(np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8))
    whole, tiled = (np.concatenate([*detector.probabilities(source, tile_px=side)]) for side in (128, 64))
    return bool(np.array_equal(whole, tiled))


def _tile_equals_whole(model: str) -> bool:
    """x4 of a small picture in one tile and in four."""
    runner = TorchRunner(load(model), precision="fp32", threads=os.cpu_count() or 1)
    source = ArrayPicture(np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8))
    whole, tiled = (
        Renderer(source, no_mask(source.size), None, None, runner, scale=4, tiling=Tiling(side, 64, 1)).draw(
            Box.of(source.size)
        )
        for side in (128, 64)
    )
    return bool(np.array_equal(whole, tiled))
