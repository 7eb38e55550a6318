"""Transformers of the published models' sizes with random weights, and backbones around them: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.backbones.layout import Sources
from rtdmd_cli.engine.backbones.loading import Loaded
from rtdmd_cli.engine.backbones.two_bases import TwoBases
from rtdmd_cli.engine.compute.blocks import repeated_blocks
from rtdmd_cli.engine.compute.quantise import Base, place, swap_linears

STD = 0.02
"""Standard deviation of random matrices: small enough for finite results at any depth."""
SD3_SIZE: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
}
SD3_M = SD3_SIZE | {"pos_embed_max_size": 192}
SD35_M = SD3_SIZE | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FLUX1_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
KLEIN_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
    "axes_dims_rope": (32, 32, 32, 32),
}


@dataclass(frozen=True)
class Case:
    """A model to be measured: a shipped preset, what of it is changed, and its transformer's arguments in diffusers.

    tokens: of an encoded prompt, whose width is the transformer's. two_bases: the generator has a base of its own.
    seconds: a generous guess of what it takes, by which a check that has little time left passes it over.
    """

    name: str
    preset: str
    transformer: Mapping[str, Any] = field(repr=False)
    tokens: int
    changes: tuple[str, ...] = ()
    two_bases: bool = False
    seconds: int = 60

    def settings(self, device: torch.device) -> Preset:
        """The preset as measured: one picture a step, on `device`, never compiled unless `changes` say so."""
        own = ("distill.batch=1", "distill.micro_batch=1", f"hardware.device={device.type}")
        return load_preset(self.preset, [*own, *self.changes], {}).preset


CASES = (
    Case("SD3-M 512 px", "sd3-4step", SD3_M, 205, ("model.resolution=512",)),
    Case("SD3-M 1024 px", "sd3-4step", SD3_M, 205),
    Case("SD3-M 512 px, int8", "sd3-4step", SD3_M, 205, ("model.resolution=512", "hardware.base=int8")),
    Case("SD3.5-M 512 px", "sd35-4step", SD35_M, 205),
    Case("FLUX.2-klein-4B 512 px, two bases", "flux2-klein-4b-4step", KLEIN_4B, 512, (), True, 75),
    Case("FLUX.1-dev 512 px, nf4", "flux1-4step", FLUX1_DEV, 512, ("hardware.base=nf4",), False, 100),
)
COMPILED = Case(
    "SD3-M 512 px, compiled",
    "sd3-4step",
    SD3_M,
    205,
    ("model.resolution=512", "hardware.compile=true"),
    False,
    0,
)
"""Warm-up takes minutes: on request."""


def random_backbone(case: Case, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The family's own backbone around random weights, without VAE and text encoders: neither encodes nor decodes."""
    preset = case.settings(device)
    family, base = preset.model.family, preset.hardware.base
    module = FAMILIES[family].module()
    layout = module.LAYOUT
    transformer = random_transformer(case, base, device, dtype)
    absent = dict.fromkeys(name for name in (*layout.networks, *layout.tokenizers) if name != "transformer")
    pipe = layout.pipeline(transformer=transformer, scheduler=_scheduler(family), **absent)
    loaded = Loaded(layout, preset.model, Sources(Path()), pipe)
    if case.two_bases:
        loaded.transformer = TwoBases(transformer, random_transformer(case, base, device, dtype))
    made: Any = module.BACKBONE(layout, loaded, device, dtype)
    random: Backbone = made
    return random


def _scheduler(family: str) -> FlowMatchEulerDiscreteScheduler:
    """With the published files' shift."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family != "sd3")


def empty_transformer(case: Case) -> nn.Module:
    """The case's transformer without memory for its parameters."""
    layout = FAMILIES[case.settings(torch.device("cpu")).model.family].module().LAYOUT
    with init_empty_weights(include_buffers=False):
        transformer: nn.Module = layout.networks["transformer"](**case.transformer)
    return transformer


def random_transformer(case: Case, base: Base, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen transformer with random weights, made on `device` block by block, quantised at once if asked for."""
    transformer = empty_transformer(case)
    for block in repeated_blocks(transformer):
        fill(block, device, dtype)
        if base != "plain":
            swap_linears(block, base, device)
    fill(transformer, device, dtype)
    place(transformer, base, device)
    return transformer.eval().requires_grad_(False)


def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter that has no memory yet some: matrices random, biases 0, scales of norms 1."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, device=device, dtype=dtype)
                if parameter.dim() > 1:
                    made.normal_(std=STD)
                else:
                    made.fill_(0.0 if name == "bias" else 1.0)
                part.register_parameter(name, nn.Parameter(made, requires_grad=False))


def random_prompts(case: Case, count: int, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """`count` encoded prompts of the right shapes."""
    wide = case.transformer["joint_attention_dim"]
    embeds = torch.randn(count, case.tokens, wide, device=device, dtype=dtype)
    pooled = case.transformer.get("pooled_projection_dim")
    return Conditioning(embeds, torch.randn(count, pooled, device=device, dtype=dtype) if pooled else None)
