"""How far the fake score follows the generator: its clean predictions beside the generator's pictures and the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import to_x0
from rtdmd_cli.engine.algo.subinterval import renoise
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.compute.device import within_memory
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.engine.sampling.sample import decode_all, guided
from rtdmd_cli.engine.training.previews import COUNT, Previews

HEALTH_LEVEL = 0.6
"""Noise level sigma at which teacher and fake score are asked for their clean prediction."""

Points = tuple[Tensor, Tensor, Tensor]
"""See `points`."""


@dataclass
class Health:
    """What is measured and shown of one step comes from the same points, which are drawn once.

    step: of the newest points; the weights of a step never change.
    """

    previews: Previews
    step: int | None = None
    newest: Points | None = None

    def at(self, step: int) -> Points:
        """The points of the present weights, which are those after `step` iterations."""
        if self.newest is None or step != self.step:
            self.newest, self.step = points(self.previews), step
        return self.newest

    def lag(self, step: int) -> dict[str, float]:
        """How far the fake score's clean prediction is from the generator's own samples, root mean square over latents.

        `lag` is the fake score's distance, `lag_teacher` the guided teacher's at the same points: a fake score that follows
        the generator stays well under it.
        """
        x0, fake, teacher = self.at(step)
        return {
            "lag": float((fake - x0).square().mean().sqrt()),
            "lag_teacher": float((teacher - x0).square().mean().sqrt()),
        }

    def save_panel(self, path: Path, step: int) -> None:
        """Write the generator's pictures beside the clean predictions of teacher and fake score at the same noisy points."""
        named = zip(PANEL, self.at(step), strict=True)
        rows = [GridRow(name, decode_all(self.previews.backbone, each, COUNT)) for name, each in named]
        save_png(picture_grid(rows, self.previews.titles), path, {"iteration": str(step)})


PANEL = (
    "generator",
    f"fake score's prediction at sigma {HEALTH_LEVEL}",
    f"teacher's prediction at sigma {HEALTH_LEVEL}",
)


@torch.no_grad()
def points(previews: Previews) -> Points:
    """Generator samples x0 (raw weights), and the clean predictions of fake score and guided teacher: all [n,C,H,W].

    Both predict from the same point, x0 diffused to HEALTH_LEVEL with fixed noise.
    """
    x0 = previews.latents()
    noise = rng.normal(previews.shape, previews.seed, "health", 0, range(len(previews.shown)))
    x_t = renoise(x0, 0.0, HEALTH_LEVEL, noise)
    predicted = within_memory(partial(_predictions, previews, x_t), COUNT, previews.backbone.device)
    return x0, *predicted


def _predictions(previews: Previews, x_t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of fake score and guided teacher from x_t [n,C,H,W], `size` rows at a time; on the CPU."""
    backbone, found = previews.backbone, list[tuple[Tensor, Tensor]]()
    for part in torch.arange(len(x_t)).split(size):
        x = x_t[part].to(backbone.device)
        level = x.new_full((len(part),), HEALTH_LEVEL)
        rows = previews.rows.select(part.tolist())
        cond, empty = (c.to(backbone.device, backbone.dtype) for c in (rows, previews.empty))
        with previews.roles.role("fake"):
            fake = to_x0(x, HEALTH_LEVEL, guided(backbone, cond, None, 1.0)(x, level))
        with previews.roles.role("teacher"):
            velocity = guided(backbone, cond, empty, previews.preset.matching_guidance)
            found.append((fake.cpu(), to_x0(x, HEALTH_LEVEL, velocity(x, level)).cpu()))
    fakes, teachers = zip(*found, strict=True)
    return torch.cat(fakes), torch.cat(teachers)
