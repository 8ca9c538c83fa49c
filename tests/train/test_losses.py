"""Losses against independent references, and properties that their papers state."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.errors import TrainingError
from engine.train import losses
from engine.train.discriminator import Discriminator, Vgg19


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(2, 3, 24, 20, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "loss",
    [losses.l1, losses.edge, losses.laplacian_edge, losses.frequency, losses.charbonnier],
    ids=lambda f: f.__name__,
)
def test_what_is_right_costs_least_and_noise_costs_more(loss, pair):
    target, noise = pair
    found = [float(loss(target + amount * (noise - 0.5), target)) for amount in (0.0, 0.1, 0.4)]
    assert found == sorted(found)
    assert found[0] <= losses.CHARBONNIER_EPSILON * 1.001
    assert found[2] > 2 * found[1]


def test_edges_are_those_of_opencv(pair):
    picture = pair[0]
    found = losses.sobel_edges(picture)
    plane = picture[1, 2].numpy()
    for number, (dx, dy) in enumerate(((1, 0), (0, 1))):
        expected = cv2.Sobel(plane, cv2.CV_32F, dx, dy, ksize=3)[1:-1, 1:-1] / 8
        assert np.allclose(found[5, number].numpy(), expected, atol=1e-6)


def test_the_laplacian_is_what_opencv_blurs_away(pair):
    picture = pair[0]
    plane = picture[0, 1].numpy()
    taps = np.float32([1, 4, 6, 4, 1]) / 16
    blurred = cv2.sepFilter2D(plane, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_REFLECT_101)
    assert np.allclose(losses.laplacian(picture)[0, 1].numpy(), plane - blurred, atol=1e-6)


def test_plain_errors_are_those_of_their_formulas(pair):
    target, noise = pair
    assert torch.isclose(losses.l1(noise, target), F.l1_loss(noise, target))
    near = target + 0.004 * (noise - 0.5)  # errors of both signs and of epsilon's size
    expected = np.hypot(near.numpy() - target.numpy(), 1e-3).mean()
    assert float(losses.charbonnier(near, target)) == pytest.approx(expected, rel=1e-4)


def test_hole_error_is_the_mean_of_the_pictures_with_holes():
    generator = torch.Generator().manual_seed(4)
    prediction, target, reference = (torch.rand(3, 3, 8, 10, generator=generator) for _ in range(3))
    reference[0] = target[0] + 0.03 * reference[0]  # all but right
    share = torch.tensor([0.2, 0.6, 0.0])[:, None, None, None]
    missing = (torch.rand(3, 1, 8, 10, generator=generator) < share).float()
    expected = []
    for number in range(2):
        hole = missing[number, 0].numpy() > 0
        mine, other = ((one - target)[number].numpy()[:, hole] for one in (prediction, reference))
        expected.append((mine**2).mean() / ((other**2).mean() + losses.HOLE_EPSILON**2))
    found = losses.hole_error(prediction, target, missing, reference)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)
    assert float(losses.hole_error(prediction, target, 0 * missing, reference)) == 0


def test_edge_losses_are_means_over_the_edges_of_opencv(pair):
    target = pair[0]
    near = target + 0.005 * (pair[1] - 0.5)
    errors = (near - target).flatten(0, 1).numpy()
    sobel = [cv2.Sobel(plane, cv2.CV_32F, dx, 1 - dx, ksize=3)[1:-1, 1:-1] / 8 for plane in errors for dx in (0, 1)]
    assert float(losses.edge(near, target)) == pytest.approx(np.abs(sobel).mean(), rel=1e-3)
    details = [plane - cv2.GaussianBlur(plane, (5, 5), 0) for plane in errors]  # without a sigma the binomial taps
    assert float(losses.laplacian_edge(near, target)) == pytest.approx(np.hypot(details, 1e-3).mean(), rel=1e-3)


def test_the_high_band_is_what_a_mean_of_its_neighbours_takes_away(pair):
    def mean(plane):
        return cv2.blur(plane, (5, 5), borderType=cv2.BORDER_CONSTANT)

    errors = (pair[0] - pair[1]).flatten(0, 1).numpy()
    inside = mean(np.ones_like(errors[0]))
    expected = np.abs([plane - mean(plane) / inside for plane in errors]).mean()
    assert float(losses.frequency(*pair)) == pytest.approx(expected, rel=1e-4)


def test_each_layer_counts_alike_whatever_its_size():
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 3, 8, 6), (2, 8, 4, 3), (2, 16, 2, 2))
    mine, wanted = ([n * torch.rand(s, generator=generator) for n, s in enumerate(shapes, 1)] for _ in range(2))
    layers = [(one.numpy(), other.numpy()) for one, other in zip(mine, wanted, strict=True)]
    expected = np.mean([np.abs(one - other).mean() for one, other in layers])
    assert float(losses.perceptual(mine, wanted)) == pytest.approx(expected, rel=1e-5)
    grams = [
        [np.stack([np.tensordot(x, x, ((1, 2), (1, 2))) / x.size for x in batch]) for batch in layer]
        for layer in layers
    ]
    expected = np.mean([np.abs(one - other).mean() for one, other in grams])
    assert float(losses.style(mine, wanted)) == pytest.approx(expected, rel=1e-4)


def test_the_high_band_does_not_see_a_shift_in_brightness(pair):
    target = pair[0]
    assert float(losses.frequency(target + 0.2, target)) == pytest.approx(0, abs=1e-6)
    assert float(losses.l1(target + 0.2, target)) == pytest.approx(0.2, rel=1e-5)


def test_gram_matrices_are_those_of_einsum_and_know_no_places(pair):
    features = pair[0]
    expected = np.einsum("bchw,bdhw->bcd", features.numpy(), features.numpy()) / (3 * 24 * 20)
    assert np.allclose(losses.gram(features).numpy(), expected, atol=1e-6)
    moved = features.roll((5, 7), (2, 3))
    assert float(losses.style([moved], [features])) == pytest.approx(0, abs=1e-6)
    assert float(losses.perceptual([moved], [features])) > 0.1


@pytest.mark.parametrize("kind", ["srgan", "relativistic", "wgan-gp"])
def test_a_critic_and_its_opponent_want_the_opposite(kind):
    real, fake = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -2.0)
    assert losses.tell_apart(real, fake, kind) < losses.tell_apart(fake, real, kind)
    assert losses.deceive(real, fake, kind) > losses.deceive(fake, real, kind)


def test_adversarial_losses_are_those_of_their_papers():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])
    target = torch.ones(2)
    bce = F.binary_cross_entropy_with_logits
    srgan = bce(real, target) + bce(fake, 0 * target)
    assert torch.isclose(losses.tell_apart(real, fake, "srgan"), srgan)
    assert torch.isclose(losses.deceive(real, fake, "srgan"), bce(fake, target))
    average = (bce(real - fake.mean(), target) + bce(fake - real.mean(), 0 * target)) / 2
    assert torch.isclose(losses.tell_apart(real, fake, "relativistic"), average)
    opposite = (bce(real - fake.mean(), 0 * target) + bce(fake - real.mean(), target)) / 2
    assert torch.isclose(losses.deceive(real, fake, "relativistic"), opposite)
    assert float(losses.tell_apart(real, fake, "wgan-gp")) == pytest.approx(0.5 - 2.0)
    assert float(losses.deceive(real, fake, "wgan-gp")) == pytest.approx(-0.5)


def test_the_gradient_penalty_is_zero_at_slope_one():
    picture = torch.rand(2, 3, 4, 4, requires_grad=True)
    slope = torch.rand(3, 4, 4)
    slope = slope / slope.norm()
    assert float(losses.gradient_penalty((picture * slope).sum((1, 2, 3)), picture)) == pytest.approx(0, abs=1e-9)
    twice = losses.gradient_penalty((picture * 2 * slope).sum((1, 2, 3)), picture)
    assert float(twice.detach()) == pytest.approx(losses.GRADIENT_PENALTY, rel=1e-4)


def test_the_critic_is_smooth_and_covers_the_picture():
    torch.manual_seed(0)
    critic = Discriminator(8)
    picture = torch.rand(1, 3, 64, 48)
    assert critic(picture).shape == (1, 1, 8, 6)
    assert [found.shape[-1] for found in critic.features(picture)] == [24, 12, 6]
    for _ in range(30):
        critic(picture)
    for layer in critic.layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(largest.detach()) == pytest.approx(1, abs=0.05)


VGG19_AS_PUBLISHED = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256), (16, 256, 256)),
    ((19, 256, 512), (21, 512, 512), (23, 512, 512), (25, 512, 512)),
    ((28, 512, 512), (30, 512, 512), (32, 512, 512), (34, 512, 512)),
)
"""Simonyan and Zisserman 2015, table 1, E: number in torchvision's list, inputs, outputs; halved after each row."""


def test_vgg19_is_the_published_one_before_activation(tmp_path):
    torch.manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    for number, inputs, outputs in (layer for row in VGG19_AS_PUBLISHED for layer in row):
        weights[f"features.{number}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        weights[f"features.{number}.bias"] = torch.randn(outputs) * 0.1
    torch.save(weights | {"classifier.0.bias": torch.zeros(4096)}, tmp_path / "vgg19.pth")
    mine = Vgg19(tmp_path / "vgg19.pth")
    picture = torch.rand(1, 3, 48, 48)
    mean, deviation = (torch.tensor(of)[:, None, None] for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (picture - mean) / deviation
    expected: list[torch.Tensor] = []
    with torch.no_grad():
        for row in VGG19_AS_PUBLISHED:
            for number, _, _ in row:
                last = F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1)
                x = last.clamp(min=0)
            expected.append(last)
            x = F.max_pool2d(x, 2)
    found = mine.features(picture)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, expected, strict=True))


def test_vgg19_is_never_random(tmp_path):
    path = tmp_path / "vgg19.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(TrainingError, match="31 of 32 weights"):
        Vgg19(path)


def test_dice_is_that_of_two_masks():
    """1 - 2 |A and B| / (|A| + |B|), whose one more pixel above and below keeps two empty masks alike."""
    generator = np.random.default_rng(0)
    one, other = (generator.random((2, 1, 30, 30)) < 0.3 for _ in range(2))
    expected = 1 - (2 * (one & other).sum() + 1) / (one.sum() + other.sum() + 1)
    assert float(losses.dice(*(torch.as_tensor(m).float() for m in (one, other)))) == pytest.approx(expected, rel=1e-5)
    empty = torch.zeros(1, 1, 4, 4)
    assert float(losses.dice(empty, empty)) == 0
    assert float(losses.dice(torch.ones(1, 1, 40, 40), torch.zeros(1, 1, 40, 40))) > 0.99


def test_dice_of_soft_masks_squares_them(pair):
    probability = pair[0][:, :1]
    target = (pair[1][:, :1] < torch.tensor([0.6, 0.05])[:, None, None, None]).float()  # pictures of unequal weight
    p, g = (one.double().numpy().ravel() for one in (probability, target))
    expected = 1 - (2 * p @ g + 1) / (p @ p + g @ g + 1)
    assert float(losses.dice(probability, target)) == pytest.approx(expected, rel=1e-5)
