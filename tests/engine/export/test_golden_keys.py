"""The LoRA keys of the real models, with shapes, as committed lists that a refactor must not change.

    PYTHONPATH=. python -m tests.engine.export.test_golden_keys      writes the lists anew

`lora_keys.json` holds, for each preset's generator at its own rank, every layer with the shapes of its two matrices; blocks of
equal shapes share a line. A stock ComfyUI (0.10.0) matched every key of such files of SD3 and FLUX, and
its source maps those of Z-Image (`z_image_to_diffusers` of comfy/utils.py, for its three lists of blocks); diffusers
loads them by the same names. Keys that differ from these are not known to be read by anybody.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.export.families import FAMILIES
from rtdmd_cli.engine.roles.adapters import target_layers
from rtdmd_cli.engine.storage.lora_files import lora_tensors

GOLDEN = Path(__file__).with_name("lora_keys.json")
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35 = SD3 | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX1 = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
KLEIN = {"in_channels": 128, "guidance_embeds": False}
KLEIN_4B = KLEIN | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
KLEIN_9B = KLEIN | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3-4step": (SD3Transformer2DModel, SD3),
    "sd35-4step": (SD3Transformer2DModel, SD35),
    "flux1-4step": (FluxTransformer2DModel, FLUX1),
    "flux2-klein-4b-4step": (Flux2Transformer2DModel, KLEIN_4B),
    "flux2-klein-9b-4step": (Flux2Transformer2DModel, KLEIN_9B),
    "zimage-4step": (ZImageTransformer2DModel, {"axes_lens": [1536, 512, 512]}),
}
"""Preset -> its transformer's class, and its config.json as the hub has it, where it differs from the class's defaults."""


@functools.cache
def shapes_of(preset_name: str) -> dict[str, list[int]]:
    """Key of the LoRA file -> shape, of the real model without weights."""
    preset = load_preset(preset_name, environ={}).preset
    network, config = MODELS[preset_name]
    with torch.device("meta"):
        transformer, rank = network(**config), preset.distill.lora.rank
        layers = {}
        for name in target_layers(transformer, preset.distill.lora, "distill"):
            linear = transformer.get_submodule(name)
            layers[name] = (torch.empty(rank, linear.in_features), torch.empty(linear.out_features, rank))
    prefix = FAMILIES[preset.model.family].prefix
    return {key: list(tensor.shape) for key, tensor in lora_tensors(layers, prefix).items()}


def folded(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Runs of block numbers as `0-23`."""
    numbers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for key, shape in shapes.items():
        match = re.fullmatch(r"(.*?[a-z]\.)(\d+)(\..*)", key)
        assert match, key
        numbers.setdefault((f"{match[1]}#{match[3]}", tuple(shape)), []).append(int(match[2]))
    lines = {}
    for (key, shape), blocks in numbers.items():
        assert blocks == list(range(blocks[0], blocks[-1] + 1)), key
        lines[key.replace("#", f"{blocks[0]}-{blocks[-1]}")] = list(shape)
    return lines


@pytest.mark.parametrize("name", list(MODELS))
def test_keys_are_the_golden_ones(name: str) -> None:
    assert folded(shapes_of(name)) == json.loads(GOLDEN.read_text())[name]


def test_the_lists_are_as_long_as_the_models_are_deep() -> None:
    """8 layers a joint block (SD3's last one lacks the text's output), 3 or 2 a single; SD3.5's second attention has none."""
    counts = {name: len(shapes_of(name)) // 2 for name in MODELS}
    layers = (24 * 8 - 1, 24 * 8 - 1, 19 * 8 + 38 * 3, 5 * 8 + 20 * 2, 8 * 8 + 24 * 2, 34 * 4)
    assert counts == dict(zip(MODELS, layers, strict=True))


if __name__ == "__main__":
    lists = {name: folded(shapes_of(name)) for name in MODELS}
    body = ",\n".join(
        f'  "{name}": {{\n'
        + ",\n".join(f"    {json.dumps(key)}: {shape}" for key, shape in itertools.chain(keys.items()))
        + "\n  }"
        for name, keys in lists.items()
    )
    GOLDEN.write_text(f"{{\n{body}\n}}\n")
