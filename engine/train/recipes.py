"""Complete runs as functions. A recipe holds everything that a training run depends on but its data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.models.cra_srgan import config
from engine.models.detector_config import DetectorConfig
from engine.train.stages import GLOBAL, LOCAL, Draw, LossWeights, Stage


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    model: config.Config | DetectorConfig
    stages: tuple[Stage, ...]
    degradation: str = "clean"
    continues: bool = False
    """Whether it is nothing without the weights of another."""
    seed: int = 20
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    warmup_steps: int = 100

    def without(self, *losses: str) -> "Recipe":
        """Ablations E and F of the report: the same without some losses, by their names in `LossWeights`."""
        gone = dict.fromkeys(losses, 0.0)
        stages = (replace(stage, losses=replace(stage.losses, **gone)) for stage in self.stages)
        return replace(self, stages=tuple(stages))


DAMAGED = (
    Draw(probability=0.30, batch=4, side_px=192, factor=1),
    Draw(probability=0.50, batch=3, side_px=256, factor=2),
    Draw(probability=0.10, batch=4, side_px=128, factor=3),
    Draw(probability=0.10, batch=4, side_px=128, factor=4),
)
INTACT = (
    Draw(probability=0.85, batch=8, side_px=48, levels=2),
    Draw(probability=0.15, batch=4, side_px=24, levels=4),
)
BOTH = (
    Draw(probability=0.30, batch=4, side_px=128, factor=1, levels=2),
    Draw(probability=0.20, batch=4, side_px=96, factor=2, levels=2),
    Draw(probability=0.40, batch=8, side_px=48, levels=2),
    Draw(probability=0.10, batch=4, side_px=24, levels=4),
)


def lite() -> Recipe:
    """The embedded default: distortion losses only."""
    return Recipe(name="lite", model=config.lite(), stages=_distortion(1))


def lite_scan() -> Recipe:
    """`lite`, whose weights `--start-from` gives, for bad copies: noise, blur and JPEG blocks are not enlarged."""
    stage = Stage(
        name="scan",
        task="super-resolution",
        trains=LOCAL,
        steps=6000,
        learning_rate=5e-4,
        losses=LossWeights(pixel=1.0),
        draws=INTACT,
        degraded=True,
    )
    return Recipe(name="lite_scan", model=config.lite_scan(), stages=(stage,), degradation="scan", continues=True)


def detector() -> Recipe:
    """What finds damage, for masks that nobody has to draw."""
    stage = Stage(
        name="detection",
        task="detection",
        trains=("",),
        steps=5000,
        learning_rate=1e-3,
        losses=LossWeights(pixel=1.0, dice=0.5),
        draws=(Draw(probability=0.6, batch=8, side_px=192), Draw(probability=0.4, batch=3, side_px=320)),
    )
    return Recipe(name="detector", model=DetectorConfig(), stages=(stage,), degradation="film")


def full() -> Recipe:
    """The report's sizes, for a GPU."""
    return Recipe(name="full", model=config.full(), stages=_distortion(4))


def gan() -> Recipe:
    """Adversarial weights beside distortion ones, which `--start-from` gives: the dial mixes the two."""
    return Recipe(name="gan", model=config.lite(), stages=(_adversarial(),), continues=True)


def realtime() -> Recipe:
    """A small student of a larger network (`--teacher`), whose guide and head it takes over (`--start-from`)."""
    *_, enlarging, joint = _distortion(1)
    stages = (
        replace(enlarging, losses=LossWeights(pixel=0.5, taught=0.5)),
        replace(joint, trains=LOCAL, steps=2000),
    )
    return Recipe(name="realtime", model=config.realtime(), stages=stages, continues=True)


def heritage() -> Recipe:
    """As `gan`, for paintings and prints: texture counts more (report, section 7)."""
    stage = _adversarial()
    losses = replace(stage.losses, style=0.25)
    return replace(gan(), name="heritage", stages=(replace(stage, losses=losses),))


def medical() -> Recipe:
    """As `gan`, where nothing may be made up: pixels count more, the critic hardly (report, section 7)."""
    stage = _adversarial()
    losses = replace(stage.losses, pixel=5.0, adversarial=0.0002)
    return replace(gan(), name="medical", stages=(replace(stage, losses=losses),))


def report() -> Recipe:
    """The report's own table (section 3.3): 100, 100 and 300 epochs. Needs VGG19 (`--features`)."""
    first, second, third = (
        LossWeights(pixel=1.0, hole=0.0, perceptual=0.1, style=0.05),
        LossWeights(pixel=1.0, perceptual=0.1, frequency=0.05),
        LossWeights(pixel=1.0, hole=0.0, perceptual=0.1, style=0.05, edge=0.1, frequency=0.05, adversarial=0.001),
    )
    stages = (
        Stage("inpainting", "inpainting", GLOBAL, 1e-4, DAMAGED, first, epochs=100, window_px=128),
        Stage("super-resolution", "super-resolution", LOCAL, 1e-4, INTACT, second, epochs=100),
        Stage("joint", "joint", ("",), 5e-5, BOTH, third, epochs=300, window_px=64),
    )
    common = (replace(stage, pixel_loss="l1", features="vgg19") for stage in stages)
    return Recipe(name="report", model=config.full(), stages=tuple(common))


def _distortion(times: int) -> tuple[Stage, ...]:
    """The head over the harmonic fill, coarse fill, fill with the head, enlargement, all together."""
    return (
        Stage(
            name="head",
            task="head",
            trains=("local.head.",),
            steps=12000 * times,
            learning_rate=1e-3,
            losses=LossWeights(pixel=0.0, hole=1.0),
            window_px=192,
            draws=(
                Draw(probability=0.35, batch=4, side_px=192, factor=1),
                Draw(probability=0.65, batch=4, side_px=96, factor=2),
            ),
        ),
        Stage(
            name="coarse",
            task="coarse",
            trains=("guide.coarse.",),
            steps=2000 * times,
            learning_rate=1e-3,
            losses=LossWeights(pixel=0.0, hole=1.0),
            draws=(
                Draw(probability=0.40, batch=6, side_px=192, factor=1),
                Draw(probability=0.40, batch=4, side_px=256, factor=2),
                Draw(probability=0.20, batch=6, side_px=128, factor=3),
            ),
        ),
        Stage(
            name="inpainting",
            task="inpainting",
            trains=("guide.refine.", "local.head."),  # trained beside it, the coarse network falls silent
            steps=5000 * times,
            learning_rate=4e-4,
            losses=LossWeights(pixel=0.0, hole=1.0, edge=0.1),
            window_px=160,
            draws=DAMAGED,
        ),
        Stage(
            name="super-resolution",
            task="super-resolution",
            trains=LOCAL,
            steps=12000 * times,
            learning_rate=1e-3,
            losses=LossWeights(pixel=1.0),
            draws=INTACT,
        ),
        Stage(
            name="joint",
            task="joint",
            trains=("",),
            steps=8000 * times,
            learning_rate=3e-4,
            guide_rate_factor=0.1,
            losses=LossWeights(pixel=1.0, hole=0.05, edge=0.1),
            window_px=64,
            draws=BOTH,
        ),
    )


def _adversarial() -> Stage:
    return Stage(
        name="adversarial",
        task="joint",
        trains=("guide.refine.", "local."),
        steps=3000,
        learning_rate=1e-4,
        losses=LossWeights(
            pixel=1.0, hole=0.05, edge=0.1, frequency=0.05, perceptual=0.1, style=0.05, adversarial=0.005
        ),
        window_px=64,
        draws=BOTH,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    make.__name__: make for make in (lite, lite_scan, detector, realtime, full, gan, heritage, medical, report)
}
