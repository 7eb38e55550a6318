"""The small random model of each family, trained through both stages as a run of the product."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.config.loader import Resolved, preset_sha256
from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.distill.run import run_distill
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.tune_reward.run import run_tune
from tests.tiny_flux import TINY, tiny_config
from tests.tiny_models import PROMPTS

FAMILIES = tuple(TINY)
REWARD = "shapes-clip"


def both_stages(name: str, device: torch.device, folder: Path, dtype: str = "bf16") -> dict[str, Any]:
    """Two iterations of stage 1 and an epoch of stage 2 on the family's small model; seconds of each.

    Errors as of the commands. folder: holds runs and encoded prompts; nothing is left elsewhere.
    """
    lora = LoraConfig(rank=4, alpha=4, targets=tuple(TINY[name].targets.split(", ")))
    preset = Preset(
        name=f"tiny-{name}",
        model=tiny_config(name),
        distill=DistillConfig(iterations=2, batch=2, fake_per_generator=1, sample_every=0, lora=lora),
        tune_reward=TuneRewardConfig(
            rewards=(REWARD,),
            epochs=1,
            images_per_epoch=4,
            images_per_prompt=2,
            eval_images=2,
            sample_every=0,
            lora=lora,
        ),
        hardware=HardwareConfig.model_validate({"device": device.type, "dtype": dtype}),
    )
    resolved, prompts = Resolved(preset, {}, preset_sha256(preset)), PromptSet(PROMPTS, [{}] * len(PROMPTS))
    nothing, command = Start(None, None), ["gpu_check"]
    os.environ["RTDMD_CACHE"] = str(folder / "cache")
    began = time.perf_counter()
    first = run_distill(resolved, prompts, nothing, folder, f"{name}-1", command, _silent, True)
    between = time.perf_counter()
    begin = load_checkpoint(first.checkpoint)
    run_tune(resolved, prompts, prompts, begin, nothing, folder, f"{name}-2", command, _silent, True)
    ended = time.perf_counter()
    return {"family": name, "distill_seconds": between - began, "tune_seconds": ended - between}


def _silent(text: str) -> None:
    """Lines for people are not wanted here."""
