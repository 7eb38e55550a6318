"""Stage 2: raise a few-step generator's rewards inside the teacher's distribution (method, section 4).

    rtdmd tune-reward --reward shapes-clip

One epoch, one optimiser step of each role:

    SubGRPO            choose M of the stochastic steps
    roll out           K images a prompt; chosen steps draw fresh noise, the others noise that the group shares
    rewards            of the decoded images, several at once; an image that one of them can't judge is left out
    advantages         per reward against the prompt's group, weighted, whitened, clipped
    pull               gradient of the rewards by the clean latents (`pull.py`)
    fake's turn        section 3's loss on these images (s = 0)
    generator's turn   clipped surrogate on the chosen steps; on the last step distribution matching and the
                       reward's own gradient

With `matching: distill` the fake's turn and the matching are stage 1's own, on fresh rollouts of the epoch's prompts.
Matched through the last step alone, the others are free to follow the reward. With `tilt` the fake score is fitted to
images of the epoch that are drawn in favour of the poor ones, and matching then leans to the rewards, also to those
without a gradient (`algo/tilt.py`).

The generator is stage 1's, frozen, with a fresh adapter on top (`roles/adapters.py`). Random numbers are keyed by (seed,
stream, epoch, image), so that micro-batches and resumed runs see the same ones.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.advantages import group_advantages
from rtdmd_cli.engine.algo.flow import cps_logprob, move
from rtdmd_cli.engine.algo.gradients import bound_gradients
from rtdmd_cli.engine.algo.losses import clipped_policy_loss, gaussian_kl, reward_hinge_loss
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.device import HostRows
from rtdmd_cli.engine.rewards.scoring import require_judged
from rtdmd_cli.engine.rewards.sharing import gathered, require_work
from rtdmd_cli.engine.training.matching import Boundary, add_matching_gradients, matching_loss
from rtdmd_cli.engine.training.trainer import Draws, add, back_propagate, move_role
from rtdmd_cli.engine.tune_reward.fake_score import matched_prompts, update_fake_score
from rtdmd_cli.engine.tune_reward.pull import below_margin, take_pull
from rtdmd_cli.engine.tune_reward.rollouts import (
    Rollouts,
    Tuner,
    last_step,
    micro_batches,
    roll_out,
    transition,
)

GENERATOR = "tune/generator"
"""Name of the random stream of the generator's turn; stage 1's is another."""


def tune(tuner: Tuner, epoch: int) -> None:
    """One epoch (0-based; errors count from 1). Leaves its figures in `tuner.core.metrics`.

    Raises NumericalError before a role moves by a value that is not finite; RewardFailure where too many images have
    no reward, before anything moves at all.
    """
    core, config = tuner.core, tuner.config
    core.begin()
    with core.processes.agreeing():
        rollouts = roll_out(tuner, epoch)
        images = decoded(tuner, rollouts)
        own = tuner.rewards.score(images, rollouts.prompts_of([i for part in rollouts.parts for i in part]))
    scores = gathered(core.processes, rollouts.prompts, own)
    rows = require_judged(scores, config.max_bad_share, f"epoch {epoch + 1}", tuner.tell)
    require_work(core.processes, rows, len(rollouts.prompts))
    rewards = {name: values[rows] for name, values in scores.rewards.items()}
    advantages = advantages_of(tuner, rewards, rows, len(rollouts.prompts))
    rollouts = replace(rollouts.only(rows), reward=tuner.rewards.combined(scores.rewards))
    if tuner.backprop_weight:
        with core.processes.agreeing():
            rollouts = replace(rollouts, pull=take_pull(tuner, rollouts, images))
    if config.dmd_weight:  # nothing else needs the fake score
        update_fake_score(tuner, epoch, rollouts, advantages)
    update_generator(tuner, epoch, rollouts, advantages)
    core.metrics = core.processes.sum_figures(core.metrics)
    core.metrics |= {f"reward/{name}": float(values.mean()) for name, values in rewards.items()}
    if left_out := len(rollouts.prompts) - len(rows):
        core.metrics["left_out"] = float(left_out)


@torch.no_grad()
def decoded(tuner: Tuner, rollouts: Rollouts) -> Tensor:
    """This process's images [n,3,H,W], on the CPU."""
    backbone = tuner.core.backbone
    images = HostRows(len(rollouts.x))
    for part in rollouts.parts:
        images.add(backbone.decode(move(rollouts.x[rollouts.rows(part), -1], backbone.device)))
    return images.whole()


def advantages_of(tuner: Tuner, rewards: dict[str, Tensor], rows: Tensor, count: int) -> Tensor:
    """Advantages [count] of all images, nan for those that are not among `rows` [n]; rewards: [n] each.

    Group means and stds are over `rows` alone, as if there were no other images.
    """
    config, advantages = tuner.config, torch.full((count,), torch.nan)
    groups = rows // config.images_per_prompt
    advantages[rows] = group_advantages(rewards, tuner.rewards.weights, groups, config.advantage_clip)
    return advantages


def update_generator(tuner: Tuner, epoch: int, rollouts: Rollouts, advantages: Tensor) -> None:
    """The generator's turn, accumulated over the epoch: (sum of the chosen steps + last step) / (M + 1)."""
    core, config = tuner.core, tuner.config
    core.generator_optimizer.zero_grad(set_to_none=True)
    accumulate_generator(tuner, epoch, rollouts, advantages)
    total = config.epochs if config.lr_decay != "none" else None
    rate = optim.learning_rate_at(epoch, config.generator_lr, config.lr_warmup, total)
    move_role(core, "generator", core.generator_optimizer, rate, epoch)
    decay = optim.ema_decay_at(epoch, config.ema_decay, warmup=False)
    optim.ema_update(core.ema, core.roles.named_parameters("generator"), decay)
    core.generator_updates += 1


def accumulate_generator(tuner: Tuner, epoch: int, rollouts: Rollouts, advantages: Tensor) -> None:
    """Accumulate the gradients of the generator's turn."""
    core, config = tuner.core, tuner.config
    with core.processes.agreeing():
        for part, cond, share in micro_batches(core, rollouts):
            share_of_term = share / (len(rollouts.steps) + 1)
            with core.roles.role("generator", train=True):
                if config.policy_weight or config.kl_weight:
                    for k in rollouts.steps:
                        loss = policy_loss(tuner, rollouts, part, k, cond, advantages, share)
                        back_propagate(core, "The policy loss", loss, share_of_term)
                if tuner.last_step_matching or tuner.backprop_weight:
                    draws = Draws(core, GENERATOR, epoch, part)
                    loss = last_step_loss(tuner, rollouts, draws, cond, share)
                    back_propagate(core, "The loss of the last step", loss, share_of_term)
    if config.dmd_weight and config.matching == "distill":
        weight = config.dmd_weight / (len(rollouts.steps) + 1)
        add_matching_gradients(core, GENERATOR, epoch, matched_prompts(tuner, rollouts), weight)


def policy_loss(
    tuner: Tuner,
    rollouts: Rollouts,
    part: Sequence[int],
    k: int,
    cond: Conditioning,
    advantages: Tensor,
    share: float,
) -> Tensor:
    """Clipped surrogate of step `k`, and the KL to stage 1's generator; the generator is active.

    On-policy: the old log-probability is this one, detached. The recorded one shows the drift.
    """
    core, config, rows = tuner.core, tuner.config, rollouts.rows(part)
    x, x_next = (move(rollouts.x[rows, step], core.backbone.device) for step in (k, k + 1))
    mean, std = transition(core, x, k, cond)
    logp = cps_logprob(x_next, mean, std, config.logprob)
    output = clipped_policy_loss(
        logp, logp.detach(), move(advantages[list(part)], logp.device), config.policy_clip
    )
    drift = (logp.detach() - move(rollouts.logp[rows, k], logp.device)).abs().mean()
    add(core, {"drift": drift / len(rollouts.steps)}, share)
    loss = config.policy_weight * output.loss
    if config.kl_weight:
        with torch.no_grad(), core.roles.role("start"):
            reference, _ = transition(core, x, k, cond)
        kl = gaussian_kl(mean, reference, std).mean()
        add(core, {"kl": kl / len(rollouts.steps)}, share)
        loss = loss + config.kl_weight * kl
    return loss


def last_step_loss(
    tuner: Tuner, rollouts: Rollouts, draws: Draws, cond: Conditioning, share: float
) -> Tensor:
    """Distribution matching at s = 0, through the last step alone, and reward back-propagation.

    The generator is active.
    """
    core, config, x0 = tuner.core, tuner.config, None
    loss = torch.zeros((), device=core.backbone.device)
    if tuner.last_step_matching:
        x0 = clean_latent(tuner, rollouts, draws.indices, cond, 1)
        point = (tuner.stochastic, Boundary(0.0, x0, x0.detach()))
        matching = matching_loss(core, draws, [point], cond, share) / share
        loss = loss + config.dmd_weight * matching
    if tuner.backprop_weight:
        assert rollouts.pull is not None
        places = below_margin(tuner, rollouts, draws.indices)
        pulled = [draws.indices[place] for place in places]
        if x0 is None or config.backprop_steps > 1:
            x0 = clean_latent(tuner, rollouts, pulled, cond.select(places), config.backprop_steps)
        else:
            x0 = x0[move(torch.tensor(places), x0.device)]
        reward = rollouts.pull.reward_of(x0, rollouts.rows(pulled))
        hinge, part = reward_hinge_loss(reward, config.backprop_margin), len(pulled) / len(draws.indices)
        add(core, {"hinge_loss": hinge.loss, "hinge_active": hinge.metrics["active"]}, share * part)
        loss = loss + config.backprop_weight * part * hinge.loss
    return loss


def clean_latent(
    tuner: Tuner, rollouts: Rollouts, part: Sequence[int], cond: Conditioning, steps: int
) -> Tensor:
    """The clean latent [b,C,H,W] with gradient through the last `steps` evaluations.

    A stochastic step on the way keeps its recorded value: the noise is a constant, the gradient is the mean's.
    """
    core, rows, passed = tuner.core, rollouts.rows(part), []
    first = tuner.stochastic + 1 - steps
    x = move(rollouts.x[rows, first], core.backbone.device)
    for k in range(first, tuner.stochastic):
        mean, _ = transition(core, x, k, cond)
        x = move(rollouts.x[rows, k + 1], mean.device) + (mean - mean.detach())
        passed.append(x)
    x0 = last_step(core, x, cond)
    if torch.is_grad_enabled():
        bound_gradients(x0, passed)
    return x0
