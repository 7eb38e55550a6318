"""Stage 2 on the tiny model, with rewards that need no weights, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset, SamplerConfig
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_weights
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.rewards.mixture import open_mixture
from rtdmd_cli.engine.tune_reward.rollouts import Tuner
from rtdmd_cli.engine.tune_reward.run import build_tuner
from tests.tiny_models import PROMPTS, RESOLUTION, load_sd3, sd3_config

CPU = torch.device("cpu")
PROMPT_SET = PromptSet(PROMPTS, [{"length": len(text)} for text in PROMPTS])
FROZEN = ("stage1_generator", "stage1_fake")


@dataclass(frozen=True)
class Pattern:
    """Agreement of a picture with a fixed random one; with `length`, of the prompt alone; `value` instead of both."""

    seed: int
    differentiable: bool = True
    prompt_only: bool = False
    value: float | None = None

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """See `base.Reward`."""
        assert len(images) == len(prompts) == len(metadata)
        if self.value is not None:
            return torch.full((len(images),), self.value)
        if self.prompt_only:
            return torch.tensor([float(known["length"]) for known in metadata])
        source = torch.Generator().manual_seed(self.seed)
        pattern = torch.randn(3, RESOLUTION, RESOLUTION, generator=source)
        score = (10 * images * pattern).mean(dim=(1, 2, 3))
        return score if self.differentiable else score.detach().round(decimals=4)


REWARDS: dict[str, tuple[Reward, float]] = {
    "one": (Pattern(1), 1.0),
    "two": (Pattern(2), 4.0),  # divided by 4 in training
    "judge": (Pattern(3), 1.0),
    "rule": (Pattern(4, differentiable=False), 1.0),
    "prompt": (Pattern(5, differentiable=False, prompt_only=True), 1.0),
    "broken": (Pattern(6, value=float("nan")), 1.0),
}
loads: list[str] = []
"""Names of the rewards, as often as they were loaded."""


def find(name: str) -> RewardEntry:
    """A row of the table, for `open_mixture`."""
    reward, divisor = REWARDS[name]

    def load(device: torch.device, path: str | None) -> Reward:
        loads.append(name if path is None else f"{name} from {path}")
        return reward

    metadata = "length" if name == "prompt" else ""
    return RewardEntry(name, "A test.", 0, 1, reward.differentiable, (), load, divisor, metadata)


def tune_preset(
    sampler: dict[str, Any] | None = None, hardware: dict[str, Any] | None = None, **values: Any
) -> Preset:
    """2 groups of 2 images an epoch. AdamW's epsilon is so large that rounding does not decide a direction."""
    config: dict[str, Any] = {
        "rewards": ("one", "two=0.5"),
        "images_per_epoch": 4,
        "images_per_prompt": 2,
        "generator_lr": 0.01,
        "fake_lr": 0.01,
        "lora": LoraConfig(rank=3, alpha=3),
        "seed": 3,
    }
    return Preset(
        name="tiny",
        model=sd3_config(),
        sampler=SamplerConfig(**(sampler or {})),
        distill=DistillConfig(lora=LoraConfig(rank=2, alpha=4), eps=1e-3),
        tune_reward=TuneRewardConfig(**(config | values)),
        hardware=HardwareConfig(**(hardware or {})),
    )


def noise_like(state: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Random weights of these shapes."""
    source = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensor.shape, generator=source) for name, tensor in state.items()}


def make_tuner(
    sampler: dict[str, Any] | None = None,
    hardware: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> Tuner:
    """A tuner whose stage-1 adapters are away from the teacher, and whose fresh ones are as at the start."""
    preset = tune_preset(sampler, hardware, **values)
    config, backbone = preset.tune_reward, load_sd3(dtype)
    weights = split_weights(config.rewards)
    mixture = open_mixture(weights, config.held_out, {}, PROMPT_SET, CPU, config.rewards_in_memory, find)
    cond = backbone.encode(PROMPTS)
    tuner = build_tuner(backbone, preset, mixture, len(PROMPTS), cond.select, backbone.encode([""]))
    for seed, adapter in enumerate(FROZEN):
        tuner.core.roles.load(adapter, noise_like(tuner.core.roles.state(adapter), 0.2, seed))
    return tuner


def stir(tuner: Tuner) -> Tuner:
    """Move the fresh adapters away from their start, at which they do nothing."""
    for seed, role in enumerate(("generator", "fake"), 10):
        state = tuner.core.roles.state(role)
        tuner.core.roles.load(role, noise_like(state, 0.2, seed))
    return tuner
