"""The run's own side of an export: its pictures, and what the card says of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rtdmd_cli.engine.backbones.common import evenly_spaced
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.export.families import FAMILIES
from rtdmd_cli.engine.export.roundtrip import SEED, initial_noise
from rtdmd_cli.engine.roles.base import GENERATOR
from rtdmd_cli.engine.sampling.model import Model, open_model
from rtdmd_cli.engine.sampling.pictures import encode, encoding_ahead
from rtdmd_cli.engine.sampling.sample import SamplingPlan, Velocity, cps, decode_all, guided
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.training.heartbeat import under_way


@dataclass(frozen=True)
class Own:
    """The run's side: its pictures with its own eta and with Euler [n, 3, H, W], and what the card needs of it.

    With Euler the network is told the levels of noise as the stock pipeline tells them; off: mean difference of a pixel that
    this makes, 0 where they are exact.
    """

    pictures: Tensor
    euler: Tensor
    sigmas: tuple[float, ...]
    stock_already: bool
    base_hash: str
    model_hash: str
    off: float


def draw_own(
    source: Source,
    dtype: torch.dtype,
    prompts: Sequence[str],
    say: Callable[[str], None],
    device: torch.device,
) -> Own:
    """Open the run's generator on the device, draw, and let it go again."""
    say(f"loading the model {source.preset.model.path}")
    ahead = encoding_ahead(prompts, source.preset.hardware.cache_gb)
    model = open_model(source, device, dtype, ahead)
    plan = model.plan()
    say(f"drawing {counted(len(prompts))} with the run, with eta {plan.eta:g} and with eta 0")
    pictures, euler = own_pictures(model, plan, prompts, (plan.eta, 0.0))
    family, off = FAMILIES[source.preset.model.family], 0.0
    if family.rounded_levels and dtype != torch.float32:
        exact, (euler,) = euler, own_pictures(model, plan, prompts, (0.0,), dtype)
        off = float((exact - euler).abs().mean())
        say(
            f"the stock pipeline rounds levels of noise: a mean difference of {off:.2g} from the run's pictures"
        )
    side = source.preset.model.resolution
    backbone = model.backbone
    shape = backbone.latent_shape(side, side)
    changed = family.scheduler  # by the export
    stock = (
        backbone.sigmas(evenly_spaced(plan.steps), shape)
        if changed
        else backbone.stock_sigmas(plan.steps, shape)
    )
    agree = all(abs(a - b) < 1e-6 for a, b in zip(stock.tolist(), plan.sigmas, strict=True))
    return Own(pictures, euler, plan.sigmas, agree, model.backbone.model_id.hash, model.model_hash, off)


@torch.no_grad()
def own_pictures(
    model: Model,
    plan: SamplingPlan,
    prompts: Sequence[str],
    etas: Sequence[float],
    rounded: torch.dtype | None = None,
) -> list[Tensor]:
    """Our sampler's pictures [n, 3, H, W] in 0..1 on the CPU for each eta, one picture a prompt, the same noise.

    rounded: the network is told the levels of noise in this format, see `told_as_stock`; None for exact ones.
    """
    backbone, side = model.backbone, model.source.preset.model.resolution
    shape = backbone.latent_shape(side, side)
    cond, _ = encode(model, prompts, plan)
    family = FAMILIES[model.source.preset.model.family]
    drawn = torch.float32 if family.float32_noise else backbone.dtype
    noise, sets = initial_noise(shape, len(prompts), drawn), []
    for eta in etas:
        latents = []
        for i in range(len(prompts)):
            under_way(f"picture {i + 1} of {len(prompts)} with eta {eta:g}")
            one = cond.select([i]).to(backbone.device, backbone.dtype)
            fresh = [
                rng.normal(shape, SEED, "export", step, [i]).to(backbone.device)
                for step in range(plan.steps - 1)
            ]
            with model.roles.role(GENERATOR) if model.roles else nullcontext():
                velocity = guided(backbone, one, None, 1.0)
                if rounded is not None:
                    velocity = partial(told_as_stock, velocity, rounded)
                latents.append(cps(velocity, noise[i : i + 1].to(backbone.device), plan.sigmas, eta, fresh))
        under_way(f"decoding the pictures with eta {eta:g}")
        sets.append(decode_all(backbone, torch.cat(latents).cpu(), 1))
    return sets


def told_as_stock(velocity: Velocity, dtype: torch.dtype, x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity at levels [B] in the number format of the stock pipelines of FLUX and Qwen-Image, which have them times
    1,000 in that of the latents: in bf16 0.9583 becomes 0.9609. A network trained with exact levels sees another one.
    """
    return velocity(x, ((sigma * 1000).to(dtype) / 1000).to(sigma.dtype))


def counted(pictures: int) -> str:
    """As in "4 pictures"."""
    return "1 picture" if pictures == 1 else f"{pictures} pictures"
