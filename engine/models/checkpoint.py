"""Checkpoints by name or path: safetensors and a card, never pickle."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from engine.errors import ModelError
from engine.models.card import Card, Value
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.layers import Padding
from engine.models.detector import Detector
from engine.models.detector_config import DetectorConfig

DEFAULTS = {"clean": "lite"}
"""Embedded model per degradation."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network ready to restore, with its card."""

    card: Card
    network: CraSrgan


def embedded() -> dict[str, Path]:
    """Names and weight files of the models that come with the package."""
    folder = Path(str(resources.files("engine") / "weights"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find(model: str) -> Path:
    """The weights file of an embedded name or of a path."""
    known = embedded()
    if model in known:
        return known[model]
    path = Path(model)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    raise ModelError(
        f"model {model!r}: neither one of the {len(known)} embedded ({', '.join(known) or 'none'}) "
        "nor a .safetensors file; see `engine model list`"
    )


def for_degradation(degradation: str) -> str:
    """The embedded default for a kind of picture."""
    if degradation not in DEFAULTS:
        raise ModelError(
            f"degradation {degradation!r}: no model is embedded for it (1 is, for {', '.join(DEFAULTS)}); "
            "use --degradation clean or give --model FILE"
        )
    return DEFAULTS[degradation]


def read_card(path: Path) -> Card:
    """The card beside a weights file."""
    return Card.read(path.with_suffix(".json"))


def build(config: Config | DetectorConfig, *, padding: Padding = "valid") -> CraSrgan | Detector:
    """The network of these sizes, untrained."""
    return CraSrgan(config, padding=padding) if isinstance(config, Config) else Detector(config)


def load(model: str) -> Checkpoint:
    """The checkpoint, float32, ready for inference. Raises ModelError where bytes and card disagree."""
    card, network = _load(find(model))
    if not isinstance(network, CraSrgan):
        raise ModelError(f"model {model!r} is for the task {card.task!r}, 'joint' is needed; see `engine model list`")
    return Checkpoint(card, network)


def load_detector(model: str = "detector") -> tuple[Card, Detector]:
    """As `load`, for a network that finds damage. Raises ModelError where none is embedded and none is given."""
    if model == "detector" and model not in embedded():
        raise ModelError(
            "1 detector is needed, 0 are embedded so far; train one (`engine train --recipe detector`), write masks "
            "with `engine mask --model FILE` and give them with --mask"
        )
    card, network = _load(find(model))
    if not isinstance(network, Detector):
        raise ModelError(f"model {model!r} is for the task {card.task!r}, 'detect' is needed; see `engine model list`")
    return card, network


def _load(path: Path) -> tuple[Card, CraSrgan | Detector]:
    card = read_card(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != card.sha256:
        raise ModelError(
            f"{path}: sha256 is {digest[:12]}, its card says {card.sha256[:12]}; fetch both files again together"
        )
    network = build(card.config)
    try:
        network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights do not fit the card's network ({error})") from error
    return card, network.eval()


def save(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    config: Config | DetectorConfig,
    name: str,
    degradation: str,
    licence: str,
    training: Mapping[str, Value],
    numbers: Mapping[str, Value],
) -> Card:
    """Write `path` (float16 safetensors) and the card beside it."""
    network = build(config)
    halves = {key: value.to(torch.float16).contiguous() for key, value in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, path)
    card = Card(
        name=name,
        network=network.NAME,
        task=network.TASK,
        scales=network.SCALES,
        context_px={str(scale): network.context_px(scale) for scale in network.SCALES},
        align_px=network.ALIGN_PX,
        degradation=degradation,
        licence=licence,
        config=config,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        parameters=sum(value.numel() for value in halves.values()),
        training=training,
        numbers=numbers,
    )
    card.write(path.with_suffix(".json"))
    return card


def with_numbers(path: Path, numbers: Mapping[str, Value]) -> Card:
    """Replace the measured numbers on the card of `path`."""
    card = replace(read_card(path), numbers=numbers)
    card.write(path.with_suffix(".json"))
    return card
