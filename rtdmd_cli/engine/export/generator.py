"""The generator of a checkpoint as it is exported: stage 1's average, and stage 2's on top of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.export.fold import Part
from rtdmd_cli.engine.roles.adapters import DTYPES
from rtdmd_cli.engine.roles.base import STAGE1_GENERATOR
from rtdmd_cli.engine.sampling.model import EMA
from rtdmd_cli.engine.storage.checkpoint import Checkpoint
from rtdmd_cli.engine.storage.lora_files import A, B

TUNED = "tune-reward"


def is_tuned(checkpoint: Checkpoint) -> bool:
    """Whether stage 2 made it."""
    return checkpoint.state.get("stage") == TUNED


def is_full(preset: Preset) -> bool:
    """Whether every weight was trained, so that there is no adapter."""
    return preset.distill.train == "full"


def adapter_stacks(preset: Preset, checkpoint: Checkpoint) -> dict[str, list[Part]]:
    """Layer -> the adapters that are active on it when the generator is sampled, bottom first.

    The checkpoint's tensors fit the model: `sampling.model.open_model` has loaded them.
    """
    groups = [(EMA, preset.distill.lora)]
    if is_tuned(checkpoint):
        groups = [(STAGE1_GENERATOR, preset.distill.lora), (EMA, preset.tune_reward.lora)]
    stacks: dict[str, list[Part]] = {}
    for group, lora in groups:
        for name, part in _parts(checkpoint.tensors[group], lora).items():
            stacks.setdefault(name, []).append(part)
    return stacks


def _parts(tensors: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Part]:
    layers = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    rounded = {name: tensor.to(DTYPES[lora.dtype]) for name, tensor in tensors.items()}  # as they are sampled
    return {name: Part(rounded[name + A], rounded[name + B], lora.alpha / lora.rank) for name in layers}
