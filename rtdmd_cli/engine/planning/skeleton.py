"""A model as shapes alone: every module of a pipeline, real class and real size, without memory for its weights.

On torch's `meta` device a network runs as usual, and only shapes and formats are computed: a turn of a model of 12
billion weights in seconds, on any machine. What reads a number back from the device, or copies to the host, raises an
error there. torch's `FakeTensorMode` does the same at thirty times the cost, and lets copies to the host pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones import families
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.layout import Sources
from rtdmd_cli.engine.backbones.loading import Loaded
from rtdmd_cli.engine.backbones.two_bases import TwoBases

META = torch.device("meta")
Configs = Mapping[str, Mapping[str, Any]]
"""Component of a pipeline -> its config.json; "scheduler" among them."""


@dataclass(frozen=True)
class Skeleton:
    """A backbone on shapes alone, without text encoders (`encoding.py`).

    prompt_shape: tokens of an encoded prompt, their width, and the width of its pooled part, None for families without.
    own_lengths: of the layout; prompts are of full length then.
    """

    backbone: Backbone
    vae: nn.Module
    prompt_shape: tuple[int, int, int | None]
    own_lengths: bool

    def prompts(self, count: int) -> Conditioning:
        """`count` encoded prompts."""
        tokens, width, pooled = self.prompt_shape
        wanted: dict[str, Any] = {"dtype": self.backbone.dtype, "device": META}
        rest = None if pooled is None else torch.empty(count, pooled, **wanted)
        lengths = torch.full((count,), tokens) if self.own_lengths else None
        return Conditioning(torch.empty(count, tokens, width, **wanted), rest, lengths)


def skeleton(
    model: ModelConfig, hardware: HardwareConfig, dtype: torch.dtype, configs: Configs, own_base: bool = False
) -> Skeleton:
    """The model of `configs` in `dtype`. own_base: the generator has a base of its own, of the same shape.

    hardware: of it, how pictures are decoded.
    """
    module = families.FAMILIES[model.family].module()
    layout = module.LAYOUT
    made = {name: on_shapes(layout.networks[name], configs[name], dtype) for name in ("transformer", "vae")}
    absent = dict.fromkeys((*layout.encoders, *layout.tokenizers))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(configs["scheduler"]))
    pipe = layout.pipeline(transformer=made["transformer"], vae=made["vae"], scheduler=scheduler, **absent)
    if hardware.vae_tiling:
        layout.tile(pipe.vae)
    loaded = Loaded(layout, model, Sources(Path()), pipe)
    if own_base:
        other = on_shapes(layout.networks["transformer"], configs["transformer"], dtype)
        loaded.transformer = TwoBases(pipe.transformer, other)
    backbone: Any = module.BACKBONE(layout, loaded, META, dtype)
    return Skeleton(backbone, made["vae"], prompt_shape(model, configs), layout.own_lengths)


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def on_shapes(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network of diffusers or transformers by its config, frozen, in eval mode, its weights in `dtype`."""
    with META:
        if issubclass(kind, ConfigMixin):
            network: nn.Module = kind.from_config(dict(config))
        else:
            network = kind(kind.config_class(**config))
    nn.Module.to(network, dtype)  # diffusers' own `to` warns of formats that are kept
    return network.eval().requires_grad_(False)


def prompt_shape(model: ModelConfig, configs: Configs) -> tuple[int, int, int | None]:
    """See `Skeleton`."""
    layout, network = families.FAMILIES[model.family].module().LAYOUT, configs["transformer"]
    clip = configs["text_encoder"]["max_position_embeddings"] if layout.clip_first else 0
    return clip + model.text_length, network[layout.text_width], layout.pooled_width(network)
