"""Stage 2's fake score: fitted to the epoch's images, to fresh rollouts, or to images that rewards chose."""

from collections.abc import Sequence

from torch import Tensor

from rtdmd_cli.engine.algo.flow import move
from rtdmd_cli.engine.algo.tilt import effective_share, systematic_draw, tilt_weights
from rtdmd_cli.engine.compute import optim, rng
from rtdmd_cli.engine.training.matching import (
    Boundary,
    Point,
    add_fake_gradients,
    boundaries_in_use,
    evaluated_together,
    fake_loss,
)
from rtdmd_cli.engine.training.trainer import Draws, back_propagate, move_role, parts_of
from rtdmd_cli.engine.tune_reward.rollouts import Rollouts, Tuner, conditioning

FAKE = "tune/fake"
"""Name of the random stream of the fake score's turn; stage 1's is another."""


def update_fake_score(tuner: Tuner, epoch: int, rollouts: Rollouts, advantages: Tensor) -> None:
    """The fake score's turn: one optimiser step of section 3's loss. advantages [N] as of `recipe.advantages_of`."""
    core, config = tuner.core, tuner.config
    core.fake_optimizer.zero_grad(set_to_none=True)
    if config.tilt:
        add_tilted_fake_gradients(tuner, epoch, rollouts, advantages)
    elif config.matching == "distill":
        add_fake_gradients(core, FAKE, epoch, matched_prompts(tuner, rollouts))
    else:
        add_last_fake_gradients(tuner, epoch, rollouts)
    total = config.epochs if config.lr_decay == "both" else None
    rate = optim.learning_rate_at(epoch, config.fake_lr, config.lr_warmup, total)
    move_role(core, "fake", core.fake_optimizer, rate, epoch)


def matched_prompts(tuner: Tuner, rollouts: Rollouts) -> list[int]:
    """Prompt index of each fresh rollout of `tune_reward.matching: distill`, evenly spread over the epoch's."""
    count = len(rollouts.prompts)
    wanted = tuner.config.matching_images or count
    return rollouts.prompts_of([number * count // wanted for number in range(wanted)])


def add_last_fake_gradients(tuner: Tuner, epoch: int, rollouts: Rollouts) -> None:
    """Accumulate the gradients of section 3's loss on the epoch's images, s = 0."""
    add_recorded_fake_gradients(
        tuner, epoch, rollouts, [(part, part) for part in rollouts.parts], 1 / rollouts.count
    )


def add_tilted_fake_gradients(tuner: Tuner, epoch: int, rollouts: Rollouts, advantages: Tensor) -> None:
    """Accumulate the gradients of section 3's loss on images of the epoch that are drawn in favour of the poor ones.

    `algo.tilt` says why. They are matched where the generator is: at every boundary of its path, or at s = 0.
    """
    drawn = drawn_images(tuner, epoch, advantages)
    own, weight = tuner.core.processes.part(len(rollouts.prompts)), 1 / len(drawn)
    places = [place for place, image in enumerate(drawn) if image in own]
    if not places:  # a process without any takes part all the same, with a gradient of 0
        places, drawn, weight = [0], [rollouts.parts[0][0]], 0.0
    runs = parts_of(range(len(places)), tuner.config.micro_batch)
    keys = [
        [places[i] for i in run] for run in runs
    ]  # an image that is drawn twice has noise of its own each time
    parts = [(part, [drawn[place] for place in part]) for part in keys]
    add_recorded_fake_gradients(tuner, epoch, rollouts, parts, weight)


def add_recorded_fake_gradients(
    tuner: Tuner,
    epoch: int,
    rollouts: Rollouts,
    parts: Sequence[tuple[Sequence[int], Sequence[int]]],
    weight: float,
) -> None:
    """Accumulate `weight` times the gradients of section 3's loss on each image.

    parts: of each micro-batch the keys of its random numbers, and its images' numbers.
    """
    core = tuner.core
    with core.processes.agreeing():
        for keys, images in parts:
            cond, draws = conditioning(core, rollouts.prompts_of(images)), Draws(core, FAKE, epoch, keys)
            points = recorded_points(tuner, draws, rollouts.x[rollouts.rows(images)])
            with core.roles.role("fake", train=True):
                for group in evaluated_together(core, points):
                    loss = fake_loss(core, draws, group, cond, weight * len(images) / len(points))
                    back_propagate(core, "The fake-score loss", loss)


def drawn_images(tuner: Tuner, epoch: int, advantages: Tensor) -> list[int]:
    """Numbers of the images that the fake score is fitted to, rising, some more than once; the same in every process.

    `matching_images` of them (null: as many as the epoch has), drawn by ``exp(-tilt A)`` among those that have an advantage.

    A is relative to the prompt's group, in which the image itself counts: with K images a prompt the tilt acts as
    ``tilt (K-1)/K``. It is in standard deviations of the epoch, so that the target sharpens while failures get rare, and
    it is clipped: no image is favoured by more than ``exp(2 tilt advantage_clip)``. Prompts are drawn about evenly,
    whatever their own level of reward.
    """
    core, config = tuner.core, tuner.config
    rows = advantages.isfinite().nonzero().flatten()
    weights = tilt_weights(advantages[rows], config.tilt)
    core.metrics["tilt_effective"] = float(effective_share(weights)) / core.processes.count
    u = float(rng.uniform(0.0, 1.0, config.seed, "tune/tilt", epoch, [0])) % 1.0  # 1 itself only by rounding
    picked: list[int] = rows[systematic_draw(weights, config.matching_images or len(advantages), u)].tolist()
    return picked


def recorded_points(tuner: Tuner, draws: Draws, x: Tensor) -> list[Point]:
    """Where recorded paths x [b,T+1,C,H,W] landed, for those steps that distribution matching uses.

    Their clean predictions are not recorded; the fake score's loss needs none.
    """
    core, last = tuner.core, len(tuner.core.sigmas) - 1
    used = [last] if tuner.last_step_matching else boundaries_in_use(core, draws)
    x = move(x, core.backbone.device)
    return [(step - 1, Boundary(core.sigmas[step], x[:, step], x[:, step])) for step in used]
