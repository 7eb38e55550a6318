"""What both recipes work on: roles, optimisers and random numbers of a run, and how a role is moved."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute import optim, rng
from rtdmd_cli.engine.compute.device import float32_matmul
from rtdmd_cli.engine.compute.mixed import MixedPrecision
from rtdmd_cli.engine.compute.processes import ALONE, Processes
from rtdmd_cli.engine.roles.base import RoleSet

ROLES = ("fake", "generator")
"""The roles that are trained, in the order of their turns."""


@dataclass
class Trainer:
    """What the recipe works on. `conditioning` gives the encoded prompts of a list of prompt indices."""

    backbone: Backbone
    roles: RoleSet
    config: DistillConfig
    sigmas: tuple[float, ...]
    eta: float
    guidance: tuple[float, float]
    shape: tuple[int, int, int]
    prompts: int
    conditioning: Callable[[Sequence[int]], Conditioning]
    empty: Conditioning
    fake_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    generator_updates: int = 0
    processes: Processes = ALONE
    matmul: str = "highest"
    mixed: MixedPrecision = field(default_factory=MixedPrecision)
    metrics: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Within the block, products as `hardware.float32_matmul` and `hardware.mixed_precision` say."""
        with float32_matmul(self.matmul, self.backbone.device), self.mixed.active():
            yield


@dataclass(frozen=True)
class Draws:
    """Random numbers of one micro-batch: the samples `indices` of `iteration`, in one turn."""

    trainer: Trainer
    turn: str
    iteration: int
    indices: Sequence[int]

    def normal(self, stream: str) -> Tensor:
        """Standard normal [b,C,H,W] float32, on the model's device."""
        shape, seed = self.trainer.shape, self.trainer.config.seed
        draw = rng.normal(shape, seed, f"{self.turn}/{stream}", self.iteration, self.indices)
        return draw.to(self.trainer.backbone.device)

    def uniform(self, stream: str) -> Tensor:
        """Uniform in [0, 1), [b] float32, on the CPU."""
        seed = self.trainer.config.seed
        return rng.uniform(0.0, 1.0, seed, f"{self.turn}/{stream}", self.iteration, self.indices)

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        """Integers in [low, high), [b], on the CPU."""
        seed = self.trainer.config.seed
        return rng.integers(low, high, seed, f"{self.turn}/{stream}", self.iteration, self.indices)


def micro_batches(
    trainer: Trainer, turn: str, iteration: int, prompts: Tensor
) -> Iterator[tuple[Draws, Conditioning, float]]:
    """This process's part of the batch, in parts: random draws, encoded prompts on the device, the share of the batch."""
    own = trainer.processes.part(len(prompts))
    for part in parts_of(own, trainer.config.micro_batch):
        cond = trainer.conditioning(prompts[list(part)].tolist())
        draws = Draws(trainer, turn, iteration, part)
        yield draws, cond.to(trainer.backbone.device, trainer.backbone.dtype), len(part) / len(prompts)


def parts_of(samples: range, size: int | None) -> list[range]:
    """The samples in runs of `size`, the last one perhaps shorter; None for all at once."""
    step = size or len(samples)
    return [samples[start : start + step] for start in range(0, len(samples), step)]


def move_role(
    trainer: Trainer, role: str, optimizer: torch.optim.Optimizer, rate: float, iteration: int
) -> None:
    """Check, clip and move one role at this learning rate; it stays if a gradient is not finite."""
    parameters = [(f"{role}/{name}", parameter) for name, parameter in trainer.roles.named_parameters(role)]
    trainer.processes.sum_gradients([parameter for _, parameter in parameters])
    norm = optim.clip_and_check(parameters, trainer.config.grad_clip, iteration + 1)
    trainer.metrics[f"{role}_grad_norm"] = (
        norm / trainer.processes.count
    )  # figures are summed over the processes
    optim.set_learning_rate(optimizer, rate)
    optimizer.step()


def check_weights(trainer: Trainer, iteration: int) -> None:
    """Raise NumericalError, naming the first, if a weight of fake score or generator is not finite.

    Before a turn and not after it, when every loss would be nan and hide where that comes from.
    """
    named = [(f"{role}/{name}", p) for role in ROLES for name, p in trainer.roles.named_parameters(role)]
    with torch.no_grad():
        if math.isfinite(float(torch.nn.utils.get_total_norm([parameter for _, parameter in named]))):
            return
    for name, parameter in named:
        optim.check_finite(f"The weight {name}", parameter, iteration + 1)


def add(trainer: Trainer, figures: dict[str, Tensor], share: float) -> None:
    """Accumulate figures of a part of the batch."""
    for name, value in figures.items():
        trainer.metrics[name] = trainer.metrics.get(name, 0.0) + share * float(value.detach())
