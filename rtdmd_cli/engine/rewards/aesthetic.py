"""The improved aesthetic predictor (Schuhmann 2022): linear layers on the picture's CLIP ViT-L/14 feature.

score = W_5 (... W_1 f + b_1 ...) + b_5, f the feature at length 1, widths 768-1024-128-64-16-1. The published
Sequential has dropout after the first three layers, which is off when scoring, and no activation anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.rewards.convert import converted_from
from rtdmd_cli.engine.storage.tensors import check_tensors
from rtdmd_cli.errors import DataError

CLIP = "openai/clip-vit-large-patch14"
MODEL = "camenduru/improved-aesthetic-predictor"  # the author publishes outside the hub; this is a copy
FILE = "sac+logos+ava1-l14-linearMSE.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)  # positions of the linear layers in the published Sequential
CONVERSION = "aesthetic-1"


@dataclass(frozen=True)
class AestheticReward:
    """About 4..7 for generated pictures, whatever the prompt. Differentiable to the pixels. See `base.Reward`.

    layers: weight [out,in] and bias [out] of each, float32.
    """

    scorer: ClipScorer
    layers: tuple[tuple[Tensor, Tensor], ...]
    differentiable: bool = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Float32 [B], on the device of images [B,3,H,W] (0..1); prompts and metadata are not read."""
        x = self.scorer.image_features(images)
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(-1).to(images.device)


def load(device: torch.device, path: str | None = None) -> AestheticReward:
    """path: a folder or hub id with sac+logos+ava1-l14-linearMSE.pth beside a CLIP as for `pickscore.load`.

    Errors as `convert.converted_from` and `ClipScorer.load`; DataError for a CLIP of another width than 768.
    """
    weights = converted_from(path or MODEL, FILE, CONVERSION, _convert)
    scorer = ClipScorer.load(path or CLIP, device)
    width = scorer.model.config.projection_dim
    if width != WIDTHS[0]:
        raise DataError(
            f"The CLIP of {path} has features of width {width}; the aesthetic predictor reads {WIDTHS[0]}.",
            f"Give a folder that holds {CLIP}.",
        )
    tensors = {key: value.to(device, torch.float32) for key, value in load_file(weights).items()}
    layers = tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in LAYERS)
    return AestheticReward(scorer, layers)


def _convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, into, out in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True):
        shapes |= {f"layers.{i}.weight": (out, into), f"layers.{i}.bias": (out,)}
    check_tensors(tensors, shapes, FILE)
    return tensors
