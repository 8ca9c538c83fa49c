"""The curriculum as data: what each stage trains, on what, for how long."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import TrainingError
from engine.geometry import ceil_div
from engine.train.losses import Adversarial

Task = Literal["head", "coarse", "inpainting", "super-resolution", "joint", "detection"]

GLOBAL = ("guide.", "local.head.")
LOCAL = (
    "local.null_guide",
    "local.trunk.",
    "local.fusion.",
    "local.edge.",
    "local.frequency.",
    "local.adapt.",
    "local.clean.",
    "local.stages.",
)


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the summed losses; zero leaves one out."""

    pixel: float = 1.0
    """Of the composite and of what is enlarged from it."""
    hole: float = 1.0
    """Of the fills; an error there of the harmonic fill's size counts 1."""
    edge: float = 0.0
    """Of Sobel gradients."""
    laplacian: float = 0.0
    frequency: float = 0.0
    perceptual: float = 0.0
    style: float = 0.0
    adversarial: float = 0.0
    taught: float = 0.0
    """Of the enlarged pictures, beside `pixel`: against those of a teacher."""
    dice: float = 0.0
    """Of masks, beside the cross-entropy, which `pixel` weighs."""

    @property
    def needs_features(self) -> bool:
        return self.perceptual > 0 or self.style > 0


@dataclass(frozen=True, slots=True)
class Draw:
    """One kind of batch and how often it is drawn."""

    probability: float
    batch: int
    side_px: int
    """Guide side (damaged batches) or input side (others), in pixels, a multiple of 8; for detection of 16."""
    factor: int = 0
    """Native pixels per guide pixel; 0 draws intact pictures without a guide."""
    levels: int = 0
    """Number of x2 steps supervised."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum. Its weights start from those that the stages before it trained."""

    name: str
    task: Task
    trains: tuple[str, ...]
    """Prefixes of the parameters that this stage changes."""
    learning_rate: float
    draws: tuple[Draw, ...]
    losses: LossWeights
    steps: int = 0
    epochs: int = 0
    """In place of steps: so often as many crops as there are pictures."""
    pixel_loss: Literal["charbonnier", "l1"] = "charbonnier"
    adversarial: Adversarial = "relativistic"
    features: Literal["vgg19", "discriminator"] = "discriminator"
    """What perceptual and style losses compare: a file that the user gives, or the critic of the same stage."""
    guide_rate_factor: float = 1.0
    """Learning rate of the guide relative to the rest."""
    degraded: bool = False
    """Whether intact pictures are made into bad copies before they are to be enlarged."""
    window_px: int = 96
    """Side of the native window on which the local half is trained (damaged batches)."""

    def check(self, *, vgg19: bool, teacher: bool) -> None:
        """Raises TrainingError where a loss needs what is not given."""
        if self.losses.needs_features and self.features == "vgg19" and not vgg19:
            raise TrainingError(
                f"stage {self.name} compares features of VGG19, 0 files of its weights are given; "
                "give --features FILE (torchvision's vgg19)"
            )
        if self.losses.needs_features and self.features == "discriminator" and not self.losses.adversarial:
            raise TrainingError(
                f"stage {self.name} compares features of a critic, 0 losses train it; weigh an adversarial one"
            )
        if self.losses.taught and not teacher:
            raise TrainingError(
                f"stage {self.name} learns from a teacher, 0 are given; give --teacher NAME or FILE of a model"
            )

    @property
    def widest_px(self) -> int:
        """The side of its largest crops."""
        return max(draw.side_px * max(draw.factor, 1) << draw.levels for draw in self.draws)

    def num_steps(self, num_pictures: int) -> int:
        """How many steps it has with so many pictures."""
        batch = sum(draw.probability * draw.batch for draw in self.draws)
        return self.steps or ceil_div(self.epochs * num_pictures, max(1, round(batch)))
