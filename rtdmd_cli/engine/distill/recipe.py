"""Stage 1: turn a many-step flow model into a few-step generator (method, section 3).

    rtdmd distill --preset shapes-4step

One iteration, on the next prompts of an epoch over all of them:

    fake's turn        roll the generator out; at each boundary s diffuse x_s to a time t above it; fit the
                       fake score's velocity to the exact one, and make its clean prediction self-consistent
    generator's turn   every `fake_per_generator`-th iteration: a fresh rollout on the same prompts; carry
    (fake first)       the same x_t back to s with teacher and with fake score; move x_s towards the teacher's

The teacher, the fake score and the generator are one network with different adapters (`roles/adapters.py`). Every
random number is keyed by (seed, stream, iteration, sample), so that micro-batches and resumed runs see the
same ones.
"""

from collections.abc import Sequence
from functools import lru_cache

from rtdmd_cli.engine.compute import optim, rng
from rtdmd_cli.engine.training.matching import add_fake_gradients, add_matching_gradients
from rtdmd_cli.engine.training.trainer import Trainer, move_role


def iterate(trainer: Trainer, iteration: int) -> None:
    """One iteration (0-based; errors count from 1). Leaves its figures in `trainer.metrics`.

    Raises NumericalError before a role moves by a value that is not finite.
    """
    config = trainer.config
    trainer.begin()
    prompts = chosen_prompts(trainer, iteration)
    update_fake_score(trainer, iteration, prompts)
    if (iteration + 1) % config.fake_per_generator == 0:
        update_generator(trainer, iteration, prompts)
    trainer.metrics = trainer.processes.sum_figures(trainer.metrics)


def chosen_prompts(trainer: Trainer, iteration: int) -> list[int]:
    """Prompt index of each sample of an iteration: epochs over all prompts, each in an order of its own.

    A batch may hold the end of one epoch and the beginning of the next, so that none is cut short.
    """
    config, count = trainer.config, trainer.prompts
    places = (divmod(iteration * config.batch + sample, count) for sample in range(config.batch))
    return [epoch_order(count, config.seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the prompts in an epoch (0-based) of stage 1."""
    return tuple(rng.permutation(count, seed, "prompts", epoch).tolist())


def update_fake_score(trainer: Trainer, iteration: int, prompts: Sequence[int]) -> None:
    """The fake score's turn: velocity matching on the generator's samples, and the regulariser."""
    trainer.fake_optimizer.zero_grad(set_to_none=True)
    add_fake_gradients(trainer, "fake", iteration, prompts)
    config = trainer.config
    total = config.iterations if config.lr_decay == "both" else None
    rate = optim.learning_rate_at(iteration, config.fake_lr, config.lr_warmup, total)
    move_role(trainer, "fake", trainer.fake_optimizer, rate, iteration)


def update_generator(trainer: Trainer, iteration: int, prompts: Sequence[int]) -> None:
    """The generator's turn: distribution matching at every boundary in use, then the EMA."""
    trainer.generator_optimizer.zero_grad(set_to_none=True)
    add_matching_gradients(trainer, "generator", iteration, prompts)
    config, done = trainer.config, trainer.generator_updates
    total = config.iterations // config.fake_per_generator if config.lr_decay != "none" else None
    rate = optim.learning_rate_at(done, config.generator_lr, config.lr_warmup, total)
    move_role(trainer, "generator", trainer.generator_optimizer, rate, iteration)
    decay = optim.ema_decay_at(done, config.ema_decay, config.ema_warmup)
    optim.ema_update(trainer.ema, trainer.roles.named_parameters("generator"), decay)
    trainer.generator_updates += 1
