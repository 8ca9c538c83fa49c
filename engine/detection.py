"""Where a picture is damaged, found by a network and written as a mask file that people may look at and edit.

The mask lies beside the outputs, `OUT/NAME.mask.png`, and says in its XMP packet which picture it was found in, and by
what. As long as it does, it is used again; a file that says something else is somebody's, and is left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import OutputExists
from engine.geometry import Box
from engine.guide import read_reflected
from engine.image import ImageInfo, Source, digest, to_rgb_float
from engine.isolate import decode_in_child, probe_in_child
from engine.mask import MASK_SUFFIX
from engine.metadata import Metadata
from engine.models.checkpoint import load_detector
from engine.staged import Pixels, RawFile
from engine.store import make_folders, storage_errors
from engine.tiling.export import export, partial_beside

TILE_PX = 512
_MISSING = 255
_OURS = b"CRA-SRGAN engine"
_XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmp:CreatorTool="{by}" dc:source="{of}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True, slots=True)
class Found:
    """A mask that is there."""

    path: Path
    share: float | None
    """Of the pixels that are missing; None where it was there before."""


class DamageDetector:
    """A loaded detector, for one picture after another."""

    def __init__(self, model: str = "detector", *, threshold: float | None = None) -> None:
        """threshold: of the probability, in place of the model's own."""
        self.card, self._network = load_detector(model)
        self._network = self._network.on(torch.device("cpu"))
        self.threshold = self._network.config.threshold if threshold is None else threshold

    def mask_of(self, info: ImageInfo, out: Path, name: str, *, replace: bool = False) -> Found:
        """Writes the mask of a picture as `out/<name>.mask.png`, or finds it written.

        replace: one that was found in another picture, or in another way; what people have made is never replaced.
        Raises OutputExists where another file is in its place, StorageError, and what decoding raises.
        """
        path = out / f"{name}{MASK_SUFFIX}"
        with storage_errors(out):
            make_folders(out)
        metadata = self._metadata(info)
        if path.exists():
            there = probe_in_child(path).metadata.xmp or b""
            if there == metadata.xmp:
                return Found(path, None)
            if _OURS not in there:
                raise OutputExists(f"{path}: 1 mask is there that was not found here; give it with --mask, or move it")
            if not replace:
                raise OutputExists(
                    f"{path}: 1 mask is there that was found in another picture, or with other settings; give it with "
                    "--mask, or add --replace"
                )
        missing_px = 0
        with partial_beside(path) as scratch:
            picture = decode_in_child(info, scratch)
            staged = RawFile(scratch / "found.raw", info.size, 1, "uint8")

            def strips() -> Iterator[bytes]:
                nonlocal missing_px
                for strip in self.strips(picture):
                    missing_px += int(np.count_nonzero(strip))
                    yield (strip.astype(np.uint8) * _MISSING).tobytes()

            staged.write(strips())

            def read(_level: int, box: Box) -> Pixels:
                return staged.read(box)

            export(read, level_sizes=[info.size], channels=1, dtype="uint8", fmt="png", path=path, metadata=metadata)
        return Found(path, missing_px / info.size.num_pixels)

    def strips(self, source: Source) -> Iterator[NDArray[np.bool_]]:
        """`(h, w)` rows of the whole picture from the top, True = damaged; the same whatever the tiles are."""
        return (strip >= self.threshold for strip in self.probabilities(source))

    def probabilities(self, source: Source, *, tile_px: int | None = None) -> Iterator[NDArray[np.float32]]:
        """`(h, w)` rows of the whole picture from the top: of damage, in [0, 1]."""
        size, side = source.size, tile_px or TILE_PX
        for y in range(0, size.h, side):
            tiles = (Box(y, x, y + side, x + side) for x in range(0, size.w, side))
            yield np.concatenate([self._tile(source, tile.intersection(Box.of(size))) for tile in tiles], axis=1)

    def _tile(self, source: Source, tile: Box) -> NDArray[np.float32]:
        """With its context; the picture's sides are made up to the network's grid by mirroring."""
        align = self._network.ALIGN_PX
        whole = Box.of(source.size).aligned(align)
        box = tile.grown(self._network.CONTEXT_PX).aligned(align).intersection(whole)
        pixels = to_rgb_float(read_reflected(source, box))
        given = torch.as_tensor(pixels).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
        probability = self._network.probability(given)[0, 0].numpy()
        return probability[tile.shifted(-box.y0, -box.x0).slices]

    def _metadata(self, info: ImageInfo) -> Metadata:
        page = "" if info.page is None else f" page {info.page}"
        by = f"{_OURS.decode()}, {self.card.name} {self.card.sha256}, threshold {self.threshold:g}"
        return Metadata(xmp=_XMP.format(by=by, of=f"sha256 {digest(info)}{page}").encode())
