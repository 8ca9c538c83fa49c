"""The critic of adversarial training, and the features that perceptual losses compare."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from engine.errors import TrainingError

VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
"""Channels of VGG19's convolutions (Simonyan & Zisserman 2015); 0 is a pooling."""
VGG19_LAYERS = (2, 7, 16, 25, 34)
"""Last convolutions before each pooling, taken before their activation (Wang et al. 2018, ESRGAN, section 3.2)."""


class Discriminator(nn.Module):
    """A fully convolutional critic with spectral norm (Miyato et al. 2018): (B, 3, H, W) to logits (B, 1, H/8, W/8)."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = [3, channels, channels, 2 * channels, 2 * channels, 4 * channels, 4 * channels]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 3, stride=1 + at % 2, padding=1))
            for at, (before, after) in enumerate(pairwise(widths))
        )
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        return self.judged(self.features(picture))

    def judged(self, features: list[Tensor]) -> Tensor:
        """The logits of a picture with these features."""
        return self.last(F.leaky_relu(features[-1], 0.2))

    def features(self, picture: Tensor) -> list[Tensor]:
        """Of each size, before activation."""
        found: list[Tensor] = []
        x = picture - 0.5
        for at, layer in enumerate(self.layers):
            x = layer(x if at == 0 else F.leaky_relu(x, 0.2))
            if at % 2:
                found.append(x)
        return found


class Vgg19(nn.Module):
    """Features of VGG19 before activation, from the user's file; never random ones."""

    def __init__(self, path: Path) -> None:
        """`path`: torchvision's `vgg19` weights, as .pth or safetensors. Raises TrainingError."""
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in VGG19:
            layers += [nn.MaxPool2d(2)] if width == 0 else [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width or before
        self.layers = nn.Sequential(*layers[: VGG19_LAYERS[-1] + 1])
        self.layers.load_state_dict(_vgg_weights(path, set(self.layers.state_dict())))
        self.requires_grad_(requires_grad=False)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[None, :, None, None])
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[None, :, None, None])

    def features(self, picture: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        x = (picture - self.mean) / self.deviation
        for at, layer in enumerate(self.layers):
            x = layer(x)
            if at in VGG19_LAYERS:
                found.append(x)
        return found


def _vgg_weights(path: Path, names: set[str]) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            found: dict[str, Tensor] = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(f"{path}: cannot be read as weights ({error}); give torchvision's vgg19") from error
    weights = {name.removeprefix("features."): value for name, value in found.items()}
    missing = names - weights.keys()
    if missing:
        raise TrainingError(f"{path}: {len(missing)} of {len(names)} weights of VGG19 are missing; give torchvision's")
    return {name: weights[name] for name in names}
