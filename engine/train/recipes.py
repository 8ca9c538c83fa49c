"""Complete runs as functions. A recipe holds everything that a training run depends on but its data."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.models.cra_srgan import config
from engine.train.stages import GLOBAL, LOCAL, Draw, LossWeights, Stage


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    model: config.Config
    stages: tuple[Stage, ...]
    degradation: str = "clean"
    seed: int = 20
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    warmup_steps: int = 100
    budget_s: float = 2 * 3600.0
    """Wall clock of the whole run, split among the stages by their shares."""


def lite() -> Recipe:
    """The embedded default: distortion losses only, a wall-clock budget split 10 / 20 / 40 / 30."""
    return Recipe(name="lite", model=config.lite(), stages=_lite_stages())


def full() -> Recipe:
    """The report's sizes under the lite curriculum."""
    return Recipe(name="full", model=config.full(), stages=_lite_stages(), budget_s=24 * 3600.0)


def _lite_stages() -> tuple[Stage, ...]:
    return (
        Stage(
            name="coarse",
            task="coarse",
            trains=("guide.coarse.",),
            budget_share=0.10,
            learning_rate=1e-3,
            losses=LossWeights(hole=1.0),
            draws=(
                Draw(probability=0.40, batch=6, side_px=192, factor=1),
                Draw(probability=0.40, batch=4, side_px=256, factor=2),
                Draw(probability=0.20, batch=6, side_px=128, factor=3),
            ),
        ),
        Stage(
            name="inpainting",
            task="inpainting",
            trains=GLOBAL,
            budget_share=0.20,
            learning_rate=4e-4,
            losses=LossWeights(hole=1.0, edge=0.1),
            window_px=128,
            draws=(
                Draw(probability=0.30, batch=4, side_px=192, factor=1),
                Draw(probability=0.50, batch=3, side_px=256, factor=2),
                Draw(probability=0.10, batch=4, side_px=128, factor=3),
                Draw(probability=0.10, batch=4, side_px=128, factor=4),
            ),
        ),
        Stage(
            name="super-resolution",
            task="super-resolution",
            trains=LOCAL,
            budget_share=0.40,
            learning_rate=1e-3,
            losses=LossWeights(pixel=1.0),
            draws=(
                Draw(probability=0.85, batch=8, side_px=48, levels=2),
                Draw(probability=0.15, batch=4, side_px=24, levels=4),
            ),
        ),
        Stage(
            name="joint",
            task="joint",
            trains=("",),
            budget_share=0.30,
            learning_rate=3e-4,
            guide_rate_factor=0.1,
            losses=LossWeights(pixel=1.0, hole=0.05, edge=0.1),
            window_px=64,
            draws=(
                Draw(probability=0.30, batch=4, side_px=128, factor=1, levels=2),
                Draw(probability=0.20, batch=4, side_px=96, factor=2, levels=2),
                Draw(probability=0.40, batch=8, side_px=48, levels=2),
                Draw(probability=0.10, batch=4, side_px=24, levels=4),
            ),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"lite": lite, "full": full}
