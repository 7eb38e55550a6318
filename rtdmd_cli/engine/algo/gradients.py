"""Gradients on their way back through several steps of a sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bound_gradients(last: Tensor, earlier: Sequence[Tensor]) -> None:
    """Bound each sample's gradient in the earlier latents by its norm in the last one; directions are kept.

    All latents are [b,C,H,W]; acts in the next backward pass. Where two pictures are equally near, a latent at high noise
    decides between them, and the gradient there can be thousands of times larger than in other samples (measured in the
    built-in world: median 0.01, largest 4), so that one sample in sixty-four would decide the step.
    """
    sizes: list[Tensor] = []

    def norm(gradient: Tensor) -> Tensor:
        size: Tensor = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return size

    def limit(gradient: Tensor) -> Tensor:
        own = norm(gradient)
        return gradient * torch.where(own > sizes[0], sizes[0] / own, 1.0)

    last.register_hook(lambda gradient: sizes.append(norm(gradient)))
    for x in earlier:
        x.register_hook(limit)
