"""What a model says of itself, beside its weights as JSON, and where both are found."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

from engine.errors import ModelError
from engine.models.cra_srgan.config import Config
from engine.models.detector_config import DetectorConfig
from engine.store import write_atomic

CONFIGS: Mapping[str, type[Config] | type[DetectorConfig]] = {"cra-srgan": Config, "detector": DetectorConfig}
"""By the name of the architecture."""

DEFAULTS = {"clean": "lite"}
"""Embedded model per degradation."""

Value = str | int | float | bool | None | Mapping[str, "Value"] | list["Value"]


@dataclass(frozen=True, slots=True)
class Card:
    """Facts about one checkpoint."""

    name: str
    network: str
    """Name of the architecture."""
    task: str
    """joint (fills and enlarges) or detect"""
    scales: tuple[int, ...]
    context_px: Mapping[str, int]
    """Per scale: input pixels around a tile that its output depends on."""
    align_px: int
    degradation: str
    """clean (antialiased bicubic reduction) or scan (blur, noise, JPEG)."""
    licence: str
    config: Config | DetectorConfig
    sha256: str
    """Of the weights file."""
    parameters: int
    base: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name and sha256 of the embedded model whose weights stand for those that the file leaves out; or empty."""
    training: Mapping[str, Value] = field(default_factory=dict[str, Value])
    numbers: Mapping[str, Value] = field(default_factory=dict[str, Value])
    """Measured quality, with the command that measures it."""

    @property
    def sizes(self) -> Config:
        """Of a generator. Raises ModelError for the card of another network."""
        if not isinstance(self.config, Config):
            raise ModelError(
                f"model {self.name!r} is for the task {self.task!r}, a generator is needed; choose another"
            )
        return self.config

    def write(self, path: Path) -> None:
        write_atomic(path, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Raises ModelError where the card is absent or not one."""
        try:
            fields = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            config = cast("dict[str, Any]", fields.pop("config"))
            sizes: dict[str, Any] = {name: _frozen(value) for name, value in config.items()}
            if fields["network"] not in CONFIGS:
                known = ", ".join(CONFIGS)
                raise ModelError(
                    f"{path}: network {fields['network']!r} is not among the {len(CONFIGS)} known: {known}"
                )
            return cls(config=CONFIGS[fields["network"]](**sizes), scales=tuple(fields.pop("scales")), **fields)
        except FileNotFoundError:
            raise ModelError(f"{path}: no card beside the weights; every checkpoint needs 1, 0 found") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of something else
            raise ModelError(f"{path}: not a model card ({error}); export the model again") from error


def _frozen(value: object) -> object:
    """JSON knows lists only."""
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


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
