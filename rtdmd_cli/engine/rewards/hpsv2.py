"""Human Preference Score v2.1 (Wu et al. 2023): an open_clip ViT-H/14 trained on people's rankings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from rtdmd_cli.engine.judges.features import ClipScorer, Preprocess, resize
from rtdmd_cli.engine.judges.open_clip import clip_config, to_transformers
from rtdmd_cli.engine.rewards.clip_reward import ClipReward
from rtdmd_cli.engine.rewards.convert import converted_from

MODEL = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the open_clip it was trained from
HEADS = 16  # of both towers of ViT-H/14
CONVERSION = "hpsv2-clip-1"


@dataclass(frozen=True)
class Letterbox:
    """How HPSv2 prepares pictures: longer edge to `size` px, black bars, mean and std per channel.

    Square pictures come out as CLIP's own preprocessing makes them; of others CLIP would crop the edges off.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in 0..1 -> pixel values [B,3,size,size]."""
        height, width = images.shape[-2:]
        scale = self.size / max(height, width)
        if scale != 1:
            height, width = round(height * scale), round(width * scale)
            images = resize(images, height, width)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        images = F.pad(images, (left, self.size - width - left, top, self.size - height - top))
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def load(device: torch.device, path: str | None = None) -> ClipReward:
    """The cosine of picture and prompt, about 0.2..0.36: the package's `image_features @ text_features.T`.

    path: a folder or hub id with HPS_v2.1_compressed.pt, the files of a CLIP tokenizer and
    preprocessor_config.json. Errors as `convert.converted_from` and `ClipScorer.load`.
    """
    weights = converted_from(path or MODEL, FILE, CONVERSION, _convert, entry="state_dict")
    tensors = load_file(weights)
    config = clip_config(tensors, HEADS, "gelu")
    scorer = ClipScorer.from_tensors(FILE, config, tensors, path or PROCESSOR, device)
    assert isinstance(scorer.preprocess, Preprocess)
    crop = scorer.preprocess
    return ClipReward(replace(scorer, preprocess=Letterbox(crop.crop, crop.mean, crop.std)))


def _convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_transformers(tensors, FILE)
