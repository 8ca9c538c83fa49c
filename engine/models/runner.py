"""Runs a generator on fixed-shape batches: NumPy in, NumPy or tensors out.

Legend: B batch, H and W pixels; pictures (B, H, W, 3) float32 in [0, 1], masks (B, H, W) bool, guides (B, H, W, G).

Convolutions run channels-last: in that layout, and for inputs of at least 32 px a side, their result per pixel does
not depend on the input's size, which exact tiles need (tested).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.memory import keep_freed_memory
from engine.models.checkpoint import Checkpoint
from engine.models.cra_srgan.attention import AttentionRows
from engine.models.cra_srgan.guide import harmonic_fill
from engine.models.cra_srgan.handover import balanced
from engine.models.cra_srgan.local import LocalHalf

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

GLOBAL_THREADS = 2
"""Of the global half, whatever the machine has: it cuts its sums by their number; the local half does not (tested)."""


@contextmanager
def _global_threads() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(GLOBAL_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tile at the input's resolution, with the margin that `decode` wants around it."""

    features: Tensor
    """(1, C, H, W)"""
    picture: Tensor
    """(1, 3, H, W)"""


class TorchRunner:
    """The generator in torch, on one device, with one precision and a fixed number of threads."""

    def __init__(self, checkpoint: Checkpoint, *, precision: str, threads: int, device: str = "cpu") -> None:
        self.card = checkpoint.card
        self._device = torch.device(device)
        self._network = checkpoint.network.on(self._device)
        self._dtype = PRECISIONS[precision]
        torch.set_num_threads(threads)
        keep_freed_memory()

    @property
    def local(self) -> LocalHalf:
        """The part that sees tiles: it knows its margins."""
        return self._network.local

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _tensor(self, array: Floats | Bools) -> Tensor:
        """(B, H, W, C) or (B, H, W) → (B, C, H, W) float32, channels-last."""
        array = array if array.ndim == 4 else array[..., None]
        moved = torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32)).permute(0, 3, 1, 2)
        return moved.to(self._device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def global_pass(self, known_mean: Floats, share: Floats, variance: Floats) -> tuple[Floats, Floats, AttentionRows]:
        """(h, w, 3), (h, w) and (h, w) at guide size → fill (h, w, 3), features (h, w, G), balanced rows."""
        with _global_threads():
            found = self._network.guide(self._tensor(known_mean[None]), self._tensor(share[None]))
            rows = balanced(found.rows[0], self._tensor(variance[None]), self._tensor(share[None]), harmonic_fill)
        fill, features = (part[0].permute(1, 2, 0).float().cpu().numpy() for part in (found.fill, found.features))
        return np.ascontiguousarray(fill), np.ascontiguousarray(features), rows

    @torch.inference_mode()
    def inpaint(self, pixels: Floats, missing: Bools, base: Floats, detail: Floats, guide: Floats) -> Floats:
        """Tiles with the margin of the scale-1 head → composites (B, H, W, 3) without it."""
        with self._autocast():
            parts = (self._tensor(part) for part in (pixels, missing, base, detail, guide))
            composite = self._network.local.head(*parts)
        return composite.float().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def encode(self, composite: Floats, missing: Bools, guide: Floats | None, levels: int) -> Encoded:
        """One tile (H, W, 3) with the margin `encode` wants; no guide takes the learned null."""
        picture, mask = self._tensor(composite[None]), self._tensor(missing[None])
        if guide is None:
            hints = self._network.local.null_guide.expand(1, -1, *picture.shape[-2:])
            hints = hints.contiguous(memory_format=torch.channels_last)
        else:
            hints = self._tensor(guide[None])
        with self._autocast():
            features, picture = self._network.local.encode(picture, mask, hints, levels)
        return Encoded(features.contiguous(memory_format=torch.channels_last), picture)

    @torch.inference_mode()
    def decode(self, encoded: Encoded, places: list[tuple[int, int]], side_px: int, levels: int) -> Floats:
        """Blocks of `side_px` input pixels, margin included, at (y, x) in the encoded tile → (B, S, S, 3)."""
        features, pictures = (
            torch.cat([part[..., y : y + side_px, x : x + side_px] for y, x in places]).contiguous(
                memory_format=torch.channels_last
            )
            for part in (encoded.features, encoded.picture)
        )
        with self._autocast():
            output = self._network.local.decode(features, pictures, levels)[-1]
        return output.float().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def enlarge_plane(self, plane: Floats, levels: int) -> Floats:
        """Bicubic enlargement of (H, W) with a margin of 4 px → (2 ** levels * (H - 8), ...) without margin."""
        grown = self._tensor(np.repeat(plane[None, ..., None], 3, axis=3))
        for level in range(levels):
            grown = self._network.local.stage(level).up(grown)  # margin 4 → 2 * (4 - 2) = 4
        return grown[0, 0, 4:-4, 4:-4].cpu().numpy()
