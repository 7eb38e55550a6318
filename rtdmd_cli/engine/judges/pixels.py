"""What several rewards do with pictures before their models see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_batch(images: Tensor, *others: Sequence[Any]) -> None:
    """ValueError unless images are float [B,3,H,W] and every other argument has B entries."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images [B,3,H,W], got {images.dtype} {list(images.shape)}")
    for entries in others:
        if len(entries) != len(images):
            raise ValueError(f"{len(images)} images for {len(entries)} prompts or their metadata")


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel; images [B,3,H,W]."""
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - shift) / scale
