"""The adapters of a checkpoint as they are exported."""

from __future__ import annotations

from pathlib import Path

import torch

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.export.generator import adapter_stacks
from rtdmd_cli.engine.storage.checkpoint import Checkpoint


def test_a_float32_average_of_bf16_adapters_is_exported_as_it_is_sampled() -> None:
    """Stage 2 keeps its average in float32, and puts it into bf16 adapters, rounded, for pictures and measurements."""
    names = [f"transformer_blocks.0.attn.to_q.lora_{end}.weight" for end in "AB"]
    source = torch.Generator().manual_seed(0)
    ema = {name: torch.randn(4, 4, generator=source) for name in names}
    first = {name: tensor.bfloat16() for name, tensor in ema.items()}
    settings = ["distill.lora.dtype=bf16", "tune_reward.lora.dtype=bf16"]
    preset = load_preset("sd3-4step", settings, environ={}).preset
    checkpoint = Checkpoint(
        Path("c"), 1, {"ema": ema, "stage1_generator": first}, {"stage": "tune-reward"}, {}
    )
    ((below, above),) = adapter_stacks(preset, checkpoint).values()
    assert torch.equal(above.a, ema[names[0]].bfloat16()) and torch.equal(above.b, ema[names[1]].bfloat16())
    assert torch.equal(below.a, first[names[0]]) and below.scale == above.scale == 2
