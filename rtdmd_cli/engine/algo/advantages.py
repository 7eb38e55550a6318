"""Group-relative advantages over several rewards (method, section 4, step 5)."""

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to every standard deviation


def _group_index(groups: Tensor | list[str]) -> Tensor:
    """Number the groups 0, 1, ...: int64 [N] on the CPU."""
    if isinstance(groups, Tensor):
        index: Tensor = torch.unique(groups.detach().cpu(), return_inverse=True)[1]
        return index
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return torch.tensor([numbers[name] for name in groups], dtype=torch.int64)


def _std(values: Tensor) -> Tensor:
    return values.std(correction=0) + STD_FLOOR


def weighted_advantages(
    rewards: dict[str, Tensor], weights: dict[str, float], groups: Tensor | list[str]
) -> Tensor:
    """Advantages before whitening, float64 [N] on the CPU:

        sum_r w_r (r - mean of its group) / (std of r over all images + 1e-4)        population std

    rewards: name -> [N]; weights: the same names; groups: the prompt of every image, as numbers [N] or
    names. float64 because equal rewards must give 0: the rounding of float32, divided by 1e-4 twice, would
    pass for an advantage.
    Raises ValueError for no reward, names that differ, or lengths that differ.
    """
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(
            f"rewards {sorted(rewards)} and weights {sorted(weights)} must name the same rewards"
        )
    index = _group_index(groups)
    sizes = torch.bincount(index)
    total = torch.zeros(len(index), dtype=torch.float64)
    for name, reward in rewards.items():
        if reward.shape != index.shape or len(index) == 0:
            raise ValueError(
                f"reward {name!r} has shape {list(reward.shape)} for groups of shape {list(index.shape)}"
            )
        values = reward.detach().to("cpu", torch.float64)
        means = torch.bincount(index, weights=values) / sizes
        total += weights[name] * (values - means[index]) / _std(values)
    return total


def group_advantages(
    rewards: dict[str, Tensor], weights: dict[str, float], groups: Tensor | list[str], clip: float = 5.0
) -> Tensor:
    """Advantages [N] of one epoch: weighted_advantages, whitened over all images, clipped to ±clip.

    Whitening: ``(A - mean) / (std + 1e-4)``, population std. On the device of the rewards, float32 (float64
    if they are float64), no gradient. A group of equal rewards gets 0. One non-finite reward makes all
    advantages non-finite. Waits for the device, once an epoch.
    Raises ValueError as weighted_advantages, and for clip <= 0.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    total = weighted_advantages(rewards, weights, groups)
    whitened = (total - total.mean()) / _std(total)
    first = next(iter(rewards.values()))
    wide = any(reward.dtype == torch.float64 for reward in rewards.values())
    return whitened.clamp(-clip, clip).to(first.device, torch.float64 if wide else torch.float32)
