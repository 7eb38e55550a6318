"""Distribution matching on rollouts of the generator (method, section 3), as both stages use it.

    fake score    x_s of a rollout, diffused to a time t above it; the exact velocity there; self-consistency
    generator     the same kind of x_t, carried back to s by teacher and by fake score; x_s moves towards the teacher's

The functions add gradients, scaled to the batch; the recipes decide when a role moves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig
from rtdmd_cli.engine.algo.flow import cps_step, move, to_x0
from rtdmd_cli.engine.algo.gradients import bound_gradients
from rtdmd_cli.engine.algo.losses import consistency_loss, dmd_loss, fake_score_loss
from rtdmd_cli.engine.algo.subinterval import (
    clean_parts,
    consistency_time,
    renoise,
    renoise_time,
    velocity_target,
)
from rtdmd_cli.engine.backbones.base import Conditioning, concatenate
from rtdmd_cli.engine.sampling.sample import guided
from rtdmd_cli.engine.training.trainer import Draws, Trainer, add, back_propagate, micro_batches


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


def add_fake_gradients(trainer: Trainer, turn: str, iteration: int, prompts: Sequence[int]) -> None:
    """Accumulate the gradients of the fake score's loss on fresh rollouts, one for each prompt index."""
    with trainer.processes.agreeing():
        for draws, cond, share in micro_batches(trainer, turn, iteration, prompts):
            with trainer.roles.role("generator"), torch.no_grad():
                points = list(rollout(trainer, draws, cond))
            with trainer.roles.role("fake", train=True):
                for group in evaluated_together(trainer, points):
                    loss = fake_loss(trainer, draws, group, cond, share / len(points))
                    back_propagate(trainer, "The fake-score loss", loss)


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
    return velocity(x, move(t, x.device)).chunk(len(places))


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
    level, velocity = move(t_next, x_t.device), trainer.backbone.velocity
    if config.consistency_batched:
        both = velocity(torch.cat(starts), torch.cat([level, level]), concatenate([cond, cond]))
        velocities = both.chunk(2)
    else:
        velocities = tuple(velocity(x, level, cond) for x in starts)
    return [to_x0(x, t_next, w) for x, w in zip(starts, velocities, strict=True)]


def add_matching_gradients(
    trainer: Trainer, turn: str, iteration: int, prompts: Sequence[int], weight: float = 1.0
) -> None:
    """Accumulate `weight` times the gradients of distribution matching on fresh rollouts, one for each prompt index."""
    with trainer.processes.agreeing():
        for draws, cond, share in micro_batches(trainer, turn, iteration, prompts):
            with trainer.roles.role("generator", train=True):
                used = len(boundaries_in_use(trainer, draws))
                for group in evaluated_together(trainer, rollout(trainer, draws, cond)):
                    loss = matching_loss(trainer, draws, group, cond, share / used)
                    back_propagate(trainer, "The generator loss", loss, weight)


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
    if trainer.config.boundaries == "every":
        return list(range(1, len(trainer.sigmas)))
    return [trainer.boundary(trainer, draws.turn, draws.iteration)]
