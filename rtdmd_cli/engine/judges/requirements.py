"""What the pictures of a batch must show: the prompts' GenEval requirements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from rtdmd_cli.engine.judges.geneval import check_requirement
from rtdmd_cli.errors import DataError

Metadata: TypeAlias = Mapping[str, Any]
"""What is known of a prompt besides its text, such as a GenEval requirement; empty where there is nothing."""

KEY = "include"  # of the metadata
COUNTING = "counting"  # the task with its own threshold


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
