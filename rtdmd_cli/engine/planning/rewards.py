"""Reward models as shapes alone: what they hold, and what scoring and their gradient take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.engine.planning.account import Account, fused_attention
from rtdmd_cli.engine.planning.depth import extrapolated
from rtdmd_cli.engine.planning.skeleton import META, tensors_of
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.rewards.scoring import Scores

SIDE, TOKENS = 224, 77
CLIPS = {"pickscore": "vit-h", "hpsv2": "vit-h", "clipscore": "vit-l", "aesthetic": "vit-l"}
"""Rewards that are a CLIP in float32; of others the files' bytes are taken, and nothing is run."""
DEPTHS = {"vit-h": {"vision": 32, "text": 24}, "vit-l": {"vision": 24, "text": 12}}
WIDTHS = {"vit-h": (1280, 1024, 1024), "vit-l": (1024, 768, 768)}
"""Of vision, text and projection."""
WEIGHT_FILES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class RewardCost:
    """Bytes of a reward's weights; per picture, bytes of activations without gradient, bytes of what a gradient needs,
    and operations forwards. All but the weights are 0 for a reward that is not a CLIP."""

    weights: int
    activations: int = 0
    graph: int = 0
    flops: int = 0


@cache
def reward_cost(name: str, side: int) -> RewardCost:
    """Of the reward called `name`, on pictures of `side` px. UsageError for an unknown name."""
    entry = find_reward(name)
    if name not in CLIPS:
        needs = [need for need in entry.needs if need.source]
        files = [need.size for need in needs if any(f.endswith(WEIGHT_FILES) for f in need.files)]
        return RewardCost(sum(files))
    kind = CLIPS[name]
    return RewardCost(**extrapolated(DEPTHS[kind], lambda few: clip_cost(kind, few, side)))


def clip_cost(kind: str, depth: Mapping[str, int], side: int) -> dict[str, int]:
    """As `RewardCost`, of a CLIP with so many layers, on one picture."""
    vision, text, projection = WIDTHS[kind]
    config = CLIPConfig(
        text_config={
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": depth["text"],
            "num_attention_heads": text // 64,
            "projection_dim": projection,
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": depth["vision"],
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": projection,
        },
        projection_dim=projection,
    )
    with META:
        model: Any = CLIPModel(config).eval().requires_grad_(False)
    account, image = Account(), torch.empty(1, 3, side, side, device=META)
    with fused_attention(), account:
        weights = account.hold([*tensors_of([model]), image])
        account.restart()
        with torch.no_grad():
            clip_score(model, image)
        quiet, flops = account.peak - account.live, account.flops
        before, image = account.live, image.requires_grad_()
        kept = clip_score(model, image)
        graph = account.live - before
        del kept
    return {"weights": weights - image.nbytes, "activations": quiet, "graph": graph, "flops": flops}


def clip_score(model: Any, images: Tensor) -> Tensor:
    """The cosine [b] of images [b,3,H,W] and as many prompts."""
    pixels = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    tokens = torch.zeros(len(images), TOKENS, dtype=torch.long, device=images.device)
    picture = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=tokens).pooler_output
    return (F.normalize(picture, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)


class RewardsOnShapes:
    """See `tune_reward.rollouts.Rewards`; those of a preset, whose own cost is counted apart (`reward_cost`)."""

    def __init__(self, rewards: Sequence[str]) -> None:
        self.weights = split_weights(rewards)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.weights if find_reward(name).differentiable)

    def score(self, images: Tensor, prompts: Sequence[int]) -> Scores:
        """Never called: scores are numbers that decide what is trained on, and shapes have none."""
        raise AssertionError("scores on shapes")

    def combined(self, rewards: Mapping[str, Tensor]) -> Tensor | None:
        """Not known, so that every image takes part in back-propagation."""
        return None

    def pull(
        self, images: Tensor, rows: Sequence[int], prompts: Sequence[int], size: int
    ) -> tuple[Tensor, Tensor]:
        """Never called, as `score`: each reward's part is a phase of its own."""
        raise AssertionError("gradients on shapes")
