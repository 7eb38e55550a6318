"""How models are sampled: one definition for `sample`, `eval` and the grids of a run.

The samplers are short functions over any `velocity(x, sigma)`, with the noise as an argument. What a base
model and a generator run is a `SamplingPlan`:

    teacher    Euler with guidance, on the stock schedule; with 4 steps (or as many as the preset's few-step
               schedule has) on the few-step schedule
    generator  CPS (coefficients-preserving sampling) with the preset's eta, without guidance, on the few-step
               schedule; with another number of steps, on raw steps that are evenly spaced
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rtdmd_cli.config.schema import ModelConfig, SamplerConfig
from rtdmd_cli.engine.algo.flow import cps_step, guidance_at, to_x0
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, concatenate
from rtdmd_cli.engine.backbones.common import evenly_spaced
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.compute.device import within_memory
from rtdmd_cli.engine.roles.base import RoleSet
from rtdmd_cli.errors import PictureFailure, UsageError

Kind = Literal["teacher", "generator", "start"]
"""Roles that pictures are drawn with; `start` is the generator that stage 2 began from."""
Velocity = Callable[[Tensor, Tensor], Tensor]  # x [B,C,H,W], sigma [B] -> v [B,C,H,W]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """`x' = x + (sigma' - sigma) v` along `sigmas`, from x [B,C,H,W] at `sigmas[0]` to `sigmas[-1]`."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * velocity(x, x.new_full(x.shape[:1], sigma))
    return x


def cps(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], eta: float, noises: Sequence[Tensor]
) -> Tensor:
    """CPS transitions (method, section 2) along `sigmas`, from x [B,C,H,W] at `sigmas[0]` to `sigmas[-1]`.

    `noises`: one [B,C,H,W] for each transition that ends above 0; the one that ends at 0 returns x0.
    A part of a schedule is a rollout that stops early: `cps(velocity, x, sigmas[: k + 1], eta, noises[:k])`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, x.new_full(x.shape[:1], sigma))
        x = cps_step(x, v, sigma, sigma_next, eta, noises[i]) if sigma_next > 0 else to_x0(x, sigma, v)
    return x


def guided(
    backbone: Backbone, cond: Conditioning, uncond: Conditioning | None, guidance: float | tuple[float, float]
) -> Velocity:
    """The active role's velocity for `cond`, with guidance where `guidance` isn't 1.

    Classifier-free guidance, or embedded guidance where the backbone has it. Differentiable in x.
    cond: one row a sample, on the backbone's device. uncond: one row, the encoded prompt "", needed by
    classifier-free guidance alone, for which both run in one batch of 2B.
    guidance: one scale, or two (at low and at high noise), with `guidance_at` between them.
    """

    def scale(sigma: Tensor) -> float | Tensor:
        return guidance_at(sigma, *guidance) if isinstance(guidance, tuple) else guidance

    if guidance in (1, (1, 1)):
        return lambda x, sigma: backbone.velocity(x, sigma, cond)
    if backbone.embedded_guidance:
        return lambda x, sigma: backbone.velocity(x, sigma, cond, scale(sigma))
    assert uncond is not None and len(uncond) == 1, "guidance needs the encoded empty prompt"
    empty = uncond.to(cond.embeds.device, cond.embeds.dtype).repeat(len(cond))
    both = concatenate([empty, cond])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v_uncond, v_cond = backbone.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return backbone.guide(v_cond, v_uncond, scale(sigma))

    return velocity


@dataclass(frozen=True)
class SamplingPlan:
    """How a picture is made. `sigmas` fall from 1 to 0; only generators use `eta`, only teachers `guidance`.

    embedded: guidance is an input of the network, not classifier-free.
    """

    kind: Kind
    sigmas: tuple[float, ...]
    guidance: float = 1.0
    eta: float = 0.0
    embedded: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def evaluations(self) -> int:
        """Network evaluations a picture; classifier-free guidance takes two a step."""
        return self.steps * (2 if self.needs_empty_prompt else 1)

    @property
    def needs_empty_prompt(self) -> bool:
        """Whether guidance is classifier-free."""
        return self.guidance != 1 and not self.embedded


def sampling_plan(
    kind: Kind,
    backbone: Backbone,
    model: ModelConfig,
    sampler: SamplerConfig,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> SamplingPlan:
    """The plan for a base model ("teacher") or a generator; `steps` and `guidance` override the preset's.

    size: height and width in pixels, on which FLUX's schedules depend; None for the preset's resolution.
    UsageError for steps, guidance or size out of range, and for guidance on a generator, which is made without.
    """
    if steps is not None and not 1 <= steps <= 1000:
        raise UsageError(f"--steps must lie between 1 and 1000, not {steps}.")
    if guidance is not None and not 1 <= guidance <= 100:
        raise UsageError(f"--guidance must lie between 1 and 100, not {guidance:g}.", "1 means none.")
    few = len(sampler.raw_steps)
    shape = backbone.latent_shape(*(size or (model.resolution, model.resolution)))
    if kind != "teacher":
        if guidance not in (None, 1):
            raise UsageError("A generator is sampled without guidance.", "Leave --guidance out, or give 1.")
        raw = few_step_levels(sampler) if steps in (None, few) else evenly_spaced(steps or few)
        return SamplingPlan(kind, _levels(backbone.sigmas(raw, shape)), eta=sampler.eta)
    steps = model.teacher_steps if steps is None else steps
    stock = steps != few
    sigmas = (
        backbone.stock_sigmas(steps, shape) if stock else backbone.sigmas(few_step_levels(sampler), shape)
    )
    scale = model.guidance if guidance is None else guidance
    return SamplingPlan(kind, _levels(sigmas), guidance=scale, embedded=backbone.embedded_guidance)


def few_step_levels(sampler: SamplerConfig) -> list[float]:
    """The preset's raw steps, in (0, 1]; `Backbone.sigmas` shifts them."""
    return [step / 1000 for step in sampler.raw_steps]


def _levels(sigmas: Tensor) -> tuple[float, ...]:
    return tuple(sigmas.tolist())


def initial_noise(shape: Sequence[int], seed: int, keys: Sequence[tuple[int, int]]) -> Tensor:
    """Standard normal [N, *shape], float32 on the CPU: row i depends on (seed, *keys[i]) alone."""
    return _noise(shape, seed, "sample/initial", [(prompt, image) for prompt, image in keys])


def step_noise(shape: Sequence[int], seed: int, keys: Sequence[tuple[int, int]], step: int) -> Tensor:
    """As `initial_noise`, for the transition number `step` of CPS."""
    return _noise(shape, seed, "sample/step", [(prompt, image, step) for prompt, image in keys])


def _noise(shape: Sequence[int], seed: int, stream: str, keys: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=rng.generator(seed, stream, *key)) for key in keys])


@torch.no_grad()
def generate(
    backbone: Backbone,
    roles: RoleSet | None,
    plan: SamplingPlan,
    prompts: Conditioning,
    uncond: Conditioning | None,
    keys: Sequence[tuple[int, int]],
    *,
    shape: Sequence[int],
    seed: int,
    batch: int,
    on_batch: Callable[[int], None] | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Latents [N, C, H, W], float32 on the CPU, one for each key (prompt index, image index).

    prompts: row = prompt index, or `rows` says which row is each key's. uncond: one row, the prompt ""; needed by
    guidance alone. shape: [C, H, W]. roles: None for the model as it stands, without adapters. on_batch: told the
    number of pictures after each batch.
    All noise is keyed by (seed, prompt index, image index), so `batch` changes a picture by no more than the
    rounding of a differently shaped matrix product (1e-5 or so in float32).
    """
    latents = []
    chosen = [prompt for prompt, _ in keys] if rows is None else rows
    for start in range(0, len(keys), batch):
        part = keys[start : start + batch]
        cond = prompts.select(chosen[start : start + batch]).to(backbone.device, backbone.dtype)
        x = initial_noise(shape, seed, part).to(backbone.device)
        velocity = guided(backbone, cond, uncond, plan.guidance)
        with roles.role(plan.kind) if roles else nullcontext():
            if plan.kind == "teacher":
                x = euler(velocity, x, plan.sigmas)
            else:
                noises = [step_noise(shape, seed, part, i).to(x.device) for i in range(plan.steps - 1)]
                x = cps(velocity, x, plan.sigmas, plan.eta, noises)
        latents.append(x.cpu())
        if on_batch:
            on_batch(len(part))
    return torch.cat(latents)


@torch.no_grad()
def decode_all(backbone: Backbone, latents: Tensor, batch: int, label: str = "The model") -> Tensor:
    """Pictures [N, 3, height, width], float32 in 0..1 on the CPU, of latents [N, C, H, W].

    batch: decoded at once, fewer where the memory is full.
    PictureFailure, beginning with `label`, for pictures that are not finite; it says whose fault that is.
    """

    def decoded(size: int) -> Tensor:
        return torch.cat([backbone.decode(part.to(backbone.device)).cpu() for part in latents.split(size)])

    images = within_memory(decoded, batch, backbone.device)
    if not bool(images.isfinite().all()):
        whose = "the VAE's, of finite latents" if bool(latents.isfinite().all()) else "so are their latents"
        raise PictureFailure(
            f"{label} makes pictures that are not finite: {whose}.",
            "Compute in float32: --dtype fp32, or --set hardware.dtype=fp32 in a training.",
        )
    return images
