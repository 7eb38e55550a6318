"""The reward that PickScore, CLIPScore, HPSv2 and the CLIPs of the shapes world have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.judges.requirements import Metadata


@dataclass(frozen=True)
class ClipReward:
    """scale * cosine of picture and prompt, differentiable to the pixels. See `base.Reward`.

    scale: 1 for the cosine itself, the model's temperature exp(logit_scale) for its logit.
    """

    scorer: ClipScorer
    scale: float = 1.0
    differentiable: bool = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Float32 [B], on the device of images [B,3,H,W] (0..1); metadata is not read."""
        return (self.scale * self.scorer.score(images, prompts)).to(images.device)
