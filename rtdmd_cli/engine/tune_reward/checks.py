"""What is looked at before stage 2 trains: rewards, numbers that don't fit, and settings that exclude each other."""

from collections.abc import Callable, Collection

import torch

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_paths, split_weights
from rtdmd_cli.engine.compute.processes import Processes, require_parts
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards.mixture import RewardMixture, open_mixture
from rtdmd_cli.engine.rewards.scoring import Limits
from rtdmd_cli.engine.training.held_out import open_clip
from rtdmd_cli.errors import UsageError


def require_shares(processes: Processes, config: TuneRewardConfig) -> None:
    """UsageError where there are more processes than pictures for them."""
    require_parts(processes, "tune_reward.images_per_epoch", config.images_per_epoch, equal=True)
    if config.matching_images is not None:
        require_parts(processes, "tune_reward.matching_images", config.matching_images, equal=False)


def open_rewards(
    config: TuneRewardConfig,
    prompts: PromptSet,
    eval_prompts: PromptSet,
    device: torch.device,
    say: Callable[[str], None],
    edge: int,
) -> RewardMixture:
    """The preset's rewards, each (and the watch's CLIP) loaded once; says which take no part in which term.

    edge: px of the pictures; where there is back-propagation, the gradients are tried with one.
    """
    weights, paths = split_weights(config.rewards), split_paths(config.reward_paths)
    memory, limits = config.rewards_in_memory, Limits(config.max_bad_share, config.reward_seconds)
    open_mixture(weights, config.held_out, paths, eval_prompts, device, memory)
    mixture = open_mixture(weights, config.held_out, paths, prompts, device, memory, limits=limits)
    trained = followed(config, mixture.differentiable)
    idle = [name for name in weights if name not in trained]
    without = [name for name in trained if name not in mixture.differentiable]
    if idle:
        say(f"no term that is on can follow {', '.join(idle)}: measured, not trained on")
    if without and config.backprop_weight:
        tilted = config.tilt and config.dmd_weight
        terms = {"policy term": config.policy_weight, "tilt of matching": tilted}
        on = " and the ".join(name for name, weight in terms.items() if weight)
        say(f"no gradient in {', '.join(without)}: in the {on} only, not in back-propagation")
    if (
        config.backprop_weight
        and not mixture.differentiable
        and not (config.policy_weight or config.dmd_weight)
    ):
        raise UsageError(
            "Back-propagation is the only term, and none of the rewards is differentiable.",
            "See which are: rtdmd rewards list",
        )
    mixture.check_loading(edge if config.backprop_weight else None)
    if config.watch.features:
        open_clip(config.watch.features, device)
    return mixture


def followed(config: TuneRewardConfig, differentiable: Collection[str]) -> tuple[str, ...]:
    """The rewards of the preset that some term trains on: all by policy gradient or tilt, else those with a gradient."""
    names = tuple(split_weights(config.rewards))
    if config.policy_weight or (config.tilt and config.dmd_weight):
        return names
    return tuple(name for name in names if config.backprop_weight and name in differentiable)


def check_counts(config: TuneRewardConfig, prompts: int, steps: int, eta: float) -> None:
    """UsageError where the preset's numbers don't fit the prompts or the sampler."""
    wanted = config.images_per_epoch // config.images_per_prompt
    if wanted > prompts:
        raise UsageError(
            f"An epoch takes {wanted} different prompts, and there are {prompts}.",
            "Lower `tune_reward.images_per_epoch`, or raise `tune_reward.images_per_prompt`.",
        )
    random = config.policy_weight or config.kl_weight
    if random and (config.subset_steps > steps - 1 or eta == 0):
        stochastic = steps - 1 if eta else 0
        raise UsageError(
            f"`tune_reward.subset_steps` is {config.subset_steps}; the sampler has {stochastic} stochastic steps.",
            "Lower it, raise `sampler.eta` or `sampler.raw_steps`, or set `tune_reward.policy_weight` and `kl_weight` to 0.",
        )
    if config.backprop_steps > steps:
        raise UsageError(
            f"`tune_reward.backprop_steps` is {config.backprop_steps}; the sampler has {steps} steps.",
            "Lower it.",
        )


def check_tilt(preset: Preset) -> None:
    """UsageError where the tilt would need what recorded paths don't hold: the clean predictions on the way."""
    config = preset.tune_reward
    if (
        config.tilt
        and config.dmd_weight
        and config.matching == "distill"
        and preset.distill.interval == "full"
    ):
        raise UsageError(
            f"`tune_reward.tilt` ({config.tilt:g}) with `tune_reward.matching: distill` can't be with "
            "`distill.interval: full`.",
            "Set `tune_reward.matching` to last, or `tune_reward.tilt` to 0.",
        )
