"""Attention, edges and frequencies against loops over cells, pixels and planes."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.cra_srgan.attention import (
    TOP_K,
    CrossModalFusion,
    EdgeAware,
    FrequencyDecomposition,
    MultiScaleContextualAttention,
)
from engine.models.cra_srgan.layers import centre, crop


@pytest.fixture(autouse=True)
def _no_slopes():
    with torch.no_grad():
        yield


def redrawn(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def mixed(x: Tensor | np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A convolution of 1x1 on (C, h, w)."""
    weight, bias = layer.weight[..., 0, 0].detach().double().numpy(), layer.bias.detach().double().numpy()
    return np.einsum("oc,chw->ohw", weight, np.asarray(x)) + bias[:, None, None]


def naive(attention: MultiScaleContextualAttention, features: Tensor, share: Tensor) -> tuple[np.ndarray, ...]:
    """(Q,) damaged cells, (K,) known ones, (Q, K) attention, patch by patch."""
    matched = mixed(features, attention.match)
    matched -= matched.mean((1, 2), keepdims=True)
    cells, keys = np.flatnonzero(share > 0), np.flatnonzero(share == 0)
    shares = np.exp(attention.scale_weights.detach().numpy())
    total = np.zeros((cells.size, keys.size))
    for size, part, sharpness in zip(attention.patch_sizes, shares / shares.sum(), attention.sharpness, strict=True):
        padded = np.pad(matched, ((0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="edge")
        patches = [padded[:, y : y + size, x : x + size].ravel() for y, x in np.ndindex(*share.shape[-2:])]
        directions = [patch / np.linalg.norm(patch) for patch in patches]
        for row, cell in enumerate(cells):
            weights = np.exp([float(sharpness) * (directions[cell] @ directions[key]) for key in keys])
            total[row] += part * weights / weights.sum()
    return cells, keys, total


def test_contextual_attention_compares_patches_one_by_one():
    attention = MultiScaleContextualAttention(4, match_channels=3, patch_sizes=(3, 5))
    nn.init.normal_(attention.scale_weights)
    nn.init.uniform_(attention.sharpness, 3, 12)
    features, share = torch.randn(2, 4, 6, 7) + 1, (torch.rand(2, 1, 6, 7) - 0.7).clamp(min=0)
    made, rows = attention(features, share)
    for picture, missing, attended, row in zip(features, share, made, rows, strict=True):
        cells, keys, weights = naive(attention, picture, missing)
        wanted = picture.flatten(1).numpy().copy()
        wanted[:, cells] = wanted[:, keys] @ weights.T
        assert np.allclose(attended.flatten(1), wanted, atol=1e-5)
        best = np.argsort(-weights)[:, :TOP_K]
        top = np.take_along_axis(weights, best, 1)
        assert np.array_equal(row.cells, cells)
        assert np.array_equal(row.sources, keys[best])
        assert np.allclose(row.weights, top / top.sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("least", [0.0, 0.25])
def test_sources_are_wholly_known_or_the_best_there_are(least):
    share = least + 0.05 + 0.5 * torch.rand(2, 1, 5, 5)
    share[..., 1:3, 2:4] = least
    _, rows = MultiScaleContextualAttention(4)(torch.randn(2, 4, 5, 5), share)
    for missing, row in zip(share, rows, strict=True):
        assert row.cells.tolist() == np.flatnonzero(missing > 0).tolist()
        assert row.sources.shape == row.weights.shape == (row.cells.numel(), TOP_K)
        assert (missing.flatten()[row.sources] == least).all()
        assert torch.allclose(row.weights.sum(1), torch.ones(()))


def test_a_copy_of_what_surrounds_a_hole_is_found():
    features, share = torch.randn(1, 16, 14, 14), torch.zeros(1, 1, 14, 14)
    features[..., 7:, 7:] = features[..., :7, :7]
    features[..., 10, 10] = lost = torch.randn(16)
    share[..., 3, 3] = 0.2
    made, (row,) = MultiScaleContextualAttention(16)(features, share)
    assert (int(row.cells), int(row.sources[0, 0])) == (3 * 14 + 3, 10 * 14 + 10)
    assert row.weights[0, 0] > 0.9
    assert (made[0, :, 3, 3] - lost).norm() < 0.2 * lost.norm()


def test_fusion_is_attention_inside_windows_of_eight_pixels():
    fusion = redrawn(CrossModalFusion(6, 3, heads=2)).double()
    features, guide = (torch.randn(1, channels, 16, 24, dtype=torch.float64) for channels in (6, 3))
    inpainted = mixed(guide[0], fusion.embed)
    query = mixed(inpainted, fusion.query)
    key, value = mixed(features[0], fusion.key), mixed(features[0], fusion.value)
    out = np.zeros_like(query)
    for head, y, x in np.ndindex(2, 16, 24):
        channels = slice(3 * head, 3 * head + 3)
        window = channels, slice(y // 8 * 8, y // 8 * 8 + 8), slice(x // 8 * 8, x // 8 * 8 + 8)
        scores = np.exp(np.tensordot(query[channels, y, x], key[window], 1) / 3**0.5)
        out[channels, y, x] = (value[window] * scores).sum((1, 2)) / scores.sum()
    gate = 1 / (1 + np.exp(-mixed(np.concatenate([inpainted, out]), fusion.gate)))
    wanted = features[0].numpy() + mixed(gate * out + (1 - gate) * inpainted, fusion.project)
    assert np.allclose(fusion(features, guide)[0], wanted, atol=1e-9)


@pytest.mark.parametrize(("padding", "margin_px"), [("same", 0), ("valid", 1)])
def test_edges_are_those_of_opencv_and_weigh_the_refinement(padding, margin_px):
    layer = redrawn(EdgeAware(4, padding=padding))
    features, picture = torch.randn(1, 4, 14, 12), torch.rand(1, 3, 14, 12)
    luma = np.tensordot([0.299, 0.587, 0.114], picture[0].numpy(), 1)
    slopes = [
        np.abs(cv2.Sobel(luma, cv2.CV_64F, dx, 1 - dx, ksize=3, borderType=cv2.BORDER_REPLICATE)) / 8 for dx in (1, 0)
    ]
    edges = torch.from_numpy(np.stack(slopes))[None].float()
    weight = 1 / (1 + torch.exp(-F.conv2d(edges, layer.weigh.weight, layer.weigh.bias, padding=1)))
    wanted = features + weight * F.conv2d(features, layer.refine.weight, layer.refine.bias, padding=1)
    made = layer(crop(features, margin_px), picture)
    assert torch.allclose(made, crop(wanted, 2 * margin_px), atol=1e-5)


@pytest.mark.parametrize(("padding", "margin_px"), [("same", 0), ("valid", 5)])
def test_low_is_what_opencv_blurs_and_high_the_rest(padding, margin_px):
    layer = redrawn(FrequencyDecomposition(3, padding=padding))
    x, taps = torch.randn(1, 3, 18, 16), np.float32([1, 4, 6, 4, 1]) / 16
    planes = [cv2.sepFilter2D(p.numpy(), cv2.CV_32F, taps, taps, borderType=cv2.BORDER_REPLICATE) for p in x[0]]
    low = torch.from_numpy(np.stack(planes))[None]
    seen: list[Tensor] = []
    for branch in (layer.low, layer.high):
        branch.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    made = layer(x)
    assert torch.allclose(seen[0], centre(low, seen[0]), atol=1e-6)
    assert torch.allclose(seen[0] + seen[1], centre(x, seen[0]), atol=1e-6)
    low_out = F.conv2d(low, layer.low.weight, layer.low.bias, padding=3, dilation=3, groups=3).clamp(min=0)
    high_out = F.conv2d(x - low, layer.high.weight, layer.high.bias, padding=1).clamp(min=0)
    gate = 1 / (1 + np.exp(-mixed(torch.cat([low_out, high_out], 1)[0], layer.gate)))
    out = gate * low_out[0].numpy() + (1 - gate) * high_out[0].numpy()
    wanted = torch.from_numpy(x[0].numpy() + mixed(out, layer.project)).float()
    assert torch.allclose(made[0], crop(wanted, margin_px), atol=1e-5)
