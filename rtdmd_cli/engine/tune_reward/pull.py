"""The rewards' gradient by the epoch's clean latents, taken before the generator's turn (method, section 4).

The turn makes one step, of the generator that drew the epoch's pictures, so the pictures that it would decode are those
that were scored. The gradient can therefore be taken from the far end first: rewards by pictures, one reward after
another, then pictures by latents; the turn takes it from there through the network. No part holds what another
needs: neither a reward's weights nor its activations, nor those of the VAE, lie beside the network's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import move
from rtdmd_cli.engine.backbones.base import Backbone
from rtdmd_cli.engine.compute.device import HostRows
from rtdmd_cli.engine.tune_reward.rollouts import Pull, Rollouts, Tuner


def take_pull(tuner: Tuner, rollouts: Rollouts, images: Tensor) -> Pull:
    """See `Pull`. images [n,3,H,W]: the decoded pictures of all of this process's latents, on the CPU.

    RewardFailure for a reward that fails, NumericalError for one that is not finite.
    """
    device, parts = tuner.core.backbone.device, list[Sequence[int]]()
    for part in rollouts.parts:
        pulled = [part[place] for place in below_margin(tuner, rollouts, part)]
        parts.append(rollouts.rows(pulled))
    rows = [row for part in parts for row in part]
    prompts = rollouts.prompts_of([row + rollouts.first for row in rows])
    values, by_picture = tuner.rewards.pull(images, rows, prompts, max(len(part) for part in parts))
    gradients, start = HostRows(len(rows)), 0
    for part in parts:
        x0 = move(rollouts.x[part, -1], device)
        own = move(by_picture[start : start + len(part)], device)
        gradients.add(latent_gradient(tuner.core.backbone, x0, own))
        start += len(part)
    reward = torch.zeros(len(rollouts.x)).index_copy(0, torch.tensor(rows), values)
    gradient = torch.zeros_like(rollouts.x[:, -1]).index_copy(0, torch.tensor(rows), gradients.whole())
    return Pull(reward, gradient)


def latent_gradient(backbone: Backbone, x0: Tensor, by_picture: Tensor) -> Tensor:
    """What gradients [b,3,H,W] by the decoded pictures are by the latents x0 [b,C,H,W]."""
    x0 = x0.detach().requires_grad_()
    with torch.enable_grad():
        picture = backbone.decode(x0)
    (found,) = torch.autograd.grad(picture, x0, by_picture.to(picture.dtype))
    return found


def below_margin(tuner: Tuner, rollouts: Rollouts, rows: Sequence[int]) -> list[int]:
    """Places in `rows` of the images whose reward lies under the hinge's margin, by what was recorded.

    The others have no gradient, so none is computed. At least one place, so that there is a gradient, if only of 0.
    """
    if rollouts.reward is None:
        return list(range(len(rows)))
    low = (rollouts.reward[list(rows)] < tuner.config.backprop_margin).tolist()
    return [place for place, is_low in enumerate(low) if is_low] or [0]
