"""What is timed: a step of stage 1 on the built-in model, as published and with each option changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.device import resolve_dtype
from rtdmd_cli.engine.distill.recipe import iterate
from rtdmd_cli.engine.distill.run import build_trainer
from rtdmd_cli.engine.training.trainer import Trainer

PRESET = "shapes-4step-lora"
PROMPTS = (
    "a photo of two red circles",
    "a photo of a blue ring",
    "a photo of a green cross",
    "a photo of a star",
)
PUBLISHED = (
    "distill.train=lora",
    "distill.fake_per_generator=1",  # both turns in every step
    "distill.boundaries=one",
    "distill.boundaries_batched=false",
    "distill.backprop_steps=1",
    "distill.consistency_weight=0.01",
    "distill.consistency_batched=false",
    "hardware.float32_matmul=highest",
    "hardware.mixed_precision=none",
)
"""The published step, on adapters of one shared base."""
EVERY = ("distill.boundaries=every", "distill.boundaries_batched=true")


@dataclass(frozen=True)
class Case:
    """A row: what is changed of the published step, what it is compared with, and training points a rollout."""

    name: str
    changes: tuple[str, ...] = ()
    against: str = "published step"
    slow_to_start: bool = False


CASES = (
    Case("published step"),
    Case("consistency in one pass", ("distill.consistency_batched=true",)),
    Case("no consistency", ("distill.consistency_weight=0",)),
    Case("every boundary, one by one", ("distill.boundaries=every",)),
    Case("every boundary, together", EVERY, "every boundary, one by one"),
    Case("recomputed activations", ("hardware.gradient_checkpointing=true",)),
    Case("base in int8", ("hardware.base=int8",)),
    Case("base in nf4", ("hardware.base=nf4",)),
    Case("8-bit AdamW", ("hardware.optimizer=adamw8bit",)),
    Case("products by oneDNN (medium)", ("hardware.float32_matmul=medium",)),
    Case("products in bf16", ("hardware.mixed_precision=bf16",)),
    Case("every weight in place of adapters", ("distill.train=full",)),
    Case("compiled blocks", ("hardware.compile=true",), slow_to_start=True),
)


def preset_of(case: Case, batch: int) -> Preset:
    """The built-in preset, changed."""
    own = [f"distill.batch={batch}", *PUBLISHED, *case.changes]
    return load_preset(PRESET, own, {}).preset


def trainer_of(case: Case, device: torch.device, batch: int) -> Trainer:
    """A fresh trainer with encoded prompts."""
    preset = preset_of(case, batch)
    hardware = preset.hardware
    backbone = load_backbone(preset.model, device, resolve_dtype(hardware.dtype, device), hardware)
    cond, empty = backbone.encode(PROMPTS), backbone.encode([""])
    backbone.drop_text_encoders()
    return build_trainer(backbone, preset, len(PROMPTS), cond.select, empty)


def step_of(trainer: Trainer) -> Callable[[int], None]:
    """One step: the fake's turn and the generator's."""

    def step(number: int) -> None:
        with trainer.precision():
            iterate(trainer, number)

    return step
