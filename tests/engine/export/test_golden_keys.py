"""The LoRA keys of the real models, with shapes, as committed lists that a refactor must not change.

    PYTHONPATH=. python -m tests.engine.export.test_golden_keys      writes the lists anew

`lora_keys.json` holds, for each preset's generator at its own rank, every layer with the shapes of its two matrices; blocks of
equal shapes share a line. A stock ComfyUI (0.10.0) matched every key of such files of SD3 and FLUX; its source maps those
of Z-Image (`z_image_to_diffusers` of comfy/utils.py, for its three lists of blocks) and of Qwen-Image (comfy/lora.py: its
layers have diffusers' names). diffusers loads them by the same names. Keys that differ from these are not known to be
read by anybody.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from rtdmd_cli.config.loader import load_preset, preset_names
from rtdmd_cli.engine.backbones.families import FAMILIES as BACKBONES
from rtdmd_cli.engine.export.families import FAMILIES
from rtdmd_cli.engine.planning.configs import published
from rtdmd_cli.engine.roles.adapters import target_layers
from rtdmd_cli.engine.storage.lora_files import lora_tensors

GOLDEN = Path(__file__).with_name("lora_keys.json")
MODELS = tuple(
    name
    for name in preset_names()
    if not (name.startswith("shapes") or name.endswith(("-24gb", "-16gb", "-overnight")))
)
"""The preset of every published model."""


@functools.cache
def shapes_of(preset_name: str) -> dict[str, list[int]]:
    """Key of the LoRA file -> shape, of the real model without weights."""
    preset = load_preset(preset_name, environ={}).preset
    network = BACKBONES[preset.model.family].module().LAYOUT.networks["transformer"]
    with torch.device("meta"):
        transformer = network.from_config(published()[preset.model.path]["transformer"])
        layers, rank = {}, preset.distill.lora.rank
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


@pytest.mark.parametrize("name", MODELS)
def test_keys_are_the_golden_ones(name: str) -> None:
    assert folded(shapes_of(name)) == json.loads(GOLDEN.read_text())[name]


COUNTS = {
    "sd3-4step": 24 * 8 - 1,
    "sd35-4step": 24 * 8 - 1,
    "flux1-4step": 19 * 8 + 38 * 3,
    "flux2-klein-4b-4step": 5 * 8 + 20 * 2,
    "flux2-klein-9b-4step": 8 * 8 + 24 * 2,
    "zimage-4step": (2 + 2 + 30) * 4,
    "qwenimage-4step": 60 * 8,
}
"""8 layers a joint block (SD3's last one lacks the text's output), 3 or 2 a single, 4 one of Z-Image's; SD3.5's second
attention has none."""


def test_the_lists_are_as_long_as_the_models_are_deep() -> None:
    assert {name: len(shapes_of(name)) // 2 for name in MODELS} == COUNTS


if __name__ == "__main__":
    lists = {name: folded(shapes_of(name)) for name in MODELS}
    body = ",\n".join(
        f'  "{name}": {{\n'
        + ",\n".join(f"    {json.dumps(key)}: {shape}" for key, shape in itertools.chain(keys.items()))
        + "\n  }"
        for name, keys in lists.items()
    )
    GOLDEN.write_text(f"{{\n{body}\n}}\n")
