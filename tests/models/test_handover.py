"""What passes between the halves, against numpy; training reduces a picture as the engine's stream does."""

import numpy as np
import pytest
import torch

import engine.guide
from engine.guide import _means
from engine.image import ArrayPicture
from engine.mask import array_mask
from engine.models.cra_srgan.attention import AttentionRows
from engine.models.cra_srgan.handover import balanced, contrast, detail_gain, log_ratio, reduce_known, with_ratio


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_means_and_contrasts_are_those_of_the_known_pixels(factor, rng):
    picture, missing = rng.random((2, 3, 12, 18)), (rng.random((2, 1, 12, 18)) < 0.5).astype(float)
    missing[0, :, :3, :6] = 1
    inputs = torch.from_numpy(picture), torch.from_numpy(missing), factor
    mean, share = reduce_known(*inputs)
    variance = contrast(*inputs)
    for b, y, x in np.ndindex(2, 12 // factor, 18 // factor):
        part = slice(y * factor, (y + 1) * factor), slice(x * factor, (x + 1) * factor)
        known = missing[b, 0][part] == 0
        pixels = picture[b][:, *part][:, known] if known.any() else np.zeros((3, 1))
        assert float(share[b, 0, y, x]) == pytest.approx(1 - known.mean())
        assert mean[b, :, y, x].tolist() == pytest.approx(pixels.mean(1))
        assert float(variance[b, 0, y, x]) == pytest.approx(pixels.var(1).mean())


@pytest.mark.parametrize(("h", "w", "factor"), [(45, 33, 3), (46, 35, 4), (20, 9, 1)])
def test_the_stream_reduces_as_training_does(h, w, factor, rng, monkeypatch):
    monkeypatch.setattr(engine.guide, "STRIP_ROWS", 16)
    pixels, missing = rng.integers(0, 256, (h, w, 3), dtype=np.uint8), rng.random((h, w)) < 0.5
    missing[:8, :8] = True
    around = (0, -h % factor), (0, -w % factor)
    whole = np.pad(pixels, (*around, (0, 0)), mode="reflect").astype(np.float32) / 255
    picture = torch.from_numpy(whole).permute(2, 0, 1)[None]
    holes = torch.from_numpy(np.pad(missing, around, mode="reflect")).float()[None, None]
    mean, share = reduce_known(picture, holes, factor)
    wanted = mean[0].permute(1, 2, 0), share[0, 0], contrast(picture, holes, factor)[0, 0]
    streamed = _means(ArrayPicture(pixels), array_mask(missing), factor)
    for found, expected in zip(streamed, wanted, strict=True):
        assert np.abs(found - expected.numpy()).max() < 1e-5


def test_rows_are_scaled_to_the_contrast_around_the_hole(rng):
    """Three by two cells, the last ones cut by the border; cell 2 has no known pixel, cell 0 hardly any contrast."""
    variance, share = rng.random((20, 13)), np.where(rng.random((20, 13)) < 0.3, 1, 0.4 * rng.random((20, 13)))
    variance[:8, :8] *= 1e-3
    share[8:16, :8] = 1
    damaged, sources = [2, 3, 5], [[1, 4], [0, 0], [0, 4]]
    weights = np.array([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])
    rows = AttentionRows(torch.tensor(damaged), torch.tensor(sources), torch.from_numpy(weights))
    planes = (torch.from_numpy(plane)[None, None] for plane in (variance, share))
    made = balanced(rows, *planes, lambda cells, hole: torch.where(hole > 0, 0.5, cells))

    def contrast_of(cell: int) -> float:
        y, x = np.meshgrid(*(np.arange(8) + 8 * place for place in divmod(cell, 2)), indexing="ij")
        place = np.minimum(y, 19), np.minimum(x, 12)
        known = share[place] < 1
        return variance[place][known].mean() if known.any() else 0.5

    taken = [[contrast_of(cell) for cell in row] for row in sources]
    given = (weights**2 * np.array(taken)).sum(1)
    scale = [min(4.0, (contrast_of(c) / actual) ** 0.5) for c, actual in zip(damaged, given, strict=True)]
    assert max(scale) == 4
    assert min(scale) < 2
    assert np.allclose(made.weights, weights * np.array(scale)[:, None])
    assert (made.cells is rows.cells, made.sources is rows.sources) == (True, True)


def test_small_ratios_borrow_nothing_and_large_ones_all():
    assert [detail_gain(factor) for factor in (1, 2, 4, 9)] == [0, 0, 1, 1]
    assert detail_gain(3) == pytest.approx(np.log2(3) - 1)


def test_the_ratio_is_one_channel_more_and_ends_at_four():
    assert [log_ratio(factor) for factor in (1, 2, 3, 4, 64)] == pytest.approx([0, 0.5, np.log(3) / np.log(4), 1, 1])
    features = torch.rand(2, 3, 4, 5)
    made = with_ratio(features, 2)
    assert torch.equal(made[:, :3], features)
    assert torch.equal(made[:, 3:], torch.full((2, 1, 4, 5), 0.5))
