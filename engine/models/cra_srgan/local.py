"""The local half: bounded context, so that a tile equals the same pixels of the whole.

Legend: B batch, H and W pixels of the input's grid; pictures are (B, 3, H, W) in [0, 1]; `missing` is (B, 1, H, W)
with 1 where a pixel is missing. Nothing here pools, normalises or takes a maximum over a tile.

A tensor carries a margin around the pixels that are wanted, and each layer consumes some of it. Margins are exact:
what a later layer will not need is cropped before it is computed (staged valid crop).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.geometry import ceil_div, round_up
from engine.models.cra_srgan.attention import CrossModalFusion, EdgeAware, FrequencyDecomposition
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.layers import (
    RESIDUAL_UNIT,
    BicubicDown,
    BicubicUp,
    Conv,
    Padding,
    ResidualGroup,
    SubPixelConv,
    centre,
    centred,
    crop,
    space_to_depth,
    zero_,
)


class InpaintHead(nn.Module):
    """The scale-1 output: refines the fill at the picture's own resolution, inside holes only.

    It works on blocks of pixels (Zhang et al. 2018, FFDNet, section III), dilated in the middle, so that it sees both
    sides of a wide scratch. The aggregated residual is added behind the network, which does not see it: a distortion
    loss would teach it to take borrowed texture away again.
    """

    def __init__(self, config: Config, *, padding: Padding) -> None:
        super().__init__()
        inputs = 3 + 1 + 1 + config.guide_channels
        leave = SubPixelConv if config.head_cell_px == 2 else Conv
        self.cell_px = config.head_cell_px
        self.enter = Conv(self.cell_px**2 * inputs, config.head_channels, padding=padding)
        self.blocks = ResidualGroup(config.head_channels, config.head_dilations, padding=padding)
        self.leave = zero_(leave(config.head_channels, 3, padding=padding))
        self.margin_px = self.cell_px * (self.enter.margin_px + self.blocks.margin_px + self.leave.margin_px)
        self.reach_px = self.cell_px * (2 + sum(1 + dilation for dilation in config.head_dilations))
        """As far it looks, whatever the padding."""

    def forward(self, pixels: Tensor, missing: Tensor, base: Tensor, detail: Tensor, guide: Tensor) -> Tensor:
        """The composite picture: known pixels as they came, missing ones restored.

        base: the guide's fill, enlarged; detail: the aggregated residual, already weighted; guide: (B, G, H, W).
        H and W are whole blocks, which lie on the picture's own grid of them.
        """
        composite = torch.where(missing > 0, base, pixels)
        shown = composite if self.cell_px == 1 else centred(composite)
        seen = torch.cat([shown, missing, guide[:, -1:], guide[:, :-1]], 1)
        features = self.enter(seen if self.cell_px == 1 else space_to_depth(seen))
        residual = self.leave(self.blocks(F.relu(features))).float()
        residual = residual if self.cell_px == 1 else RESIDUAL_UNIT * residual
        filled = centre(base, residual) + centre(detail, residual) + residual
        return torch.where(centre(missing, residual) > 0, filled, centre(pixels, residual))


class Trunk(nn.Module):
    """Features of the composite at the input's resolution: residual blocks without batch normalisation."""

    def __init__(self, config: Config, *, padding: Padding) -> None:
        super().__init__()
        self.enter = Conv(4, config.trunk_channels, padding=padding)
        self.blocks = ResidualGroup(config.trunk_channels, (1,) * config.trunk_blocks, padding=padding)
        self.leave = Conv(config.trunk_channels, config.trunk_channels, padding=padding)
        self.margin_px = self.enter.margin_px + self.blocks.margin_px + self.leave.margin_px

    def forward(self, composite: Tensor, missing: Tensor) -> Tensor:
        shallow = self.enter(torch.cat([composite - 0.5, missing], 1))
        deep = self.leave(self.blocks(shallow))
        return centre(shallow, deep) + deep


@dataclass(frozen=True, slots=True)
class Margins:
    """Pixels that the two inputs of a stage carry around what is wanted, on the stage's own grid."""

    features_px: int
    picture_px: int


class SuperResolutionStage(nn.Module):
    """One x2 step: a residual over a bicubic base, then back-projection so that colour stays (report, 2.2.2).

    Back-projection (Irani and Peleg 1991) adds the enlarged difference between the stage's input and its reduced
    output, which holds the low frequencies.
    """

    def __init__(self, channels: int, next_channels: int, blocks: int, *, padding: Padding) -> None:
        super().__init__()
        self.blocks = ResidualGroup(channels, (1,) * blocks, padding=padding)
        self.to_rgb = zero_(SubPixelConv(channels, 3, padding=padding))
        self.grow = SubPixelConv(channels, next_channels, padding=padding) if next_channels else None
        self.up = BicubicUp(padding=padding)
        self.down = BicubicDown(padding=padding)

    def input_margins(self, output: Margins) -> Margins:
        """What the stage's inputs carry so that its outputs carry `output`."""
        _, enlarged_px = self._projection_margins(output.picture_px)
        grow_px = ceil_div(output.features_px, 2) + self.grow.margin_px if self.grow is not None else 0
        deep_px = max(ceil_div(enlarged_px, 2) + self.to_rgb.margin_px, grow_px)
        return Margins(self.blocks.margin_px + deep_px, enlarged_px // 2 + self.up.margin_px)

    def _projection_margins(self, picture_px: int) -> tuple[int, int]:
        """Margins of the difference (input grid) and of the estimate it is taken from (output grid)."""
        difference_px = picture_px // 2 + self.up.margin_px
        return difference_px, 2 * difference_px + self.down.margin_px

    def _enlarged(self, picture: Tensor, margin_px: int) -> Tensor:
        """Twice the size with `margin_px` around it, from a picture with `margin_px // 2 + up.margin_px`.

        An odd margin ends on an odd pixel, which looks one input pixel less far than its even neighbour does: zeros
        stand where the kernel is zero.
        """
        if margin_px % 2 == 0:
            return self.up(picture)
        return crop(self.up(F.pad(picture, (1, 1, 1, 1))), 1)

    def forward(self, features: Tensor, picture: Tensor, output: Margins) -> tuple[Tensor, Tensor]:
        """Deepened features at the input's size, and the picture of twice the size with its margin of `output`.

        The inputs carry `input_margins(output)`; the features returned have lost the blocks' margin.
        """
        difference_px, enlarged_px = self._projection_margins(output.picture_px)
        have = self.input_margins(output)
        deep = self.blocks(features)
        residual = self.to_rgb(deep).float()
        residual_px = 2 * (have.features_px - self.blocks.margin_px - self.to_rgb.margin_px)
        estimate = self._enlarged(picture, enlarged_px) + crop(residual, residual_px - enlarged_px)
        difference = crop(picture, have.picture_px - difference_px) - self.down(estimate)
        correction = self._enlarged(difference, output.picture_px)
        return deep, crop(estimate, enlarged_px - output.picture_px) + correction

    def enlarge(self, deep: Tensor, output: Margins) -> Tensor:
        """The next stage's features, from those that `forward` returned, with their margin of `output`."""
        assert self.grow is not None
        have_px = self.input_margins(output).features_px - self.blocks.margin_px
        grow_px = ceil_div(output.features_px, 2) + self.grow.margin_px
        grown = F.relu(self.grow(crop(deep, have_px - grow_px)))
        return crop(grown, 2 * (grow_px - self.grow.margin_px) - output.features_px)


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
        self.clean = zero_(nn.Conv2d(widths[0], 3, 1)) if config.clean else None
        self.stages = nn.ModuleList(
            SuperResolutionStage(widths[i], widths[i + 1], config.stage_blocks[i], padding=padding)
            for i in range(len(config.stage_channels))
        )
        self.padding: Padding = padding

    def stage(self, index: int) -> SuperResolutionStage:
        stage = self.stages[index]
        assert isinstance(stage, SuperResolutionStage)
        return stage

    def stage_margins(self, levels: int) -> list[Margins]:
        """Margins before each of `levels` stages, and the empty ones behind the last."""
        margins = [Margins(0, 0)]
        for index in reversed(range(levels)):
            margins.insert(0, self.stage(index).input_margins(margins[0]))
        return margins

    def decode_margin_px(self, levels: int) -> int:
        """Margin that `decode` wants around both its inputs."""
        first = self.stage_margins(levels)[0]
        return max(first.features_px, first.picture_px)

    def fusion_margin_px(self, levels: int) -> int:
        """Margin at the windowed attention: what follows needs, rounded up to whole windows."""
        needed = self.decode_margin_px(levels) + self.frequency.margin_px + self.edge.margin_px
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
        edges_px = self.trunk.margin_px - (self.edge.picture_margin_px - self.edge.margin_px)
        features = self.edge(features, crop(composite, edges_px).to(features.dtype))
        features = self.adapt(self.frequency(features))
        surplus = 0 if self.padding == "same" else self._encode_surplus_px(levels)
        features = crop(features, surplus)
        picture = centre(composite, features)
        return features, picture if self.clean is None else picture + self.clean(features).to(picture.dtype)

    def _encode_surplus_px(self, levels: int) -> int:
        left = self.fusion_margin_px(levels) - self.edge.margin_px - self.frequency.margin_px
        return left - self.decode_margin_px(levels)

    def decode(self, features: Tensor, picture: Tensor, levels: int) -> list[Tensor]:
        """The picture at x2, x4 ... x(2 ** levels); only the last is free of margin."""
        margins = self.stage_margins(levels)
        have_px = self.decode_margin_px(levels)
        features, picture = (
            crop(features, have_px - margins[0].features_px),
            crop(picture, have_px - margins[0].picture_px),
        )
        pictures: list[Tensor] = []
        for index in range(levels):
            stage, output = self.stage(index), margins[index + 1]
            deep, picture = stage(features, picture, output)
            pictures.append(picture)
            if index + 1 < levels:
                features = stage.enlarge(deep, output)
        return pictures


class Skip(nn.Module):
    """Stands in for an ablated module: same shapes, nothing done."""

    margin_px = 0
    picture_margin_px = 0

    def forward(self, features: Tensor, _picture: Tensor | None = None) -> Tensor:
        return features


class SkipFusion(Skip):
    """Stands in for the fusion."""
