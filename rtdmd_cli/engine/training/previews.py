"""Pictures of a run in progress: fixed prompts and seeds, generator beside teacher, and the fake score's health."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.algo.flow import to_x0
from rtdmd_cli.engine.algo.subinterval import renoise
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.engine.roles.base import RoleSet
from rtdmd_cli.engine.sampling.sample import Kind, SamplingPlan, decode_all, generate, guided, sampling_plan

COUNT = 8
"""Fixed prompts of a run, evenly spread over the prompt set."""
HEALTH_LEVEL = 0.6
"""Noise level sigma at which teacher and fake score are asked for their clean prediction."""


@dataclass(frozen=True)
class Previews:
    """Fixed prompts, their conditioning, the empty prompt's, and the pictures [COUNT,3,H,W] to compare with, made once.

    reference: the teacher's pictures in stage 1, the starting generator's in stage 2.
    """

    backbone: Backbone
    roles: RoleSet
    plan: SamplingPlan
    guidance: tuple[float, float]
    shape: tuple[int, int, int]
    seed: int
    prompts: list[str]
    cond: Conditioning
    empty: Conditioning
    reference: Tensor
    reference_label: str

    def latents(self, plan: SamplingPlan | None = None) -> Tensor:
        """Latents [COUNT,C,H,W] of the generator's current weights (or as `plan` says), always from the same noise."""
        keys = [(i, 0) for i in range(len(self.prompts))]
        return generate(
            self.backbone,
            self.roles,
            plan or self.plan,
            self.cond,
            self.empty,
            keys,
            shape=self.shape,
            seed=self.seed,
            batch=COUNT,
        )


def pick(count: int) -> list[int]:
    """Indices of the preview prompts among `count` prompts: at most COUNT, evenly spread."""
    return sorted({int((i + 0.5) * count / COUNT) for i in range(COUNT)})


def make_previews(
    backbone: Backbone,
    roles: RoleSet,
    preset: Preset,
    prompts: Sequence[str],
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
    reference: Kind = "teacher",
    reference_label: str = "teacher",
) -> Previews:
    """Choose the prompts and sample the reference: the teacher as `rtdmd sample --from PRESET` would, or, in stage 2,
    the generator that it started from.
    """
    chosen = pick(len(prompts))
    previews = Previews(
        backbone,
        roles,
        sampling_plan("generator", backbone, preset.model, preset.sampler),
        preset.matching_guidance,
        backbone.latent_shape(preset.model.resolution, preset.model.resolution),
        preset.evaluate.seed,
        [prompts[i] for i in chosen],
        conditioning(chosen),
        empty,
        torch.empty(0),
        reference_label,
    )
    plan = sampling_plan(reference, backbone, preset.model, preset.sampler)
    return replace(previews, reference=decode_all(backbone, previews.latents(plan), COUNT))


def save_sample_grid(previews: Previews, ema: dict[str, Tensor], path: Path, iteration: int) -> None:
    """Write the grid of generator (EMA weights) beside the reference."""
    with previews.roles.swapped("generator", ema):
        latents = previews.latents()
    rows = [
        GridRow(
            f"generator, {previews.plan.evaluations} evaluations",
            decode_all(previews.backbone, latents, COUNT),
        ),
        GridRow(previews.reference_label, previews.reference),
    ]
    save_png(picture_grid(rows, previews.prompts), path, {"iteration": str(iteration)})


def save_health_panel(previews: Previews, path: Path, iteration: int) -> None:
    """Write the generator's pictures beside the clean predictions of teacher and fake score at the same noisy points."""
    x0, fake, teacher = health_points(previews)
    rows = [
        GridRow("generator", decode_all(previews.backbone, x0, COUNT)),
        GridRow(
            f"fake score's prediction at sigma {HEALTH_LEVEL}", decode_all(previews.backbone, fake, COUNT)
        ),
        GridRow(
            f"teacher's prediction at sigma {HEALTH_LEVEL}", decode_all(previews.backbone, teacher, COUNT)
        ),
    ]
    save_png(picture_grid(rows, previews.prompts), path, {"iteration": str(iteration)})


@torch.no_grad()
def health_points(previews: Previews) -> tuple[Tensor, Tensor, Tensor]:
    """Generator samples x0 (raw weights), and the clean predictions of fake score and guided teacher: all [n,C,H,W].

    Both predict from the same point, x0 diffused to HEALTH_LEVEL with fixed noise.
    """
    backbone, count = previews.backbone, len(previews.prompts)
    x0 = previews.latents()
    noise = rng.normal(previews.shape, previews.seed, "health", 0, range(count))
    x_t = renoise(x0, 0.0, HEALTH_LEVEL, noise).to(backbone.device)
    level = x_t.new_full((count,), HEALTH_LEVEL)
    cond, empty = (c.to(backbone.device, backbone.dtype) for c in (previews.cond, previews.empty))
    with previews.roles.role("fake"):
        fake = to_x0(x_t, HEALTH_LEVEL, guided(backbone, cond, None, 1.0)(x_t, level))
    with previews.roles.role("teacher"):
        velocity = guided(backbone, cond, empty, previews.guidance)
        teacher = to_x0(x_t, HEALTH_LEVEL, velocity(x_t, level))
    return x0, fake.cpu(), teacher.cpu()


def lag(previews: Previews) -> dict[str, float]:
    """How far the fake score's clean prediction is from the generator's own samples, root mean square over latents.

    `lag` is the fake score's distance, `lag_teacher` the guided teacher's at the same points: a fake score that follows
    the generator stays well under it.
    """
    x0, fake, teacher = health_points(previews)
    return {
        "lag": float((fake - x0).square().mean().sqrt()),
        "lag_teacher": float((teacher - x0).square().mean().sqrt()),
    }
