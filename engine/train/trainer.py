"""One stage of training, step by step: a network, its averages, a critic, their optimisers. No Ray, no files.

Everything that a step depends on follows from the recipe, the state and the number of the step: nothing is drawn from
a generator that lives longer. On one machine, with the same number of threads, a run that goes on from a state makes
the same steps, bit for bit, as one that never ended.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from engine.errors import TrainingError
from engine.memory import keep_freed_memory
from engine.models.checkpoint import build
from engine.models.cra_srgan.generator import CraSrgan
from engine.models.cra_srgan.layers import Recomputing
from engine.train.checkpoints import State
from engine.train.dataset import Batch
from engine.train.discriminator import Discriminator
from engine.train.recipes import Recipe
from engine.train.stages import Stage
from engine.train.step import Features, Found, Logs, Objective, Telling

MAX_BAD_STEPS = 3
LEAST_RATE = 0.01
"""Of the peak, at the end of a stage."""

Wrap = Callable[[nn.Module], nn.Module]
"""Makes a module one of several processes that train together."""


class Trainer:
    """One stage of a run."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        num_steps: int,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        start: Mapping[str, Tensor] | None = None,
        vgg19: Features | None = None,
        teacher: CraSrgan | None = None,
        wrap: Wrap | None = None,
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        """`start`: weights to begin with, by their names, as far as they fit; `vgg19`: for stages that compare its
        features; `teacher`: padded as what is trained, for stages that weigh what it says.

        recompute: gradient checkpointing; compiled: by `torch.compile`, for the device that it runs on.
        """
        torch.manual_seed(recipe.seed)  # pyright: ignore[reportUnknownMemberType]
        keep_freed_memory()
        torch.set_flush_denormal(True)  # gradients fade out of known regions: denormals make a step four times as long
        self.recipe, self.stage, self.num_steps = recipe, stage, num_steps
        self.device, self.precision = torch.device(device), precision
        self.network = build(recipe.model, padding="same").on(self.device)
        if start is not None:
            own = self.network.state_dict()
            fit = {name: value for name, value in start.items() if name in own and own[name].shape == value.shape}
            if start and not fit:
                raise TrainingError(
                    f"0 of the {len(start)} tensors to start from are of the network of {recipe.name}, which has "
                    f"{len(own)}; give --start-from a model of its kind"
                )
            self.network.load_state_dict(fit, strict=False)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trains))
        for module in self.network.modules():
            if isinstance(module, Recomputing):
                module.recompute = recompute
        self.critic = Discriminator().to(self.device) if stage.losses.adversarial else None
        self._compared = self._features(vgg19)
        self._teacher = None if teacher is None else teacher.on(self.device)
        objective = self._alone()
        self._objective = objective if wrap is None else wrap(objective)
        if compiled:
            self._objective.compile()  # pyright: ignore[reportUnknownMemberType]
        self._optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0.0)
        self._telling: nn.Module | None = None
        self._critic_optimiser: torch.optim.AdamW | None = None
        if self.critic is not None:
            telling = Telling(self.critic, stage)
            self._telling = telling if wrap is None else wrap(telling)
            group = {"params": list(self.critic.parameters()), "factor": 1.0, "lr": stage.learning_rate}
            self._critic_optimiser = torch.optim.AdamW([group], betas=(0.9, 0.99), weight_decay=0.0)
        self.state = State()
        self.averages = {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def _features(self, vgg19: Features | None) -> Features | None:
        """Never those of a random network: the critic learns beside."""
        if not self.stage.losses.needs_features:
            return None
        found = vgg19 if self.stage.features == "vgg19" else self.critic
        assert found is not None, "check the stage first"
        return found

    def _alone(self) -> Objective:
        """The objective as it is without other processes."""
        return Objective(self.network, self.stage, critic=self.critic, features=self._compared, teacher=self._teacher)

    def _groups(self) -> list[dict[str, object]]:
        rate = self.stage.learning_rate
        named = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        guide = [p for name, p in named if name.startswith("guide.")]
        rest = [p for name, p in named if not name.startswith("guide.")]
        groups = [(rest, 1.0), (guide, self.stage.guide_rate_factor)]
        return [{"params": parameters, "factor": factor, "lr": rate} for parameters, factor in groups if parameters]

    def rate(self) -> float:
        """The learning rate of the next step: cosine to 1 % of the peak, after a linear warm-up."""
        step = self.state.step
        warm = min(1.0, (step + 1) / self.recipe.warmup_steps)
        fallen = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        return self.stage.learning_rate * warm * (LEAST_RATE + (1 - LEAST_RATE) * fallen)

    def advance(self, batch: Batch) -> Logs:
        """One step; skipped where it is not finite. Raises TrainingError after three of these in a row."""
        found = self._found(batch.to(self.device))
        good = self._step(found.loss, self.network, self._optimiser)
        if good:
            self._average()
        told = self._tell(found)
        logs = {"loss": float(found.loss.detach()), **found.logs}
        if told is not None:
            assert self.critic is not None
            assert self._critic_optimiser is not None
            good &= self._step(told, self.critic, self._critic_optimiser)
            logs["critic"] = float(told.detach())
        self.state.skipped += not good
        self.state.bad = 0 if good else self.state.bad + 1
        self.state.step += 1
        if self.state.bad >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{self.stage.name}: {self.state.bad} steps in a row were not finite (limit {MAX_BAD_STEPS}) at step "
                f"{self.state.step}; look at the pictures, or train in another folder with a lower learning rate"
            )
        return logs

    @torch.no_grad()
    def look(self, batch: Batch) -> Found:
        """What the averaged weights make of a batch; nothing changes."""
        now = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.network.load_state_dict(self.averages, strict=False)
        found = self._looked_at(batch)
        self.network.load_state_dict(now, strict=False)
        return found

    def _looked_at(self, batch: Batch) -> Found:
        if self.critic is not None:
            self.critic.eval()  # or its spectral norms would go on
        found = self._alone()(batch.to(self.device))
        if self.critic is not None:
            self.critic.train()
        return found

    def _found(self, batch: Batch) -> Found:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._objective(batch)

    def held_bytes(self, batch: Batch) -> int:
        """What a step on a batch keeps for its way back, beside the weights, once each storage."""
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with (
            torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            found = self._looked_at(batch)
        del found
        modules = [part for part in (self.network, self.critic, self._compared, self._teacher) if part is not None]
        own = {tensor.untyped_storage().data_ptr() for part in modules for tensor in _tensors(part)}
        return sum(num_bytes for where, num_bytes in held.items() if where not in own)

    def _step(self, loss: Tensor, module: nn.Module, optimiser: torch.optim.Optimizer) -> bool:
        """Whether a module was changed: not where the loss or its slope is not finite, in any of the processes."""
        for group in optimiser.param_groups:
            group["lr"] = self.rate() * cast("float", group["factor"])
        optimiser.zero_grad(set_to_none=True)
        (loss * (1 + 0 * loss.detach())).backward()  # pyright: ignore[reportUnknownMemberType]  # the slope of |nan| is 0
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
        if not bool(torch.isfinite(norm)):
            return False
        optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        return True

    def _tell(self, found: Found) -> Tensor | None:
        """What the critic has to pay for the pictures of this step."""
        if self._telling is None or not found.pairs:
            return None
        made, wanted = found.pairs[-1]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.state.step)
        share = torch.rand(len(made), 1, 1, 1, generator=generator).to(self.device)
        return self._telling(wanted, made.detach(), share)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                self.averages[name].lerp_(parameter.detach(), 1 - decay)

    # Going on.

    def saved(self) -> State:
        """All that `restore` needs."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.averages.items()}
        tensors |= _memory("optimiser", self._optimiser)
        if self.critic is not None and self._critic_optimiser is not None:
            tensors |= {f"critic.{name}": value for name, value in self.critic.state_dict().items()}
            tensors |= _memory("critic_optimiser", self._critic_optimiser)
        kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        state = self.state
        return State(state.step, state.skipped, state.bad, state.seconds, kept)

    def restore(self, state: State) -> None:
        """Goes on where `saved` was taken. Raises TrainingError for a state of another network."""
        tensors = state.tensors
        try:
            self.network.load_state_dict(_below("network", tensors))
            self.averages = {name: value.to(self.device) for name, value in _below("average", tensors).items()}
            _remember(self._optimiser, _below("optimiser", tensors))
            if self.critic is not None and self._critic_optimiser is not None:
                self.critic.load_state_dict(_below("critic", tensors))
                _remember(self._critic_optimiser, _below("critic_optimiser", tensors))
        except RuntimeError as error:
            raise TrainingError(f"the state of stage {self.stage.name} is of another network: {error}") from error
        self.state = State(state.step, state.skipped, state.bad, state.seconds)


def _tensors(part: object) -> Iterator[Tensor]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()


def averages_of(state: State) -> dict[str, Tensor]:
    """The averaged weights that a state holds."""
    return _below("average", state.tensors)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _memory(prefix: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<prefix>.<number of the parameter>.<what>`"""
    memory = cast("dict[int, dict[str, Tensor]]", optimiser.state_dict()["state"])
    return {f"{prefix}.{number}.{what}": value for number, kept in memory.items() for what, value in kept.items()}


def _remember(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    memory: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, what = name.partition(".")
        memory.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": memory})
