"""The table of rewards. Each row's loader imports its module only when it is called."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from rtdmd_cli.engine.rewards.base import Need, Reward, RewardEntry
from rtdmd_cli.engine.rewards.user import user_entry
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

REWARDS: dict[str, RewardEntry] = {}

# Rules on what a detector or a reader finds -------------------------------------------------------------------


def _geneval(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.geneval import GenEval

    return GenEval.load(device, path)


def _geneval_soft(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.geneval import GenEval

    return GenEval.load(device, path, soft=True)


def _shapes_geneval(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.shapes import ShapesGenEval

    return ShapesGenEval.load(device, path)


def _shapes_geneval_soft(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.shapes import ShapesGenEval

    return ShapesGenEval.load(device, path, soft=True)


def _ocr(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.ocr import OcrReward

    return OcrReward.load(device, path)


_GENEVAL_NEEDS = (
    Need(
        "facebook/mask2former-swin-small-coco-instance",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        276_700_000,
        "CC BY-NC 4.0",
    ),
    Need(
        "openai/clip-vit-large-patch14",
        (
            "config.json",
            "model.safetensors",
            "tokenizer*",
            "vocab.json",
            "merges.txt",
            "preprocessor_config.json",
        ),
        1_714_100_000,
        "MIT",
    ),
)
_RULES = (
    RewardEntry(
        name="geneval",
        measures="Whether the picture shows the objects, numbers, colours and places of its GenEval line: 1 or 0.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=_GENEVAL_NEEDS,
        load=_geneval,
        metadata="include",
    ),
    RewardEntry(
        name="geneval-soft",
        measures="GenEval with partial credit for each thing that is right: for training, not for reports.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=_GENEVAL_NEEDS,
        load=_geneval_soft,
        metadata="include",
    ),
    RewardEntry(
        name="shapes-geneval",
        measures="Whether a picture of the shapes world shows its caption: 1 or 0.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(),
        load=_shapes_geneval,
    ),
    RewardEntry(
        name="shapes-geneval-soft",
        measures="How much of its caption a picture of the shapes world shows: partial credit, as geneval-soft.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(),
        load=_shapes_geneval_soft,
    ),
    RewardEntry(
        name="ocr",
        measures="How much of the quoted text of the prompt can be read in the picture.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(Need("", ("rapidocr/models/*.onnx",), 31_750_000, "Apache-2.0"),),
        load=_ocr,
        extra="ocr",
    ),
)
REWARDS |= {entry.name: entry for entry in _RULES}


def find_reward(name: str) -> RewardEntry:
    """The row of that name, or of the user's own reward `module:Class`. UsageError, with the nearest name, for none."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return user_entry(name)
    near = get_close_matches(name, REWARDS, n=1)
    raise UsageError(
        f"There is no reward `{name}`.",
        f"Did you mean `{near[0]}`?" if near else "List them: rtdmd rewards list",
    )
