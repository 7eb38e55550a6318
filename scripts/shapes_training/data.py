"""Pictures and captions for training, made in memory from a seed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rtdmd_cli.shapes.grammar import Caption, scene_for
from rtdmd_cli.shapes.prompts import training_captions
from rtdmd_cli.shapes.render import object_mask, render


@dataclass(frozen=True)
class Pictures:
    """images [N,3,32,32] uint8; masks [N,32,32] uint8, the share of a pixel that shapes cover; N captions."""

    images: Tensor
    masks: Tensor
    captions: list[Caption]


def make_pictures(count: int, seed: int) -> Pictures:
    """Draw training captions and a random picture for each."""
    rng = np.random.default_rng([seed, 1])
    captions = training_captions(count, seed)
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    masks = torch.empty(count, 32, 32, dtype=torch.uint8)
    for i, caption in enumerate(captions):
        scene = scene_for(caption, rng)
        images[i] = torch.from_numpy((render(scene) * 255).round().clip(0, 255).astype(np.uint8))
        masks[i] = torch.from_numpy((object_mask(scene) * 255).round().astype(np.uint8))
    return Pictures(images, masks, captions)
