"""Any region of the output, from fixed-shape tiles. The same code draws a shard, a box and a preview.

The picture is mirrored once at its borders; a tile reads its halo from that mirror and loses it again inside the
network, so where the tiles lie never changes a pixel (see tiling/DESIGN.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.geometry import Box, round_down
from engine.guide import Guide, overview, read_reflected, reflect, sample
from engine.image import Pixels, Source, from_rgb_float, to_rgb_float
from engine.mask import Mask
from engine.models.runner import Bools, Encoded, Floats, TorchRunner
from engine.residual import Detail

ALPHA_MARGIN_PX = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """Shapes of the network's inputs."""

    tile_px: int
    """Side of a tile without its halo, input pixels, a multiple of 8 and at least 64."""
    block_px: int
    """Side of what is enlarged at once, input pixels, at most `tile_px`."""
    batch: int
    """Tiles or blocks per call; short batches are filled up."""


class Renderer:
    """Draws regions of one restored picture at one scale."""

    def __init__(
        self,
        source: Source,
        mask: Mask,
        guide: Guide | None,
        detail: Detail | None,
        runner: TorchRunner,
        *,
        scale: int,
        tiling: Tiling,
    ) -> None:
        self._source, self._mask, self._guide, self._detail = source, mask, guide, detail
        self._runner = runner
        self._scale = scale
        self._levels = scale.bit_length() - 1
        self._tiling = tiling
        self._encoded: tuple[Box, Encoded] | None = None  # the last tile: neighbouring shards share it

    def draw(self, region: Box) -> Pixels:
        """The output pixels (h, w, c) that `region` of the input (input pixels, inside the picture) becomes."""
        return self._inpainted(region) if self._scale == 1 else self._enlarged(region)

    def overview(self) -> Pixels:
        """(h, w, c) The whole input, small, with its holes filled."""
        return overview(self._source, self._guide)

    def forget(self) -> None:
        """Drop the tile kept for the next shard."""
        self._encoded = None

    # Scale 1: holes are filled, known pixels are copied.

    def _inpainted(self, region: Box) -> Pixels:
        output = self._source.read(region)
        if not self._mask.any:
            return output
        missing = self._mask.read(region)
        tiles = [tile for tile in self._tiles(region) if self._touches(missing, region, tile)]
        for batch in _batches(tiles, self._tiling.batch):
            composites = self._composites(batch, 0)
            for tile, composite in zip(batch, composites, strict=True):
                part = tile.intersection(region)
                drawn = self._quantised(composite[part.shifted(-tile.y0, -tile.x0).slices], output, part, region)
                inner = part.shifted(-region.y0, -region.x0).slices
                output[inner] = np.where(missing[inner][..., None], drawn, output[inner])
        return output

    def _quantised(self, rgb: Floats, output: Pixels, part: Box, region: Box) -> Pixels:
        """Float pixels in the picture's own type; alpha stays what it was."""
        channels = self._source.channels
        colour = from_rgb_float(rgb, channels=1 if channels <= 2 else 3, dtype=self._source.dtype)
        if channels in (1, 3):
            return colour
        alpha = output[part.shifted(-region.y0, -region.x0).slices][..., -1:]
        return np.concatenate([colour, alpha], 2)

    @staticmethod
    def _touches(missing: Bools, region: Box, tile: Box) -> bool:
        return bool(missing[tile.intersection(region).shifted(-region.y0, -region.x0).slices].any())

    # Scales above 1.

    def _enlarged(self, region: Box) -> Pixels:
        s = self._scale
        output = np.empty((region.size.h * s, region.size.w * s, self._source.channels), self._source.dtype)
        for tile in self._tiles(region):
            part = tile.intersection(region)
            encoded = self._encode(tile)
            for batch in _batches(list(self._blocks(part, tile)), self._tiling.batch):
                for block, rgb in zip(batch, self._decode(encoded, tile, batch), strict=True):
                    inner = block.intersection(part)
                    drawn = rgb[inner.shifted(-block.y0, -block.x0).scaled(s).slices]
                    place = inner.shifted(-region.y0, -region.x0).scaled(s).slices
                    output[place] = self._with_alpha(drawn, inner)
        return output

    def _decode(self, encoded: Encoded, tile: Box, batch: Sequence[Box]) -> Floats:
        margin = self._runner.local.decode_margin_px(self._levels)
        places = [(block.y0 - tile.y0, block.x0 - tile.x0) for block in batch]
        return self._runner.decode(encoded, places, self._tiling.block_px + 2 * margin, self._levels)

    def _with_alpha(self, rgb: Floats, box: Box) -> Pixels:
        channels, dtype = self._source.channels, self._source.dtype
        if channels in (1, 3):
            return from_rgb_float(rgb, channels=channels, dtype=dtype)
        stored = read_reflected(self._source, box.grown(ALPHA_MARGIN_PX))[..., -1]
        plane = stored.astype(np.float32) / np.float32(np.iinfo(dtype).max)
        alpha = self._runner.enlarge_plane(plane, self._levels)
        return from_rgb_float(rgb, channels=channels, dtype=dtype, alpha=alpha)

    def _encode(self, tile: Box) -> Encoded:
        if self._encoded is None or self._encoded[0] != tile:
            self._encoded = None  # frees the last one first
            margin = self._runner.local.encode_margin_px(self._levels)
            composite = self._composites([tile], margin)[0]
            box = tile.grown(margin)
            guide = None if self._guide is None else self._hints(box)
            self._encoded = (tile, self._runner.encode(composite, self._missing(box), guide, self._levels))
        return self._encoded[1]

    # Both.

    def _tiles(self, region: Box) -> Iterator[Box]:
        """Tiles of the picture's own grid that meet the region, row by row; they may reach beyond the picture."""
        side = self._tiling.tile_px
        for y in range(round_down(region.y0, side), region.y1, side):
            for x in range(round_down(region.x0, side), region.x1, side):
                yield Box(y, x, y + side, x + side)

    def _blocks(self, part: Box, tile: Box) -> Iterator[Box]:
        """Blocks inside the tile that cover `part`; the last of a line is moved back into the tile."""
        side = self._tiling.block_px
        for y in range(part.y0, part.y1, side):
            for x in range(part.x0, part.x1, side):
                top, left = min(y, tile.y1 - side), min(x, tile.x1 - side)
                yield Box(top, left, top + side, left + side)

    def _composites(self, tiles: Sequence[Box], margin_px: int) -> Floats:
        """(B, H, W, 3) inpainted pictures of the tiles grown by `margin_px`."""
        context = margin_px + self._runner.local.head.margin_px
        boxes = [tile.grown(context) for tile in tiles]
        pixels = np.stack([to_rgb_float(read_reflected(self._source, box)) for box in boxes])
        missing = np.stack([self._missing(box) for box in boxes])
        if self._guide is None or not missing.any():
            inner = slice(context - margin_px, -(context - margin_px) or None)
            return pixels[:, inner, inner]
        hints = np.stack([self._hints(box) for box in boxes])
        base = np.stack([self._sampled(self._guide.fill, box) for box in boxes])
        detail = np.stack([self._details(box) for box in boxes])
        pixels[missing] = 0  # what lies under the mask must not leak
        return self._runner.inpaint(pixels, missing, base, detail, hints)

    def _missing(self, box: Box) -> Bools:
        if not self._mask.any:
            return np.zeros((box.size.h, box.size.w), bool)
        return np.asarray(read_reflected(self._mask, box), bool)

    def _hints(self, box: Box) -> Floats:
        assert self._guide is not None
        return self._sampled(self._guide.features, box)

    def _sampled(self, plane: Floats, box: Box) -> Floats:
        assert self._guide is not None
        size = self._source.size
        return sample(plane, self._guide.factor, reflect(box.y0, box.y1, size.h), reflect(box.x0, box.x1, size.w))

    def _details(self, box: Box) -> Floats:
        if self._detail is None:
            return np.zeros((box.size.h, box.size.w, 3), np.float32)
        size = self._source.size
        ys, xs = reflect(box.y0, box.y1, size.h), reflect(box.x0, box.x1, size.w)
        inner = Box(int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1)
        detail = self._detail.read(inner)[np.ix_(ys - inner.y0, xs - inner.x0)]
        detail[~self._missing(box)] = 0
        return detail


def _batches(items: Sequence[Box], size: int) -> Iterator[list[Box]]:
    """Lists of exactly `size` items: the last repeats its last item, so that every call has the same shape."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))
