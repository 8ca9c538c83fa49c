"""Checkpoints by name or path: safetensors and a card, never pickle."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from engine.errors import ModelError
from engine.models.card import Card, Value, embedded, find, for_degradation, read_card
from engine.models.cra_srgan.config import Config
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.layers import Padding
from engine.models.detector import Detector
from engine.models.detector_config import DetectorConfig
from engine.store import write_atomic

LIVELY = "gan"
"""The embedded model of most texture, which the dial of fidelity begins with."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network ready to restore, with its card."""

    card: Card
    network: CraSrgan


def build(config: Config | DetectorConfig, *, padding: Padding = "valid") -> CraSrgan | Detector:
    """The network of these sizes, untrained."""
    return CraSrgan(config, padding=padding) if isinstance(config, Config) else Detector(config)


def chosen(model: str | None, degradation: str, fidelity: float | None) -> Checkpoint:
    """The model that a user asked for, or the embedded one for the kind of picture and the dial."""
    if fidelity is None:
        return load(model or for_degradation(degradation))
    if model is None and LIVELY not in embedded():
        raise ModelError(
            f"1 model of livelier texture is needed for a fidelity of {fidelity:g}, 0 are embedded so far; train one "
            "(`engine train --recipe gan --start-from` the weights of `lite`) and give --model FILE"
        )
    return between(load(model or LIVELY), fidelity)


def load(model: str) -> Checkpoint:
    """The checkpoint, float32, ready for inference. Raises ModelError where bytes and card disagree."""
    card, network = _load(find(model))
    if not isinstance(network, CraSrgan):
        raise ModelError(f"model {model!r} is for the task {card.task!r}, 'joint' is needed; see `engine model list`")
    return Checkpoint(card, network)


def between(checkpoint: Checkpoint, fidelity: float) -> Checkpoint:
    """Weights on the line between the model's own (0) and its base's (1) (ESRGAN, Wang et al. 2018, section 3.4).

    Both ends are the models themselves. Raises ModelError for a model without a base.
    """
    card = checkpoint.card
    if not 0 <= fidelity <= 1:
        raise ModelError(f"fidelity {fidelity:g} is not between 0 (most texture) and 1 (fewest errors)")
    if not card.base:
        raise ModelError(
            f"model {card.name!r} was trained from 0 embedded models, 1 is needed for --fidelity; leave it out, or "
            "give a model that was trained --start-from an embedded one"
        )
    base = load(card.base["name"])
    if fidelity == 1:
        return base
    if fidelity == 0:
        return checkpoint
    own, theirs = checkpoint.network.state_dict(), base.network.state_dict()
    if own.keys() != theirs.keys():
        raise ModelError(
            f"model {card.name!r} has {len(own)} tensors, its base {len(theirs)}: nothing lies between them"
        )
    checkpoint.network.load_state_dict({name: torch.lerp(own[name], theirs[name], fidelity) for name in own})
    sha256 = hashlib.sha256(f"{card.sha256} {base.card.sha256} {fidelity!r}".encode()).hexdigest()
    return replace(checkpoint, card=replace(card, name=f"{card.name}@{fidelity:g}", sha256=sha256))


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
    network = build(card.config)
    try:
        network.load_state_dict({name: value.float() for name, value in read_weights(str(path)).items()})
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights do not fit the card's network ({error})") from error
    return card, network.eval()


def read_weights(model: str) -> dict[str, Tensor]:
    """All tensors of a model: those of its file, and those of its base that it leaves out."""
    path = find(model)
    card = read_card(path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.sha256:
        raise ModelError(
            f"{path}: sha256 is {digest[:12]}, its card says {card.sha256[:12]}; fetch both files again together"
        )
    own = parse(data)
    if not card.base:
        return own
    name, sha256 = card.base["name"], card.base["sha256"]
    base = embedded().get(name)
    here = "none of that name" if base is None else read_card(base).sha256
    if base is None or here != sha256:
        raise ModelError(
            f"model {card.name!r} completes the weights of {name!r} {sha256[:12]}, embedded here is {here[:12]}; use "
            "the version of the engine that it was trained with, or train it again"
        )
    return read_weights(name) | own


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
    trained_from: str | None = None,
) -> Card:
    """Write `path` (float16 safetensors) and the card beside it.

    Of weights `trained_from` an embedded model of another name, only those are written that differ from its own.
    """
    network = build(config)
    halves = {key: value.to(torch.float16).contiguous() for key, value in weights.items()}
    base = _embedded_card(trained_from)
    if base is not None and base.name == name:  # to take its place
        base = None
    shared = {} if base is None else read_weights(base.name)
    data = serialize({key: v for key, v in halves.items() if key not in shared or not torch.equal(v, shared[key])})
    write_atomic(path, data)
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
        sha256=hashlib.sha256(data).hexdigest(),
        parameters=sum(value.numel() for value in halves.values()),
        base={} if base is None else {"name": base.name, "sha256": base.sha256},
        training=training,
        numbers=numbers,
    )
    card.write(path.with_suffix(".json"))
    return card


def _embedded_card(model: str | None) -> Card | None:
    """Of the embedded model that a name or a file is."""
    if model is None:
        return None
    digest = hashlib.sha256(find(model).read_bytes()).hexdigest()
    cards = (read_card(known) for known in embedded().values())
    return next((card for card in cards if card.sha256 == digest), None)


def with_numbers(path: Path, numbers: Mapping[str, Value]) -> Card:
    """Replace the measured numbers on the card of `path`."""
    card = replace(read_card(path), numbers=numbers)
    card.write(path.with_suffix(".json"))
    return card
