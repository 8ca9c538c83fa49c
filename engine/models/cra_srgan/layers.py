"""Building blocks of the generator, each of which knows how many pixels it consumes.

Legend: B batch, C channels, H and W pixels at the layer's own resolution. Every tensor is (B, C, H, W) float.

Padding is chosen when a network is built. `"valid"` layers consume a margin of their input on each side: that is how
tiles become exact. `"same"` layers pad and consume none: that is how crops are trained cheaply. Both hold the same
parameters. `margin_px` is the number of pixels a layer consumes per side, so a network's context is a sum over layers.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

Padding = Literal["valid", "same"]
Layer = TypeVar("Layer", bound=nn.Conv2d)
Made = TypeVar("Made")

RESIDUAL_UNIT = 0.1
"""What a network's output of 1 adds to the fill: a usual error. In units of the whole range, the first steps of
training overshoot so far that the networks learn to be silent."""


def crop(x: Tensor, margin_px: int) -> Tensor:
    """`x` without `margin_px` pixels on each of its four sides."""
    if margin_px == 0:
        return x
    return x[..., margin_px:-margin_px, margin_px:-margin_px]


def edge_padded(x: Tensor, pad_px: int) -> Tensor:
    """`x` with its outermost pixels repeated `pad_px` times; free of cost where there is nothing to pad."""
    return F.pad(x, (pad_px,) * 4, mode="replicate") if pad_px else x


def centre(x: Tensor, like: Tensor) -> Tensor:
    """The middle of `x`, as large as `like`."""
    return crop(x, (x.shape[-1] - like.shape[-1]) // 2)


class Network(nn.Module):
    """What is trained and stored as a whole."""

    def on(self, device: torch.device) -> Self:
        """This network itself, moved to a device and laid out channels-last."""
        self.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return self


class Conv(nn.Conv2d):
    """A convolution that states the margin it consumes."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, *, padding: Padding, dilation: int = 1, groups: int = 1
    ) -> None:
        reach = dilation * (size // 2)
        pad = reach if padding == "same" else 0
        super().__init__(inputs, outputs, size, padding=pad, dilation=dilation, groups=groups)  # pyright: ignore[reportUnknownMemberType]
        self.margin_px = reach - pad


class SubPixelConv(Conv):
    """A convolution to twice the size (Shi et al. 2016, section 3): F.pixel_shuffle(convolution(x), 2), and faster."""

    def __init__(self, inputs: int, outputs: int, *, padding: Padding) -> None:
        super().__init__(inputs, 4 * outputs, padding=padding)

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = (
            part.reshape(-1, 4, *part.shape[1:]).transpose(0, 1).reshape(part.shape)
            for part in (self.weight, self.bias)
        )
        return depth_to_space(F.conv2d(input, weight, bias, padding=self.padding))


def depth_to_space(x: Tensor) -> Tensor:
    """(B, 4 * C, H, W) to (B, C, 2 * H, 2 * W), the C channels of each of the four pixels together.

    Of channels-last tensors this moves 2 * C values at a time, where `F.pixel_shuffle`, whose four pixels of a channel
    are together, moves single ones.
    """
    b, _, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(b, h, w, 2, -1).transpose(2, 3)
    return rows.reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


def space_to_depth(x: Tensor) -> Tensor:
    """(B, C, 2 * H, 2 * W) to (B, 4 * C, H, W): the inverse of `depth_to_space`."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2 * c).transpose(2, 3)
    return rows.reshape(b, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


def centred(picture: Tensor) -> Tensor:
    """Of about unit variance."""
    return 4 * (picture - 0.5)


def zero_(layer: Layer) -> Layer:
    """`layer` with all parameters zero: a branch that starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two convolutions without batch normalisation (Lim et al. 2017, EDSR, section 3.1)."""

    def __init__(self, channels: int, *, padding: Padding, dilation: int = 1) -> None:
        super().__init__()
        self.first = Conv(channels, channels, padding=padding, dilation=dilation)
        self.second = Conv(channels, channels, padding=padding)
        self.margin_px = self.first.margin_px + self.second.margin_px

    def forward(self, x: Tensor) -> Tensor:
        return crop(x, self.margin_px) + self.second(F.relu(self.first(x), inplace=True))


class Recomputing:
    """What can be trained with less memory and more time: gradient checkpointing (Chen et al. 2016)."""

    recompute = False
    """Whether of parts only what goes in is kept for the way back, and the rest made again."""

    def part(self, function: Callable[..., Made], *inputs: Tensor) -> Made:
        """What a part makes of its inputs."""
        if self.recompute and torch.is_grad_enabled():
            return cast("Made", checkpoint(function, *inputs, use_reentrant=False))
        return function(*inputs)


class ResidualGroup(Recomputing, nn.Sequential):
    """Residual blocks in a row, one for each dilation."""

    def __init__(self, channels: int, dilations: Sequence[int], *, padding: Padding) -> None:
        layers = [ResidualBlock(channels, padding=padding, dilation=dilation) for dilation in dilations]
        super().__init__(*layers)
        self.margin_px = sum(layer.margin_px for layer in layers)

    def forward(self, input: Tensor) -> Tensor:
        return self.part(cast("Callable[[Tensor], Tensor]", super().forward), input)  # pyright: ignore[reportUnknownMemberType]


class GatedConv(nn.Module):
    """A convolution whose output is weighted by a learned soft mask (Yu et al. 2019, section 3.1)."""

    FEATURE_GAIN = 2.6
    """Keeps the variance through ELU and a gate of one half; torch's default would halve it twice in every layer."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, 3, stride=stride, padding=dilation, dilation=dilation)
        feature, gate = self.conv.weight.detach().chunk(2)
        nn.init.normal_(feature, std=self.FEATURE_GAIN * (9 * inputs) ** -0.5)
        nn.init.normal_(gate, std=(9 * inputs) ** -0.5)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        feature, gate = (half.clone() for half in self.conv(x).chunk(2, dim=1))  # dense: four times as fast on CPUs
        return F.elu(feature) * torch.sigmoid(gate)


class GatedResidual(nn.Module):
    """A gated convolution beside an identity."""

    def __init__(self, channels: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.branch = GatedConv(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.branch(x)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 (Keys 1981), the one of MATLAB's imresize."""
    d = distance.abs()
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _per_channel(kernels: Tensor, channels: int) -> Tensor:
    """(K, h, w) kernels as a dense (K * channels, channels, h, w) weight that never mixes channels.

    Dense, because few-channel grouped convolutions are slower than the zeros they save.
    """
    count, height, width = kernels.shape
    weight = torch.zeros(count, channels, channels, height, width, dtype=kernels.dtype)
    for channel in range(channels):
        weight[:, channel, channel] = kernels
    return weight.reshape(count * channels, channels, height, width)


class BicubicUp(nn.Module):
    """Bicubic enlargement by 2; equal to `interpolate(mode="bicubic", antialias=True)` away from the border."""

    weight: Tensor

    def __init__(self, channels: int = 3, *, padding: Padding) -> None:
        super().__init__()
        offsets = torch.arange(-2, 3, dtype=torch.float64)
        phases = torch.stack([_cubic(offsets + 0.25), _cubic(offsets - 0.25)])  # output pixels 2i and 2i + 1
        kernels = torch.einsum("ph,qw->pqhw", phases, phases).reshape(4, 5, 5)
        self.register_buffer("weight", _per_channel(kernels, channels).float(), persistent=False)
        self._pad = 2 if padding == "same" else 0
        self.margin_px = 2 - self._pad

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            padded = edge_padded(x, self._pad)
            return depth_to_space(F.conv2d(padded, self.weight))


class BicubicDown(nn.Module):
    """Antialiased bicubic reduction by 2. `margin_px` counts pixels of the larger picture."""

    weight: Tensor

    def __init__(self, channels: int = 3, *, padding: Padding) -> None:
        super().__init__()
        taps = _cubic((torch.arange(8, dtype=torch.float64) - 3.5) / 2)
        taps = taps / taps.sum()
        kernel = torch.outer(taps, taps)[None]
        self.register_buffer("weight", _per_channel(kernel, channels).float(), persistent=False)
        self._pad = 3 if padding == "same" else 0
        self.margin_px = 3 - self._pad

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            padded = edge_padded(x, self._pad)
            return F.conv2d(padded, self.weight, stride=2)
