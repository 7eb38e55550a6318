"""CLIPScore with OpenAI's ViT-L/14 (Hessel et al. 2021), as the plain cosine."""

from __future__ import annotations

import torch

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.rewards.clip_reward import ClipReward

MODEL = "openai/clip-vit-large-patch14"


def load(device: torch.device, path: str | None = None) -> ClipReward:
    """The cosine of picture and prompt, about 0.2..0.35.

    Hessel et al. write 2.5 * max(cosine, 0); the tables of few-step generators (0.28..0.32) leave out the factor,
    and the floor would end the gradient where it is needed most. Pictures are resized bicubically, as CLIP's own processor
    does; RTDMD's released code resizes them bilinearly, so that its figures differ a little.
    path: a folder or hub id as for `pickscore.load`. Errors as `ClipScorer.load`.
    """
    return ClipReward(ClipScorer.load(path or MODEL, device))
