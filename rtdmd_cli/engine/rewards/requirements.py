"""What the pictures of a batch must show: the prompts' GenEval requirements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rtdmd_cli.engine.evaluation.geneval import check_requirement
from rtdmd_cli.engine.rewards.base import Metadata
from rtdmd_cli.errors import DataError

KEY = "include"  # of the metadata
COUNTING = "counting"  # the task with its own threshold


def check_batch(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """ValueError unless images are float [B,3,H,W] and there are B prompts and B metadata."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images [B,3,H,W], got {images.dtype} {list(images.shape)}")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts and {len(metadata)} metadata")


def read_requirement(prompt: str, known: Metadata) -> Mapping[str, Any]:
    """The requirement in a prompt's metadata, its line of GenEval's file. DataError where it is missing or wrong."""
    if KEY not in known:
        raise DataError(
            f"GenEval needs the metadata `{KEY}` of each prompt; {shown(prompt)} has none.",
            "Use a prompt file with GenEval's lines, or another reward.",
        )
    requirement = dict(known)
    check_requirement(requirement, f"the requirement of {shown(prompt)}")
    return requirement


def threshold_of(requirement: Mapping[str, Any], usual: float, counting: float) -> float:
    """The counting threshold where the requirement's `tag` is "counting", else the usual one."""
    return counting if requirement.get("tag") == COUNTING else usual


def shown(prompt: str) -> str:
    """A prompt in a message, cut to 80 characters."""
    return repr(prompt if len(prompt) <= 80 else f"{prompt[:77]}...")
