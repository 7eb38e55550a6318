"""Seconds and memory of one update of each role, and how near quantised and compiled bases are to the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import HardwareConfig, Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.blocks import compile_blocks
from rtdmd_cli.engine.distill.recipe import update_fake_score, update_generator
from rtdmd_cli.engine.distill.run import build_trainer
from rtdmd_cli.engine.planning.plan import plan_stage
from rtdmd_cli.engine.training.trainer import Trainer
from scripts.gpu.models import Case, empty_transformer, random_backbone, random_prompts

GIB = 2**30
UPDATES = 4
"""Measured updates of a role. A rollout stops after a random number of steps: these four differ, the seed is fixed."""
STATED = {"int8": 0.02, "nf4": 0.12, "compiled": 0.001}
"""Largest relative difference of the built-in teacher's velocity from the plain base: int8, nf4 in bf16, compiled in fp32."""


def measure(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One row of the table; GiB are None on a device that keeps no account of them.

    Raises NumericalError for values that are not finite, torch.OutOfMemoryError where the memory is too small.
    """
    backbone = random_backbone(case, device, dtype)
    weights = _allocated(device)
    prompts = random_prompts(case, 2, device, dtype)
    preset = case.settings(device)
    trainer = build_trainer(backbone, preset, 1, prompts.select, prompts.select([1]))
    row: dict[str, Any] = {
        "model": case.name,
        "parameters": sum(parameter.numel() for parameter in empty_transformer(case).parameters()),
        "base": preset.hardware.base,
        "weights_gib": weights,
    }
    for role, update in (("fake", update_fake_score), ("generator", update_generator)):
        first = _seconds(update, trainer, 0, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [_seconds(update, trainer, number, device) for number in range(UPDATES)]
        row[f"{role}_seconds"] = sum(taken) / UPDATES
        row[f"{role}_seconds_median"] = median(taken)
        row[f"{role}_first_seconds"] = first
        row[f"{role}_peak_gib"] = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return row


def planned(preset: Preset) -> dict[str, float]:
    """What `rtdmd plan` says of the same two turns: peaks in GiB, as torch would count them."""
    peaks = {phase.name: phase.peak / GIB for phase in plan_stage(preset, "distill").phases}
    return {f"{role}_planned_gib": peaks[f"{role} turn"] for role in ("fake", "generator")}


def _allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated() / GIB if device.type == "cuda" else None


def _seconds(
    update: Callable[[Trainer, int, Sequence[int]], None], trainer: Trainer, number: int, device: torch.device
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with trainer.precision():
        update(trainer, number, [0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def agreement(device: torch.device, backend: str = "inductor") -> dict[str, float]:
    """Relative differences of the trained built-in teacher's velocity from the plain base's, by what was changed."""
    model = load_preset("shapes-4step", environ={}).preset.model
    plain = {dtype: load_backbone(model, device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    cond = plain[torch.float32].encode(["a photo of two red circles", "a photo of a blue ring"])
    expected = {dtype: _velocity(backbone, cond) for dtype, backbone in plain.items()}
    found = {}
    for base in ("int8", "nf4"):
        other = load_backbone(model, device, torch.bfloat16, HardwareConfig(base=base))
        found[base] = _relative(_velocity(other, cond), expected[torch.bfloat16])
    compile_blocks(plain[torch.float32].transformer, device, backend)
    found["compiled"] = _relative(_velocity(plain[torch.float32], cond), expected[torch.float32])
    return found


@torch.no_grad()
def _velocity(backbone: Backbone, cond: Conditioning) -> Tensor:
    """At three noise levels, from fixed noise."""
    shape = backbone.latent_shape(32, 32)
    x = torch.randn(len(cond), *shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    prompts = cond.to(dtype=backbone.dtype)
    levels = (x.new_full(x.shape[:1], sigma) for sigma in (1.0, 0.75, 0.5))
    return torch.stack([backbone.velocity(x, level, prompts) for level in levels])


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
