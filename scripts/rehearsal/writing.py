"""A pipeline on disk in the hub's layout, random bf16 weights, written file by file: little is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rtdmd_cli.engine.backbones.families import FAMILIES
from scripts.rehearsal.models import Network, Rehearsal
from tests import tiny_clip
from tests.published import cut_scheduler

SHARD = 2**30
"""Bytes of a file of weights."""
STD = 0.02
"""Standard deviation of random matrices: small enough for finite results at any depth."""
TEMPERATURE = 4.6052
"""CLIP's logit scale."""
PATTERN = 2**23 + 1
"""Random values that are drawn."""


def write_model(made: Rehearsal, folder: Path) -> None:
    """The pipeline, in `folder`; what lies there already is kept, file by file."""
    index: dict[str, Any] = {
        "_class_name": FAMILIES[made.family].module().LAYOUT.pipeline.__name__,
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        **made.index,
    }
    for number, (name, network) in enumerate(made.networks.items()):
        index[name] = write_network(network, folder / name, number)
    for name, make in made.tokenizers.items():
        tokenizer = make()
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**made.scheduler)
    scheduler.save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    cut_scheduler(folder)


def write_second_base(made: Rehearsal, folder: Path) -> None:
    """A folder with a transformer of other weights alone, as the generator's base."""
    write_network(made.networks["transformer"], folder / "transformer", len(made.networks))


def write_pickscore(made: Rehearsal, folder: Path) -> None:
    """A CLIP of PickScore's shape, with tokenizer and processor."""
    write_network(made.pickscore, folder, 99)
    tiny_clip.tokenizer().save_pretrained(folder)
    with init_empty_weights():
        side = made.pickscore.build().config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    tiny_clip.processor(**size).save_pretrained(folder)


def write_network(network: Network, folder: Path, seed: int) -> list[str]:
    """Configuration and weights; its library and class, as model_index.json names them."""
    folder.mkdir(parents=True, exist_ok=True)
    with init_empty_weights(include_buffers=False):
        empty = network.build()
    if isinstance(empty, PreTrainedModel):
        library, stem = "transformers", "model"
        empty.config.architectures = [type(empty).__name__]
        empty.config.save_pretrained(folder)
    else:
        assert isinstance(empty, ModelMixin)
        library, stem = "diffusers", "diffusion_pytorch_model"
        empty.save_config(folder)
    state = {name: tensor for name, tensor in empty.state_dict().items() if name not in network.tied}
    shards = list(_shards(state))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{stem}{part}.safetensors"
        where |= dict.fromkeys(names, file)
        if not (folder / file).exists():
            made = {name: _filled(name, state[name], seed + number) for name in names}
            save_file(made, folder / f"{file}.part", metadata={"format": "pt"})
            (folder / f"{file}.part").rename(folder / file)
    if len(shards) > 1:
        total = sum(tensor.numel() * 2 for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return [library, type(empty).__name__]


def _shards(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of the weights, file by file."""
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        if names and size + 2 * tensor.numel() > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * tensor.numel()
    yield names


def _filled(name: str, tensor: Tensor, seed: int) -> Tensor:
    """Matrices random, biases 0, scales of norms 1, buffers as they are."""
    if not tensor.is_meta:
        return tensor.contiguous()
    if tensor.dim() == 0:
        return torch.tensor(TEMPERATURE)
    if tensor.dim() == 1:
        return torch.full(tensor.shape, float(not name.endswith("bias")), dtype=torch.bfloat16)
    made = torch.empty(tensor.numel(), dtype=torch.bfloat16)
    pattern = _pattern(seed)
    for start in range(0, len(made), PATTERN):
        part = made[start : start + PATTERN]
        part.copy_(pattern[: len(part)])
    return made.view(tensor.shape)


_drawn: dict[int, Tensor] = {}


def _pattern(seed: int) -> Tensor:
    """Random values of one seed; only the last seed's are kept."""
    if seed not in _drawn:
        _drawn.clear()
        values = torch.randn(PATTERN, generator=torch.Generator().manual_seed(seed))
        _drawn[seed] = (STD * values).to(torch.bfloat16)
    return _drawn[seed]
