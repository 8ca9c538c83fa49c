"""What a model says of itself; travels beside its weights as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from engine.errors import ModelError
from engine.models.cra_srgan.config import Config
from engine.models.detector_config import DetectorConfig
from engine.store import write_atomic

CONFIGS: Mapping[str, type[Config] | type[DetectorConfig]] = {"cra-srgan": Config, "detector": DetectorConfig}
"""By the name of the architecture."""

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
