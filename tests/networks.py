"""Networks whose every parameter was drawn at random, so that no part of them is silent."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.models.checkpoint import Checkpoint, load, save
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.layers import RESIDUAL_UNIT
from engine.models.detector import Detector
from engine.models.detector_config import DetectorConfig

TINY = Config(
    guide_channels=7,
    coarse_channels=(8, 8, 8),
    refine_channels=(8, 8, 8),
    head_channels=16,
    head_dilations=(2,),
    trunk_channels=16,
    trunk_blocks=1,
    heads=2,
    stage_channels=(16, 16, 16, 16),
    stage_blocks=(1, 1, 1, 1),
)
"""Every module of the generator in a few thousand parameters."""

STAGE_STD, HEAD_STD, GUIDE_STD = 0.17, 0.1, 0.04
"""Of what each stage, the head and each network of the guide add to a picture in [0, 1]."""


def random_network(config: Config, *, seed: int = 0) -> CraSrgan:
    """A generator with all parameters redrawn, last layers and gates included, that adds much and saturates little."""
    torch.manual_seed(seed)
    network = CraSrgan(config, padding="valid").eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("sharpness"):
                parameter.uniform_(5, 15)
            elif parameter.ndim > 1:
                fan_in = max(1, parameter[0].numel())
                parameter.normal_(0, 0.7 * fan_in**-0.5)
            else:
                parameter.normal_(0, 0.05)
        _calibrate(network)
    return network


def _calibrate(network: CraSrgan) -> None:
    """Scales the layers that leave the network in a run on noise: the rest of a network decides how loud they are."""
    leaving: list[tuple[nn.Module, float]] = [
        (network.guide.coarse.leave, GUIDE_STD),
        (network.guide.refine.leave, GUIDE_STD),
        (network.local.head.leave, HEAD_STD / (1 if network.config.head_cell_px == 1 else RESIDUAL_UNIT)),
        *((network.local.stage(index).to_rgb, STAGE_STD) for index in range(len(network.config.stage_channels))),
    ]
    if network.local.clean is not None:
        leaving.append((network.local.clean, HEAD_STD))
    hooks = [layer.register_forward_hook(partial(_scale, std)) for layer, std in leaving]
    picture, share = torch.rand(1, 3, 64, 64), (torch.rand(1, 1, 64, 64) > 0.7).float()
    found = network.guide(picture, share)
    local = network.local
    levels = len(network.config.stage_channels)
    side = 2 * (local.encode_margin_px(levels) + local.head.margin_px) + 16
    pixels = torch.rand(1, 3, side, side)
    missing = (torch.rand(1, 1, side, side) > 0.7).float()
    guide = torch.cat([found.features, torch.ones_like(found.features[:, :1])], 1)
    guide = nn.functional.interpolate(guide, size=(side, side))
    composite = local.head(pixels, missing, pixels, torch.zeros_like(pixels), guide)
    inner = (
        ...,
        slice(local.head.margin_px, -local.head.margin_px),
        slice(local.head.margin_px, -local.head.margin_px),
    )
    features, picture = local.encode(composite, missing[inner], guide[inner], levels)
    local.decode(features, picture, levels)
    for hook in hooks:
        hook.remove()


def _scale(wanted_std: float, layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    factor = wanted_std / output.std()
    for parameter in layer.parameters():
        parameter.mul_(factor)
    return output * factor


def random_checkpoint(folder: Path, config: Config, *, seed: int = 0) -> Path:
    """The weights file of a random network, with its card beside it."""
    path = folder / f"random-{seed}.safetensors"
    network = random_network(config, seed=seed)
    save(
        path,
        network.state_dict(),
        config=config,
        name=path.stem,
        degradation="clean",
        licence="none",
        training={},
        numbers={},
    )
    return path


def random_model(folder: Path, config: Config, *, seed: int = 0) -> Checkpoint:
    """A random network as the engine loads it."""
    return load(str(random_checkpoint(folder, config, seed=seed)))


def random_detector(folder: Path, *, seed: int = 0) -> Path:
    """The weights file of a small detector that finds damage anywhere, with its card beside it."""
    torch.manual_seed(seed)
    config = DetectorConfig(channels=(8, 8, 8, 8))
    network = Detector(config).eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.mul_(2.0)
        logits = network(torch.rand(1, 3, 256, 256))
        network.leave.weight.div_(logits.std())
        network.leave.bias.copy_((network.leave.bias - logits.mean()) / logits.std())
    path = folder / f"detector-{seed}.safetensors"
    save(
        path,
        network.state_dict(),
        config=config,
        name=path.stem,
        degradation="film",
        licence="none",
        training={},
        numbers={},
    )
    return path
