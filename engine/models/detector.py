"""Where a picture is damaged: a small encoder and decoder of bounded context, at the picture's own resolution.

A U-Net (Ronneberger et al. 2015) whose skips are added, on four grids of 2, 4, 8 and 16 px. Nothing in it looks at a
whole tile, so that a tile with `CONTEXT_PX` around it equals the same pixels of the whole.

Legend: B batch, H and W pixels; pictures are (B, 3, H, W) in [0, 1], H and W multiples of 16.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.cra_srgan.layers import Conv, Network, ResidualBlock, ResidualGroup, SubPixelConv
from engine.models.detector_config import DetectorConfig

_QUIET = 0.2
_RARE = -3.0
"""The logit of the share of pixels that are damaged: rare things must not cost most at first (Lin et al. 2017, 4.1)."""


class Detector(Network):
    """A logit of damage for each pixel."""

    NAME, TASK, SCALES = "detector", "detect", (1,)
    ALIGN_PX = 16
    CONTEXT_PX = 112

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        self.enter = Conv(12, widths[0], padding="same")
        self.seen = nn.ModuleList(ResidualGroup(width, (1,), padding="same") for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(widths))
        self.told = nn.ModuleList(ResidualGroup(width, (1,), padding="same") for width in widths[:-1])
        self.leave = SubPixelConv(widths[0], 1, padding="same")
        self._begin()

    def _begin(self) -> None:
        """Weights that keep signals as loud as they are (He et al. 2015), quiet branches, little damage at first."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
                across = layer.weight.shape[0] if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
                nn.init.normal_(layer.weight, 0, (2 / across) ** 0.5)
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, ResidualBlock):
                    layer.second.weight.mul_(_QUIET)
            self.leave.weight.mul_(_QUIET)
        assert self.leave.bias is not None
        nn.init.constant_(self.leave.bias, _RARE)

    def context_px(self, scale: int) -> int:
        """Input pixels around a tile that its output depends on, rounded up to the grid."""
        del scale
        return self.CONTEXT_PX

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 1, H, W) logits."""
        x = self.enter(F.pixel_unshuffle(picture - 0.5, 2))
        skips: list[Tensor] = []
        for seen, down in zip(self.seen, [*self.down, None], strict=True):
            x = seen(x)
            if down is not None:
                skips.append(x)
                x = F.relu(down(x))
        for up, told, skip in reversed(list(zip(self.up, self.told, skips, strict=True))):
            x = told(skip + up(x))
        return self.leave(x)

    @torch.inference_mode()
    def probability(self, picture: Tensor) -> Tensor:
        """(B, 1, H, W) of damage, in [0, 1]."""
        return torch.sigmoid(self(picture))
