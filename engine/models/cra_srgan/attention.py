"""Attention of the generator: across the whole picture for the guide, inside windows for the tiles.

Legend: N cells of the guide's attention grid, Q cells that miss pixels, K cells that are wholly known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.cra_srgan.layers import Conv, Padding, centre, edge_padded, zero_

CELL_PX = 8
"""Side of an attention cell, in pixels of the guide."""

TOP_K = 2
"""Source cells kept per damaged cell; a mean of many would be smooth."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Where the pixels of each damaged cell may come from; cells are numbered row by row."""

    cells: Tensor
    """(Q,) int64, damaged cells."""
    sources: Tensor
    """(Q, k) int64, wholly known cells."""
    weights: Tensor
    """(Q, k) float, each row sums to one."""


class MultiScaleContextualAttention(nn.Module):
    """Patches of 3x3, 5x5 and 7x7 cells compared by cosine, mixed by learned weights (report, 2.2.1).

    Extends the single-scale attention of Yu et al. 2018 (section 4.1). Queries are the cells that miss pixels,
    keys only those that miss none, so that a hole never copies from a hole.
    """

    def __init__(self, channels: int, *, match_channels: int = 16, patch_sizes: tuple[int, ...] = (3, 5, 7)) -> None:
        super().__init__()
        self.match = nn.Conv2d(channels, match_channels, 1)
        self.patch_sizes = patch_sizes
        self.scale_weights = nn.Parameter(torch.zeros(len(patch_sizes)))
        self.sharpness = nn.Parameter(torch.full((len(patch_sizes),), 10.0))

    def forward(self, features: Tensor, missing_share: Tensor) -> tuple[Tensor, list[AttentionRows]]:
        """Features with damaged cells replaced by what they attend to, and the rows of each picture.

        features (B, C, h, w) one vector per cell; missing_share (B, 1, h, w) in [0, 1].
        """
        matched = self.match(features).float()
        matched = matched - matched.mean((2, 3), keepdim=True)  # what all cells share tells none apart
        attended: list[Tensor] = []
        rows: list[AttentionRows] = []
        for index in range(features.shape[0]):
            share = missing_share[index].flatten()
            cells = torch.nonzero(share > 0)[:, 0]
            keys = torch.nonzero(share <= share.min())[:, 0]  # wholly known, or the best there is
            weights = self._weights(matched[index : index + 1], cells, keys)
            values = features[index].flatten(1)
            mixed = (weights.to(values.dtype) @ values[:, keys].T).T
            attended.append(values.index_copy(1, cells, mixed).reshape(features.shape[1:]))
            top = weights.detach().topk(min(TOP_K, keys.numel()), dim=1)
            rows.append(AttentionRows(cells, keys[top.indices], top.values / top.values.sum(1, keepdim=True)))
        return torch.stack(attended), rows

    def _weights(self, matched: Tensor, cells: Tensor, keys: Tensor) -> Tensor:
        """(Q, K) attention, rows sum to one."""
        shares = torch.softmax(self.scale_weights, 0)
        total = matched.new_zeros(cells.numel(), keys.numel())
        for scale, size in enumerate(self.patch_sizes):
            padded = edge_padded(matched, size // 2)
            patches = F.normalize(F.unfold(padded, size)[0], dim=0)
            similarity = patches[:, cells].T @ patches[:, keys]
            total = total + shares[scale] * torch.softmax(self.sharpness[scale] * similarity, dim=1)
        return total


class CrossModalFusion(nn.Module):
    """Guide features ask, super-resolution features answer, a gate decides (report, 2.2.3).

    Attention runs inside 8x8 windows laid on the picture's own grid, so a tile whose origin lies on that grid
    sees the same windows as the whole picture does.
    """

    WINDOW_PX = 8

    def __init__(self, channels: int, guide_channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(guide_channels, channels, 1)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Conv2d(2 * channels, channels, 1)
        self.project = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        """(B, C, H, W) and (B, G, H, W) with H and W multiples of 8 → (B, C, H, W)."""
        inpainted = self.embed(guide)
        query, key, value = (
            self._windows(part) for part in (self.query(inpainted), self.key(features), self.value(features))
        )
        out = self._picture(_attended(query, key, value), features.shape)
        gate = torch.sigmoid(self.gate(torch.cat([inpainted, out], 1)))
        return features + self.project(gate * out + (1 - gate) * inpainted)

    def _windows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B * windows, heads, 64, C / heads)."""
        b, c, h, w = x.shape
        s = self.WINDOW_PX
        x = x.reshape(b, self.heads, c // self.heads, h // s, s, w // s, s)
        return x.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, self.heads, s * s, c // self.heads)

    def _picture(self, windows: Tensor, shape: torch.Size) -> Tensor:
        b, c, h, w = shape
        s = self.WINDOW_PX
        x = windows.reshape(b, h // s, w // s, self.heads, s, s, c // self.heads)
        x = x.permute(0, 3, 6, 1, 4, 2, 5).reshape(b, c, h, w)
        return x.contiguous(memory_format=torch.channels_last)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In fp32 at least: the kernel that CPUs have for bf16 takes 5 times as long backwards, and more forwards too."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query.to(wide), key.to(wide), value.to(wide)).to(query.dtype)


class EdgeAware(nn.Module):
    """Sobel edges of the picture weight a refinement of the features (report, 2.2.4)."""

    sobel: Tensor

    def __init__(self, channels: int, *, padding: Padding) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        luma = torch.tensor([0.299, 0.587, 0.114])
        kernels = torch.stack([across, across.T])[:, None] * luma[None, :, None, None]
        self.register_buffer("sobel", kernels, persistent=False)
        self._pad = 1 if padding == "same" else 0
        self.weigh = Conv(2, channels, padding=padding)
        self.refine = zero_(Conv(channels, channels, padding=padding))
        self.margin_px = self.refine.margin_px
        """Of the features; the picture's is wider, and does not pass through the windows of the fusion."""
        self.picture_margin_px = 1 - self._pad + self.weigh.margin_px

    def forward(self, features: Tensor, picture: Tensor) -> Tensor:
        """Features (B, C, H, W) and the picture (B, 3, ...) in [0, 1], each with its margin around what is wanted."""
        padded = edge_padded(picture, self._pad)
        edges = F.conv2d(padded, self.sobel.to(padded.dtype)).abs()
        weight = torch.sigmoid(self.weigh(edges))
        return centre(features, weight) + weight * centre(self.refine(features), weight)


class FrequencyDecomposition(nn.Module):
    """Low = a fixed blur, high = the rest; a wide and a small kernel, then adaptive fusion (report, 2.2.5)."""

    blur: Tensor

    def __init__(self, channels: int, *, padding: Padding) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(taps, taps).expand(channels, 1, 5, 5).clone(), persistent=False)
        self._pad = 2 if padding == "same" else 0
        self.low = Conv(channels, channels, padding=padding, dilation=3, groups=channels)
        self.high = Conv(channels, channels, padding=padding)
        self.gate = nn.Conv2d(2 * channels, channels, 1)
        self.project = zero_(nn.Conv2d(channels, channels, 1))
        self._blur_margin_px = 2 - self._pad
        self.margin_px = self._blur_margin_px + self.low.margin_px

    def forward(self, features: Tensor) -> Tensor:
        padded = edge_padded(features, self._pad)
        low = F.conv2d(padded, self.blur.to(padded.dtype), groups=features.shape[1])
        high = centre(features, low) - low
        with torch.autocast(features.device.type, enabled=False):
            # bf16 gradients of dilated convolutions come out as NaN now and then on CPUs (seen with torch 2.13)
            low_out = F.relu(self.low(low.float())).to(low.dtype)
        high_out = centre(F.relu(self.high(high)), low_out)
        gate = torch.sigmoid(self.gate(torch.cat([low_out, high_out], 1)))
        return centre(features, low_out) + self.project(gate * low_out + (1 - gate) * high_out)
