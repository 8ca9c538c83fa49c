"""The local half: bounded context, so that a tile equals the same pixels of the whole.

Legend: B batch, H and W pixels of the input's grid; pictures are (B, 3, H, W) in [0, 1]; `missing` is (B, 1, H, W)
with 1 where a pixel is missing. Nothing here pools, normalises or takes a maximum over a tile.

A tensor carries a margin around the pixels that are wanted, and each layer consumes some of it. Margins are exact:
what a later layer will not need is cropped before it is computed (staged valid crop).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import ceil_div, round_up
from engine.models.cra_srgan.attention import CrossModalFusion, EdgeAware, FrequencyDecomposition
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.layers import (
    BicubicDown,
    BicubicUp,
    Conv,
    Padding,
    ResidualGroup,
    centre,
    crop,
    zero_,
)


class InpaintHead(nn.Module):
    """The scale-1 output: refines the fill at the picture's own resolution, inside holes only."""

    def __init__(self, config: Config, *, padding: Padding) -> None:
        super().__init__()
        inputs = 3 + 1 + 3 + 1 + config.guide_channels
        self.enter = Conv(inputs, config.head_channels, padding=padding)
        self.blocks = ResidualGroup(config.head_channels, config.head_blocks, padding=padding)
        self.leave = zero_(Conv(config.head_channels, 3, padding=padding))
        self.margin_px = self.enter.margin_px + self.blocks.margin_px + self.leave.margin_px

    def forward(self, pixels: Tensor, missing: Tensor, base: Tensor, detail: Tensor, guide: Tensor) -> Tensor:
        """The composite picture: known pixels as they came, missing ones restored.

        base: the guide's fill, enlarged; detail: the aggregated residual, already weighted; guide: (B, G, H, W).
        """
        filled = base + detail
        composite = torch.where(missing > 0, filled, pixels)
        ratio = guide[:, -1:]
        features = self.enter(torch.cat([composite, missing, detail, ratio, guide[:, :-1]], 1))
        residual = self.leave(self.blocks(F.relu(features)))
        return torch.where(centre(missing, residual) > 0, centre(filled, residual) + residual, centre(pixels, residual))


class Trunk(nn.Module):
    """Features of the composite at the input's resolution: residual blocks without batch normalisation."""

    def __init__(self, config: Config, *, padding: Padding) -> None:
        super().__init__()
        self.enter = Conv(4, config.trunk_channels, padding=padding)
        self.blocks = ResidualGroup(config.trunk_channels, config.trunk_blocks, padding=padding)
        self.leave = Conv(config.trunk_channels, config.trunk_channels, padding=padding)
        self.margin_px = self.enter.margin_px + self.blocks.margin_px + self.leave.margin_px

    def forward(self, composite: Tensor, missing: Tensor) -> Tensor:
        shallow = self.enter(torch.cat([composite - 0.5, missing], 1))
        deep = self.leave(self.blocks(shallow))
        return centre(shallow, deep) + deep


class SuperResolutionStage(nn.Module):
    """One x2 step: a residual over a bicubic base, then back-projection so that colour stays (report, 2.2.2).

    Back-projection (Irani and Peleg 1991) adds the enlarged difference between the stage's input and its reduced
    output, which holds the low frequencies.
    """

    def __init__(self, channels: int, next_channels: int, blocks: int, *, padding: Padding) -> None:
        super().__init__()
        self.blocks = ResidualGroup(channels, blocks, padding=padding)
        self.to_rgb = zero_(Conv(channels, 12, padding=padding))
        self.grow = Conv(channels, 4 * next_channels, padding=padding) if next_channels else None
        self.up = BicubicUp(padding=padding)
        self.down = BicubicDown(padding=padding)

    def input_margin_px(self, output_margin_px: int) -> int:
        """Pixels needed around the input for `output_margin_px` pixels around the output."""
        _, enlarged_px = self._projection_margins(output_margin_px)
        return self.blocks.margin_px + self.to_rgb.margin_px + ceil_div(enlarged_px, 2)

    def _projection_margins(self, output_margin_px: int) -> tuple[int, int]:
        """Margins of the difference (input grid) and of the estimate it is taken from (output grid)."""
        difference_px = ceil_div(output_margin_px, 2) + self.up.margin_px
        return difference_px, 2 * difference_px + self.down.margin_px

    def forward(self, features: Tensor, picture: Tensor, margin_px: int) -> tuple[Tensor, Tensor]:
        """Deepened features at the input's size, and the picture of twice the size with `margin_px` around it.

        Both inputs carry `input_margin_px(margin_px)`; the features returned have lost the blocks' margin.
        """
        difference_px, enlarged_px = self._projection_margins(margin_px)
        have_px = self.input_margin_px(margin_px)
        deep = self.blocks(features)
        residual = F.pixel_shuffle(self.to_rgb(deep).float(), 2)
        residual_px = 2 * (have_px - self.blocks.margin_px - self.to_rgb.margin_px)
        base_px = ceil_div(enlarged_px, 2)
        base = self.up(crop(picture, have_px - base_px - self.up.margin_px))
        estimate = crop(base, 2 * base_px - enlarged_px) + crop(residual, residual_px - enlarged_px)
        difference = crop(picture, have_px - difference_px) - self.down(estimate)
        correction_px = 2 * (difference_px - self.up.margin_px)
        corrected = crop(estimate, enlarged_px - margin_px) + crop(self.up(difference), correction_px - margin_px)
        return deep, corrected

    def enlarge(self, deep: Tensor, margin_px: int) -> Tensor:
        """The next stage's features, from those that `forward` returned, with the same `margin_px`."""
        assert self.grow is not None
        have_px = self.input_margin_px(margin_px) - self.blocks.margin_px
        grow_px = ceil_div(margin_px, 2) + self.grow.margin_px
        grown = F.relu(F.pixel_shuffle(self.grow(crop(deep, have_px - grow_px)), 2))
        return crop(grown, 2 * (grow_px - self.grow.margin_px) - margin_px)


class LocalHalf(nn.Module):
    """(pixels, mask, fill, detail, guide features) of a tile → the tile, restored and enlarged."""

    def __init__(self, config: Config, *, padding: Padding) -> None:
        super().__init__()
        channels = config.trunk_channels
        self.null_guide = nn.Parameter(torch.zeros(1, config.guide_channels + 1, 1, 1))
        self.head = InpaintHead(config, padding=padding)
        self.trunk = Trunk(config, padding=padding)
        self.fusion = (
            CrossModalFusion(channels, config.guide_channels + 1, heads=config.heads) if config.fusion else SkipFusion()
        )
        self.edge = EdgeAware(channels, padding=padding) if config.edge else Skip()
        self.frequency = FrequencyDecomposition(channels, padding=padding) if config.frequency else Skip()
        widths = (*config.stage_channels, 0)
        self.adapt = nn.Conv2d(channels, widths[0], 1)
        self.stages = nn.ModuleList(
            SuperResolutionStage(widths[i], widths[i + 1], config.stage_blocks[i], padding=padding)
            for i in range(len(config.stage_channels))
        )
        self.padding: Padding = padding

    def stage(self, index: int) -> SuperResolutionStage:
        stage = self.stages[index]
        assert isinstance(stage, SuperResolutionStage)
        return stage

    def output_margins_px(self, levels: int) -> list[int]:
        """Margin after each of `levels` stages; the first entry is what `decode` wants around its input."""
        margins = [0]
        for index in reversed(range(levels)):
            margins.insert(0, self.stage(index).input_margin_px(margins[0]))
        return margins

    def fusion_margin_px(self, levels: int) -> int:
        """Margin at the windowed attention: what follows needs, rounded up to whole windows."""
        needed = self.output_margins_px(levels)[0] + self.frequency.margin_px + self.edge.margin_px
        return round_up(needed, CrossModalFusion.WINDOW_PX)

    def context_px(self, levels: int) -> int:
        """Input pixels around a tile that its output depends on, for an output enlarged by 2 ** levels."""
        if levels == 0:
            return self.head.margin_px
        return self.head.margin_px + self.encode_margin_px(levels)

    def encode_margin_px(self, levels: int) -> int:
        """Margin of the composite that `encode` wants, at least one level."""
        return self.trunk.margin_px + self.fusion_margin_px(levels)

    def encode(self, composite: Tensor, missing: Tensor, guide: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Features and picture at the input's resolution, with the margin `decode` wants.

        The three inputs carry `encode_margin_px(levels)`.
        """
        features = self.trunk(composite, missing)
        features = self.fusion(features, centre(guide, features))
        features = self.edge(features, centre(composite, features).to(features.dtype))
        features = self.adapt(self.frequency(features))
        surplus = 0 if self.padding == "same" else self._encode_surplus_px(levels)
        features = crop(features, surplus)
        return features, centre(composite, features)

    def _encode_surplus_px(self, levels: int) -> int:
        left = self.fusion_margin_px(levels) - self.edge.margin_px - self.frequency.margin_px
        return left - self.output_margins_px(levels)[0]

    def decode(self, features: Tensor, picture: Tensor, levels: int) -> list[Tensor]:
        """The picture at x2, x4 ... x(2 ** levels); only the last is free of margin."""
        margins = self.output_margins_px(levels)
        pictures: list[Tensor] = []
        for index in range(levels):
            stage, margin_px = self.stage(index), margins[index + 1]
            deep, picture = stage(features, picture, margin_px)
            pictures.append(picture)
            if index + 1 < levels:
                features = stage.enlarge(deep, margin_px)
        return pictures


class Skip(nn.Module):
    """Stands in for an ablated module: same shapes, nothing done."""

    margin_px = 0

    def forward(self, features: Tensor, _picture: Tensor | None = None) -> Tensor:
        return features


class SkipFusion(Skip):
    """Stands in for the fusion."""
