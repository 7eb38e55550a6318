"""An epoch's images of stage 2: prompts, stochastic steps, latents and log-probabilities (method, section 4)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.algo.flow import cps_logprob, cps_mean_std, move, to_x0
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.compute.device import HostRows
from rtdmd_cli.engine.rewards.scoring import Scores
from rtdmd_cli.engine.training.trainer import Draws, Trainer, parts_of

ROLLOUT = "tune/rollout"
"""Name of the random stream; the turns have streams of their own."""


class Rewards(Protocol):
    """What the recipe needs of the rewards; `rewards.mixture.RewardMixture` is the real one."""

    weights: dict[str, float]

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of those with a gradient."""
        ...

    def score(self, images: Tensor, prompts: Sequence[int]) -> Scores:
        """Each reward of images [N,3,H,W] on the CPU and their prompts' indices, and what could not be judged."""
        ...

    def combined(self, rewards: Mapping[str, Tensor]) -> Tensor | None:
        """The values of `pull`, [N], from rewards that are known; None where none is differentiable."""
        ...

    def pull(
        self, images: Tensor, rows: Sequence[int], prompts: Sequence[int], size: int
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum [r] of the differentiable rewards, each over its divisor, and its gradient [r,3,H,W] by the images.

        Of the `rows` of images [n,3,H,W], with a prompt for each row; all on the CPU. size: how many are judged at a time.
        """
        ...


@dataclass
class Tuner:
    """What the recipe works on. `core` holds roles, optimisers and EMA; its settings are section 3's.

    tell: is given a line for each image that is left out.
    """

    core: Trainer
    config: TuneRewardConfig
    rewards: Rewards
    tell: Callable[[str], None] = lambda line: None

    @property
    def stochastic(self) -> int:
        """Number of stochastic steps: all but the last."""
        return len(self.core.sigmas) - 2

    @property
    def backprop_weight(self) -> float:
        """Weight of reward back-propagation: 0 where no reward has a gradient."""
        return self.config.backprop_weight if self.rewards.differentiable else 0.0

    @property
    def last_step_matching(self) -> bool:
        """Whether distribution matching is of the epoch's images, at s = 0."""
        return bool(self.config.dmd_weight) and self.config.matching == "last"


@dataclass(frozen=True)
class Pull:
    """Where the rewards pull the epoch's pictures, on the CPU; 0 for those that lie above the hinge's margin.

    reward [n]: weighted sum of the differentiable rewards; gradient [n,C,H,W]: of it by the clean latent.
    """

    reward: Tensor
    gradient: Tensor

    def reward_of(self, x0: Tensor, rows: Sequence[int]) -> Tensor:
        """The reward [b] of those rows, with its gradient to x0 [b,C,H,W], which holds their values."""
        own = list(rows)
        reward, gradient = (move(each[own], x0.device) for each in (self.reward, self.gradient))
        return reward + ((x0 - x0.detach()) * gradient).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class Rollouts:
    """The images of an epoch, on the CPU; of several processes each has its own part of the N images.

    x [n,T+1,C,H,W] float32: x[:, k] at `sigmas[k]`, the last the clean latent. logp [n,T-1] of the stochastic
    steps. prompts [N]: prompt indices, group after group. steps: the chosen ones. parts: this process's micro-batches,
    by the images' numbers; first: the number of its first image; count: images of all processes in any part.
    reward [N]: weighted sum of the differentiable rewards, where it is known. pull: their gradient, where it is followed.
    """

    x: Tensor
    logp: Tensor
    prompts: Tensor
    steps: tuple[int, ...]
    parts: tuple[Sequence[int], ...] = field(repr=False)
    first: int
    count: int
    reward: Tensor | None = None
    pull: Pull | None = None

    def only(self, rows: Tensor) -> "Rollouts":
        """Without the other rows in any part: nothing is trained on them. All else is as it was, noise included."""
        wanted = set(rows.tolist())
        if len(wanted) == len(self.prompts):
            return self
        parts = [[row for row in part if row in wanted] for part in self.parts]
        return replace(self, parts=tuple(part for part in parts if part), count=len(wanted))

    @cached_property
    def _indices(self) -> list[int]:
        indices: list[int] = self.prompts.tolist()
        return indices

    def prompts_of(self, images: Sequence[int]) -> list[int]:
        """Prompt indices of images, by their numbers."""
        return [self._indices[image] for image in images]

    def rows(self, part: Sequence[int]) -> list[int]:
        """Where the images of a part stand in `x` and `logp`."""
        return [image - self.first for image in part]


def chosen_steps(tuner: Tuner, epoch: int) -> tuple[int, ...]:
    """SubGRPO: M of the stochastic steps, one subset for the whole epoch, in order."""
    order = rng.permutation(tuner.stochastic, tuner.config.seed, "tune/steps", epoch)
    return tuple(sorted(order[: tuner.config.subset_steps].tolist()))


def chosen_prompts(tuner: Tuner, epoch: int) -> list[int]:
    """Prompt index of each image: distinct prompts, each `images_per_prompt` times in a row."""
    config = tuner.config
    order: list[int] = rng.permutation(tuner.core.prompts, config.seed, "tune/prompts", epoch).tolist()
    groups = order[: config.images_per_epoch // config.images_per_prompt]
    return [prompt for prompt in groups for _ in range(config.images_per_prompt)]


def roll_out(tuner: Tuner, epoch: int) -> Rollouts:
    """Roll the generator out with the epoch's noise; see `Rollouts`."""
    return rolled_out(tuner, epoch, chosen_steps(tuner, epoch), chosen_prompts(tuner, epoch))


def rolled_out(tuner: Tuner, epoch: int, steps: tuple[int, ...], prompts: Sequence[int]) -> Rollouts:
    """`roll_out` of these prompts, one for each image, with these chosen steps."""
    core, indices = tuner.core, torch.tensor(prompts)
    own = core.processes.part(len(prompts))
    parts = tuple(parts_of(own, tuner.config.micro_batch))
    latents, logps = HostRows(len(own)), HostRows(len(own))
    for part in parts:
        draws, cond = Draws(core, ROLLOUT, epoch, part), conditioning(core, [prompts[i] for i in part])
        with core.roles.role("generator"), torch.no_grad():
            x, logp = roll_out_part(tuner, draws, cond, steps)
        latents.add(x)
        logps.add(logp)
    return Rollouts(latents.whole(), logps.whole(), indices, steps, parts, own.start, len(prompts))


def roll_out_part(
    tuner: Tuner, draws: Draws, cond: Conditioning, steps: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Every latent [b,T+1,C,H,W] and the log-probability of every stochastic step [b,T-1]."""
    core, x = tuner.core, draws.normal("initial")
    latents, logps = [x], []
    for k in range(tuner.stochastic):
        mean, std = transition(core, x, k, cond)
        x = mean + std * (draws.normal(f"{k}/step") if k in steps else shared_noise(tuner, draws, k))
        logps.append(cps_logprob(x, mean, std, tuner.config.logprob))
        latents.append(x)
    logp = torch.stack(logps, dim=1) if logps else x.new_zeros(len(x), 0)
    return torch.stack([*latents, last_step(core, x, cond)], dim=1), logp


def shared_noise(tuner: Tuner, draws: Draws, k: int) -> Tensor:
    """Noise of a step that was not chosen: the same for all images of a prompt, [b,C,H,W]."""
    groups = [index // tuner.config.images_per_prompt for index in draws.indices]
    noise = rng.normal(tuner.core.shape, tuner.config.seed, f"{ROLLOUT}/{k}/shared", draws.iteration, groups)
    return move(noise, tuner.core.backbone.device)


def transition(core: Trainer, x: Tensor, k: int, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """Mean and std of the active role's stochastic step `k` from x [b,C,H,W]."""
    sigma, sigma_next = core.sigmas[k], core.sigmas[k + 1]
    v = core.backbone.velocity(x, x.new_full(x.shape[:1], sigma), cond)
    return cps_mean_std(x, v, sigma, sigma_next, core.eta)


def last_step(core: Trainer, x: Tensor, cond: Conditioning) -> Tensor:
    """The active role's clean latent, from x [b,C,H,W] at the last level above 0."""
    sigma = core.sigmas[-2]
    return to_x0(x, sigma, core.backbone.velocity(x, x.new_full(x.shape[:1], sigma), cond))


def micro_batches(core: Trainer, rollouts: Rollouts) -> Iterator[tuple[Sequence[int], Conditioning, float]]:
    """This process's images in parts: their numbers, encoded prompts on the device, the part's share of the epoch."""
    for part in rollouts.parts:
        yield part, conditioning(core, rollouts.prompts_of(part)), len(part) / rollouts.count


def conditioning(core: Trainer, prompts: Sequence[int]) -> Conditioning:
    """Encoded prompts of prompt indices, on the model's device."""
    return core.conditioning(prompts).to(core.backbone.device, core.backbone.dtype)
