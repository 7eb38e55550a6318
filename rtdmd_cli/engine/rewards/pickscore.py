"""PickScore v1 (Kirstain et al. 2023): a CLIP ViT-H/14 trained on people's choices between two pictures."""

from __future__ import annotations

import torch

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.rewards.clip_reward import ClipReward

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model's repository is not complete


def load(device: torch.device, path: str | None = None) -> ClipReward:
    """exp(logit_scale) * cosine, about 16..24, as published: not divided by 26, which is the training recipe's.

    path: a folder or hub id with a whole CLIP in transformers' layout: config.json, model.safetensors, the
    tokenizer's files and preprocessor_config.json. Errors as `ClipScorer.load`.
    """
    scorer = ClipScorer.load(path or MODEL, device, None if path else PROCESSOR)
    return ClipReward(scorer, scale=float(scorer.model.logit_scale.exp()))
