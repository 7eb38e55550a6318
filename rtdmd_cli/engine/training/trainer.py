"""What both recipes work on: roles, optimisers and random numbers of a run, and how a role is moved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig
from rtdmd_cli.engine.algo.flow import move
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute import optim, rng
from rtdmd_cli.engine.compute.device import float32_matmul
from rtdmd_cli.engine.compute.mixed import MixedPrecision
from rtdmd_cli.engine.compute.processes import ALONE, Processes
from rtdmd_cli.engine.roles.base import RoleSet

ROLES = ("fake", "generator")
"""The roles that are trained, in the order of their turns."""


def on_host(values: Tensor) -> list[float]:
    """The numbers of a vector; waits for the device."""
    numbers: list[float] = values.tolist()
    return numbers


def drawn_boundary(trainer: "Trainer", turn: str, iteration: int) -> int:
    """The step at which the rollouts of a turn stop where `distill.boundaries` is one: from 1 to their number."""
    steps, seed = len(trainer.sigmas) - 1, trainer.config.seed
    return int(rng.integers(1, steps + 1, seed, f"{turn}/boundary", iteration, [0]))


@dataclass
class Trainer:
    """What the recipe works on. `conditioning` gives the encoded prompts of a list of prompt indices.

    metrics: the figures of an iteration, on the host. pending: those that are still on the device, and checked: the
    losses that gradients came from, summed by their names; `move_role` reads both, in one transfer, before a role moves.
    read: that transfer, the one place where a turn waits for the device. boundary: see `drawn_boundary`.
    before_move: is given the name of a role that is about to move.
    """

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
    pending: dict[str, Tensor] = field(default_factory=dict)
    checked: dict[str, Tensor] = field(default_factory=dict)
    read: Callable[[Tensor], list[float]] = on_host
    boundary: Callable[["Trainer", str, int], int] = drawn_boundary
    before_move: Callable[[str], None] = lambda role: None

    def begin(self) -> None:
        """Forget the figures of the iteration before."""
        self.metrics, self.pending, self.checked = {}, {}, {}

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Within the block, products as `hardware.float32_matmul` and `hardware.mixed_precision` say."""
        with float32_matmul(self.matmul, self.backbone.device), self.mixed.active():
            yield


def optimizer_of(trainer: Trainer, role: str) -> torch.optim.Optimizer:
    """The optimiser of "fake" or "generator"."""
    return trainer.fake_optimizer if role == "fake" else trainer.generator_optimizer


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
        return move(draw, self.trainer.backbone.device)

    def uniform(self, stream: str) -> Tensor:
        """Uniform in [0, 1), [b] float32, on the CPU."""
        seed = self.trainer.config.seed
        return rng.uniform(0.0, 1.0, seed, f"{self.turn}/{stream}", self.iteration, self.indices)

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        """Integers in [low, high), [b], on the CPU."""
        seed = self.trainer.config.seed
        return rng.integers(low, high, seed, f"{self.turn}/{stream}", self.iteration, self.indices)


def micro_batches(
    trainer: Trainer, turn: str, iteration: int, prompts: Sequence[int]
) -> Iterator[tuple[Draws, Conditioning, float]]:
    """This process's part of the batch, in parts: random draws, encoded prompts on the device, the share of the batch."""
    own = trainer.processes.part(len(prompts))
    for part in parts_of(own, trainer.config.micro_batch):
        cond = trainer.conditioning([prompts[sample] for sample in part])
        draws = Draws(trainer, turn, iteration, part)
        yield draws, cond.to(trainer.backbone.device, trainer.backbone.dtype), len(part) / len(prompts)


def parts_of(samples: range, size: int | None) -> list[range]:
    """The samples in runs of `size`, the last one perhaps shorter; None for all at once."""
    step = size or len(samples)
    return [samples[start : start + step] for start in range(0, len(samples), step)]


def back_propagate(trainer: Trainer, name: str, loss: Tensor, weight: float = 1.0) -> None:
    """Accumulate `weight` times the gradient of a loss, and keep the loss to be checked before a role moves.

    name: of the loss, for the message, as in "The generator loss".
    """
    check(trainer, name, loss)
    (weight * loss).backward()


def check(trainer: Trainer, name: str, value: Tensor) -> None:
    """Keep a scalar that must be finite before a role moves. Sums hold whatever is nan or infinite in any of the parts."""
    kept = value.detach().float()
    trainer.checked[name] = trainer.checked[name] + kept if name in trainer.checked else kept


def add(trainer: Trainer, figures: Mapping[str, Tensor], share: float) -> None:
    """Accumulate figures of a part of the batch, on the device."""
    for name, value in figures.items():
        part = share * value.detach().float()
        trainer.pending[name] = trainer.pending[name] + part if name in trainer.pending else part


def move_role(
    trainer: Trainer, role: str, optimizer: torch.optim.Optimizer, rate: float, iteration: int
) -> None:
    """Read the turn's figures, check, clip and move one role at this learning rate.

    Raises NumericalError, naming the first, if a weight of fake score or generator, a loss, or a gradient of this role is
    not finite; nothing has moved then. Weights are looked at first: of one that is not finite every loss would be nan.
    """
    parameters = [(f"{role}/{name}", parameter) for name, parameter in trainer.roles.named_parameters(role)]
    trainer.processes.sum_gradients([parameter for _, parameter in parameters])
    total = optim.gradient_norm(parameters)
    with trainer.processes.agreeing():
        norm = read_figures(trainer, total, parameters, iteration)
    trainer.metrics[f"{role}_grad_norm"] = (
        norm / trainer.processes.count
    )  # figures are summed over the processes
    optim.clip(parameters, trainer.config.grad_clip, total)
    trainer.before_move(role)
    optim.set_learning_rate(optimizer, rate)
    optimizer.step()


@torch.no_grad()
def read_figures(
    trainer: Trainer, total: Tensor, parameters: Sequence[tuple[str, torch.nn.Parameter]], iteration: int
) -> float:
    """The gradients' norm; pending figures become metrics. NumericalError for what is not finite, see `move_role`."""
    named = [(f"{role}/{name}", p) for role in ROLES for name, p in trainer.roles.named_parameters(role)]
    weights = torch.nn.utils.get_total_norm([parameter for _, parameter in named])
    losses, figures = list(trainer.checked), list(trainer.pending)
    kept = [*trainer.checked.values(), *trainer.pending.values()]
    values = iter(trainer.read(torch.stack([weights.float(), total.float(), *kept])))
    if not math.isfinite(next(values)):
        for name, parameter in named:
            optim.check_finite(f"The weight {name}", parameter, iteration + 1)
    norm = next(values)
    for name in losses:
        if not math.isfinite(next(values)):
            optim.check_finite(name, trainer.checked[name], iteration + 1)
    trainer.metrics |= {name: next(values) for name in figures}
    optim.require_finite_norm(norm, parameters, iteration + 1)
    trainer.pending, trainer.checked = {}, {}
    return norm
