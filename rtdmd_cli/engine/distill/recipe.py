"""Stage 1: turn a many-step flow model into a few-step generator (method, section 3).

    rtdmd distill --preset shapes-4step

One iteration, on prompts drawn for it:

    fake's turn        roll the generator out; at each boundary s diffuse x_s to a time t above it; fit the
                       fake score's velocity to the exact one, and make its clean prediction self-consistent
    generator's turn   every `fake_per_generator`-th iteration: a fresh rollout on the same prompts; carry
    (fake first)       the same x_t back to s with teacher and with fake score; move x_s towards the teacher's

The teacher, the fake score and the generator are one network with different adapters (`roles.py`). Every
random number is keyed by (seed, stream, iteration, sample), so that micro-batches and resumed runs see the
same ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig
from rtdmd_cli.engine.algo.flow import cps_step, to_x0
from rtdmd_cli.engine.algo.gradients import bound_gradients
from rtdmd_cli.engine.algo.losses import consistency_loss, dmd_loss, fake_score_loss
from rtdmd_cli.engine.algo.subinterval import (
    clean_parts,
    consistency_time,
    renoise,
    renoise_time,
    velocity_target,
)
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, concatenate
from rtdmd_cli.engine.compute import optim, rng
from rtdmd_cli.engine.compute.device import float32_matmul
from rtdmd_cli.engine.compute.mixed import MixedPrecision
from rtdmd_cli.engine.compute.processes import ALONE, Processes
from rtdmd_cli.engine.roles.adapters import RoleSet
from rtdmd_cli.engine.sampling.sample import guided

ROLES = ("fake", "generator")
"""The roles that are trained, in the order of their turns."""


@dataclass(frozen=True)
class Boundary:
    """Where a transition of a rollout lands: noise level s, x_s [B,C,H,W], the clean prediction behind it.

    With `distill.interval` full it is the clean prediction itself, at s = 0: plain distribution matching.
    """

    s: float
    x_s: Tensor
    x0: Tensor


Point = tuple[int, Boundary]
"""A step of a rollout, by its number, and where it landed."""


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


def iterate(trainer: Trainer, iteration: int) -> None:
    """One iteration (0-based; errors count from 1). Leaves its figures in `trainer.metrics`.

    Raises NumericalError before a role moves by a value that is not finite.
    """
    config = trainer.config
    trainer.metrics = {}
    prompts = chosen_prompts(trainer, iteration)
    update_fake_score(trainer, iteration, prompts)
    if (iteration + 1) % config.fake_per_generator == 0:
        update_generator(trainer, iteration, prompts)
    trainer.metrics = trainer.processes.sum_figures(trainer.metrics)


def chosen_prompts(trainer: Trainer, iteration: int) -> Tensor:
    """Prompt index of each sample of an iteration [B]."""
    config = trainer.config
    return rng.integers(0, trainer.prompts, config.seed, "prompts", iteration, range(config.batch))


def update_fake_score(trainer: Trainer, iteration: int, prompts: Tensor) -> None:
    """The fake score's turn: velocity matching on the generator's samples, and the regulariser."""
    check_weights(trainer, iteration)
    trainer.fake_optimizer.zero_grad(set_to_none=True)
    add_fake_gradients(trainer, "fake", iteration, prompts)
    config = trainer.config
    total = config.iterations if config.lr_decay == "both" else None
    rate = optim.learning_rate_at(iteration, config.fake_lr, config.lr_warmup, total)
    move_role(trainer, "fake", trainer.fake_optimizer, rate, iteration)


def add_fake_gradients(trainer: Trainer, turn: str, iteration: int, prompts: Tensor) -> None:
    """Accumulate the gradients of the fake score's loss on fresh rollouts, one for each of `prompts` [B]."""
    with trainer.processes.agreeing():
        for draws, cond, share in micro_batches(trainer, turn, iteration, prompts):
            with trainer.roles.role("generator"), torch.no_grad():
                points = list(rollout(trainer, draws, cond))
            with trainer.roles.role("fake", train=True):
                for group in evaluated_together(trainer, points):
                    loss = fake_loss(trainer, draws, group, cond, share / len(points))
                    optim.check_finite("The fake-score loss", loss, iteration + 1)
                    loss.backward()


def fake_loss(
    trainer: Trainer, draws: Draws, points: Sequence[Point], cond: Conditioning, share: float
) -> Tensor:
    """`share` times (fake-score loss + w consistency loss), summed over the points; the fake score is active."""
    config, total = trainer.config, torch.zeros((), device=trainer.backbone.device)
    noised = [noise_up(trainer, draws, point) for point in points]
    velocities = velocities_at(trainer, [(x_t, t) for x_t, t, _ in noised], cond)
    for (number, boundary), (x_t, t, noise), v in zip(points, noised, velocities, strict=True):
        u_scaled, scale = velocity_target(boundary.x_s, boundary.s, t, noise)
        matching = fake_score_loss(v, u_scaled, scale, config.max_weight).loss
        matching = boundary_weight(config, boundary.s) * matching
        add(trainer, {"fake_loss": matching}, share)
        total = total + share * matching
        if config.consistency_weight > 0:
            h_1, h_2 = consistency_predictions(trainer, draws, number, x_t, t, v.detach(), cond)
            consistency = consistency_loss(to_x0(x_t, t, v), h_1, h_2).loss
            add(trainer, {"consistency_loss": consistency}, share)
            total = total + share * config.consistency_weight * consistency
    return total


def noise_up(trainer: Trainer, draws: Draws, point: Point) -> tuple[Tensor, Tensor, Tensor]:
    """Diffuse a boundary from s to a random t above it: x_t [b,C,H,W], t [b] (every sample its own), the noise."""
    config, (number, boundary) = trainer.config, point
    u = draws.uniform(f"{number}/time")
    t = renoise_time(u, boundary.s, config.t_margin, config.t_min, config.t_max)
    noise = draws.normal(f"{number}/renoise")
    return renoise(boundary.x_s, boundary.s, t, noise), t, noise


def velocities_at(
    trainer: Trainer,
    places: Sequence[tuple[Tensor, Tensor]],
    cond: Conditioning,
    guidance: float | tuple[float, float] = 1.0,
) -> Sequence[Tensor]:
    """The active role's velocity at each (x [b,C,H,W], t [b]), all in one evaluation."""
    x, t = torch.cat([x for x, _ in places]), torch.cat([t for _, t in places])
    velocity = guided(trainer.backbone, concatenate([cond] * len(places)), trainer.empty, guidance)
    return velocity(x, t.to(x.device)).chunk(len(places))


def boundary_weight(config: DistillConfig, s: float) -> float:
    """Weight of a boundary in the fake-score loss: 1 (published), or (1-s)^2.

    The target's part -x_s/(1-s) grows without bound towards s = 1: at s = 0.9 it makes the loss some hundred
    times that of s = 0, and its noise the larger part of a gradient that holds every boundary.
    """
    return 1.0 if config.boundary_weight == "published" else (1 - s) ** 2


def consistency_predictions(
    trainer: Trainer, draws: Draws, number: int, x_t: Tensor, t: Tensor, v: Tensor, cond: Conditioning
) -> list[Tensor]:
    """Clean predictions after two independent CPS transitions from x_t to a later time t'."""
    config = trainer.config
    t_next = consistency_time(
        t, draws.integers(f"{number}/consistency step", 1, config.consistency_max_step + 1)
    )
    starts = [
        cps_step(x_t, v, t, t_next, trainer.eta, draws.normal(f"{number}/consistency {pick}"))
        for pick in (1, 2)
    ]
    level, velocity = t_next.to(x_t.device), trainer.backbone.velocity
    if config.consistency_batched:
        both = velocity(torch.cat(starts), torch.cat([level, level]), concatenate([cond, cond]))
        velocities = both.chunk(2)
    else:
        velocities = tuple(velocity(x, level, cond) for x in starts)
    return [to_x0(x, t_next, w) for x, w in zip(starts, velocities, strict=True)]


def update_generator(trainer: Trainer, iteration: int, prompts: Tensor) -> None:
    """The generator's turn: distribution matching at every boundary in use, then the EMA."""
    check_weights(trainer, iteration)
    trainer.generator_optimizer.zero_grad(set_to_none=True)
    add_matching_gradients(trainer, "generator", iteration, prompts)
    config, done = trainer.config, trainer.generator_updates
    total = config.iterations // config.fake_per_generator if config.lr_decay != "none" else None
    rate = optim.learning_rate_at(done, config.generator_lr, config.lr_warmup, total)
    move_role(trainer, "generator", trainer.generator_optimizer, rate, iteration)
    decay = optim.ema_decay_at(done, config.ema_decay, config.ema_warmup)
    optim.ema_update(trainer.ema, trainer.roles.named_parameters("generator"), decay)
    trainer.generator_updates += 1


def add_matching_gradients(
    trainer: Trainer, turn: str, iteration: int, prompts: Tensor, weight: float = 1.0
) -> None:
    """Accumulate `weight` times the gradients of distribution matching on fresh rollouts, one for each of `prompts` [B]."""
    with trainer.processes.agreeing():
        for draws, cond, share in micro_batches(trainer, turn, iteration, prompts):
            with trainer.roles.role("generator", train=True):
                used = len(boundaries_in_use(trainer, draws))
                for group in evaluated_together(trainer, rollout(trainer, draws, cond)):
                    loss = matching_loss(trainer, draws, group, cond, share / used)
                    optim.check_finite("The generator loss", loss, iteration + 1)
                    (weight * loss).backward()


def matching_loss(
    trainer: Trainer, draws: Draws, points: Sequence[Point], cond: Conditioning, share: float
) -> Tensor:
    """`share` times the generator loss, summed over the points.

    The generator is active, also for the backward pass.
    """
    total = torch.zeros((), device=trainer.backbone.device)
    with torch.no_grad():
        noised = [noise_up(trainer, draws, point) for point in points]
        places = [(x_t, t) for x_t, t, _ in noised]
        with trainer.roles.role("teacher"):
            teacher = velocities_at(trainer, places, cond, trainer.guidance)
        with trainer.roles.role("fake"):
            fake = velocities_at(trainer, places, cond)
    for (number, boundary), (x_t, t), v_teacher, v_fake in zip(points, places, teacher, fake, strict=True):
        s = boundary.s
        noise = draws.normal(f"{number}/carry back")
        y_teacher = cps_step(x_t, v_teacher, t, s, trainer.eta, noise)
        y_fake = cps_step(x_t, v_fake, t, s, trainer.eta, noise)
        clean = clean_parts(boundary.x0, to_x0(x_t, t, v_teacher), s)
        reference = clean if trainer.config.normaliser == "noise-free" else None
        output = dmd_loss(boundary.x_s, y_fake, y_teacher, reference=reference)
        add(trainer, {"dmd_loss": output.loss, "gap": output.metrics["gap"]}, share)
        total = total + share * output.loss
    return total


def evaluated_together(trainer: Trainer, points: Iterable[Point]) -> Iterator[list[Point]]:
    """The points whose renoised latents share one evaluation: all, or each alone, which takes less memory."""
    if trainer.config.boundaries_batched:
        yield list(points)
    else:
        yield from ([point] for point in points)


def rollout(trainer: Trainer, draws: Draws, cond: Conditioning) -> Iterator[Point]:
    """CPS from pure noise with the active role, and the boundaries in use.

    Each transition starts from a detached latent: its gradient flows through its own evaluation alone. The last
    `distill.backprop_steps` transitions are joined, where that is more than 1: gradients flow on through all of them,
    bounded per sample. Transitions to a boundary that is not in use, and not among those, run without gradient.
    """
    used, sigmas, training = boundaries_in_use(trainer, draws), trainer.sigmas, torch.is_grad_enabled()
    last, x = max(used), draws.normal("initial")
    passed: list[Tensor] = []
    for number in range(last):
        sigma, s, joined = sigmas[number], sigmas[number + 1], number >= last - trainer.config.backprop_steps
        with torch.set_grad_enabled(training and (joined or number + 1 in used)):
            v = trainer.backbone.velocity(x, x.new_full(x.shape[:1], sigma), cond)
            x0 = to_x0(x, sigma, v)
            x_s = cps_step(x, v, sigma, s, trainer.eta, draws.normal(f"{number}/step")) if s > 0 else x0
        if number + 1 in used:
            clean = trainer.config.interval == "full"
            boundary = Boundary(0.0, x0, x0.detach()) if clean else Boundary(s, x_s, x0.detach())
            if passed and number + 1 == last:
                bound_gradients(boundary.x_s, passed)
            yield number, boundary
        x = x_s.detach()
        if training and joined and number + 1 < last:
            x = x_s.clone()  # of its own, so that the bound holds for what comes from later steps alone
            passed.append(x)


def boundaries_in_use(trainer: Trainer, draws: Draws) -> list[int]:
    """Steps whose landing points are trained on: all of them, or one drawn for the whole batch."""
    steps = len(trainer.sigmas) - 1
    if trainer.config.boundaries == "every":
        return list(range(1, steps + 1))
    seed = trainer.config.seed
    return [int(rng.integers(1, steps + 1, seed, f"{draws.turn}/boundary", draws.iteration, [0]))]


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
