"""A run of stage 2: what surrounds the recipe in `tune_reward.py`, from a stage-1 checkpoint to a finished run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_paths, split_weights
from rtdmd_cli.engine import previews as pictures
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, load_backbone
from rtdmd_cli.engine.distill import ROLES, Trainer
from rtdmd_cli.engine.distill_run import assemble, encode_prompts, training_sigmas
from rtdmd_cli.engine.distill_start import Start
from rtdmd_cli.engine.prompts import PromptSet, known_by
from rtdmd_cli.engine.rewards.mixture import RewardMixture, open_mixture
from rtdmd_cli.engine.roles import FAKE, GENERATOR, STAGE1_FAKE, STAGE1_GENERATOR, Roles
from rtdmd_cli.engine.runtime.checkpoint import Checkpoint
from rtdmd_cli.engine.runtime.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.runtime.run_folder import State, create_run
from rtdmd_cli.engine.runtime.trackers import open_tracker
from rtdmd_cli.engine.sample import decode_all, generate, sampling_plan
from rtdmd_cli.engine.training_run import (
    Outcome,
    Schedule,
    Session,
    Stage,
    finish,
    require_base,
    restore,
    rewind,
    train,
)
from rtdmd_cli.engine.tune_report import write_tune_report
from rtdmd_cli.engine.tune_reward import Tuner, tune
from rtdmd_cli.errors import DataError, UsageError

STAGE = "tune-reward"
FROZEN = (STAGE1_GENERATOR, STAGE1_FAKE)
BEFORE, AFTER = "rewards_before", "rewards_after"


@dataclass(frozen=True)
class Measurement:
    """Fixed prompts and seeds on which the rewards are measured. cond: [n], a row for each of `prompts`."""

    prompts: PromptSet
    cond: Conditioning
    preset: Preset


def run_tune(
    resolved: Resolved,
    prompts: PromptSet,
    eval_prompts: PromptSet,
    begin: Checkpoint,
    start: Start,
    out: Path,
    name: str,
    command: Sequence[str],
    say: Callable[[str], None],
    quiet: bool,
) -> Outcome:
    """Train from `start`, on top of stage 1's checkpoint `begin`, to `tune_reward.epochs`.

    A run that is continued has its own copy of stage 1's adapters, which is used instead.

    Args:
        resolved: the preset; prompts, eval_prompts: for training and for measuring the rewards; out, name: where a
            new run goes; command: the command line, for the record; say: prints a line for people.

    Raises:
        UsageError, EnvironmentFailure, DataError: before anything is trained. NumericalError: a value is not
        finite; the last checkpoint is untouched.
    """
    preset, config = resolved.preset, resolved.preset.tune_reward
    if preset.hardware.threads is not None:
        torch.set_num_threads(preset.hardware.threads)
    device = resolve_device(preset.hardware.device)
    mixture = open_rewards(config, prompts, eval_prompts, device, say)
    backbone = load_backbone(preset.model, device, resolve_dtype(preset.hardware.dtype, device))
    say(f"model {preset.model.path} on {device}, {backbone.dtype}".replace("torch.", ""))
    measured = evenly_chosen(eval_prompts, config.eval_images)
    both = [*prompts.texts, *measured.texts]
    conditioning, empty = encode_prompts(backbone, both, say)
    tuner = build_tuner(backbone, preset, mixture, len(prompts), conditioning, empty)
    load_stage_1(tuner.core, begin)
    untrained, saved = tuner.core.roles.state(GENERATOR), start.checkpoint
    if saved:
        restore(tuner.core, saved, STAGE, FROZEN)
    cond = conditioning(range(len(prompts), len(both))) if measured.texts else empty
    measurement = Measurement(measured, cond, preset)
    run = start.run or create_run(out, name, resolved, command, device, STAGE)
    with run.lock(), open_tracker(preset.hardware.tracker, run.path) as tracker:
        with tuner.core.roles.swapped(GENERATOR, untrained):
            shown = pictures.make_previews(
                backbone,
                tuner.core.roles,
                preset,
                prompts.texts,
                conditioning,
                tuner.core.empty,
                "generator",
                "stage 1",
            )
        done = rewind(run, resolved, saved, config.epochs)
        stage = tune_stage(tuner, shown, measurement, mixture)
        seconds = float(saved.state["seconds"]) if saved else 0.0
        records = dict(saved.state["records"]) if saved else {}
        session = Session(
            run, resolved, tuner.core, stage, tracker, done, seconds, records, known_by(prompts, eval_prompts)
        )
        session.last = saved.path if start.run and saved else None
        try:
            if BEFORE not in records:
                records[BEFORE] = measure(tuner.core, measurement, mixture)
            stop = train(session, quiet)
        except BaseException as error:
            run.set_status("failed", iteration=session.iteration, reason=str(error))
            raise
        return finish(session, stop)


def open_rewards(
    config: TuneRewardConfig,
    prompts: PromptSet,
    eval_prompts: PromptSet,
    device: torch.device,
    say: Callable[[str], None],
) -> RewardMixture:
    """The preset's rewards, each loaded once; says which take no part in back-propagation."""
    weights, paths = split_weights(config.rewards), split_paths(config.reward_paths)
    arguments = (config.held_out, paths)
    open_mixture(weights, *arguments, eval_prompts, device, config.rewards_in_memory)
    mixture = open_mixture(weights, *arguments, prompts, device, config.rewards_in_memory)
    without = [name for name in weights if name not in mixture.differentiable]
    if config.backprop_weight and without:
        say(f"no gradient in {', '.join(without)}: in the policy term only, not in back-propagation")
    if (
        config.backprop_weight
        and not mixture.differentiable
        and not (config.policy_weight or config.dmd_weight)
    ):
        raise UsageError(
            "Back-propagation is the only term, and none of the rewards is differentiable.",
            "See which are: rtdmd rewards list",
        )
    mixture.check_loading()
    return mixture


def evenly_chosen(prompts: PromptSet, count: int) -> PromptSet:
    """`count` prompts, evenly spread over the set, or all of them."""
    count = min(count, len(prompts))
    return prompts.pick([(2 * i + 1) * len(prompts) // (2 * count) for i in range(count)])


def build_tuner(
    backbone: Backbone,
    preset: Preset,
    rewards: RewardMixture,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Tuner:
    """Frozen stage-1 adapters (still to be loaded), fresh ones on top, optimisers and EMA.

    UsageError if the preset asks for more prompts, stochastic steps or back-propagated steps than there are.
    """
    config = preset.tune_reward
    sigmas = training_sigmas(backbone, preset)
    check_counts(config, prompts, len(sigmas) - 1, preset.sampler.eta)
    roles = Roles(backbone.transformer, preset.distill.lora, config.seed, fresh=config.lora)
    decays = {FAKE: config.fake_weight_decay, GENERATOR: config.generator_weight_decay}
    settings = stage_1_settings(preset)
    core = assemble(backbone, preset, settings, roles, sigmas, decays, prompts, conditioning, empty)
    return Tuner(core, config, rewards)


def stage_1_settings(preset: Preset) -> DistillConfig:
    """Section 3's settings as stage 2 uses them: stage 1's, with the rates, seed and weights of `tune_reward`."""
    config = preset.tune_reward
    return preset.distill.model_copy(
        update={
            "batch": config.images_per_epoch,
            "micro_batch": config.micro_batch,
            "seed": config.seed,
            "generator_lr": config.generator_lr,
            "fake_lr": config.fake_lr,
            "lr_warmup": config.lr_warmup,
            "grad_clip": config.grad_clip,
            "consistency_weight": config.consistency_weight,
            "ema_decay": config.ema_decay,
        }
    )


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


def load_stage_1(core: Trainer, begin: Checkpoint) -> None:
    """Put stage 1's generator (EMA) and its raw fake score underneath; DataError if they don't fit."""
    require_base(core, begin)
    core.roles.load(STAGE1_GENERATOR, begin.tensors["ema"])
    core.roles.load(STAGE1_FAKE, begin.tensors["fake"])


def tune_stage(
    tuner: Tuner,
    previews: pictures.Previews,
    measurement: Measurement,
    mixture: RewardMixture,
) -> Stage:
    """Stage 2 as a training run knows it."""
    core, config = tuner.core, tuner.config

    def after(iteration: int) -> dict[str, float]:
        if not config.eval_every or iteration % config.eval_every:
            return {}
        return {f"measured/{name}": v for name, v in measure(core, measurement, mixture).items()}

    def end(session: Session, state: State) -> None:
        session.records[AFTER] = measure(core, measurement, mixture)
        path = session.run.path / "health.png"
        pictures.save_health_panel(previews, path, session.iteration)
        write_tune_report(session, state, config, mixture.held_out, pictures.lag(previews))

    return Stage(
        name=STAGE,
        schedule=schedule(config),
        advance=lambda epoch: tune(tuner, epoch),
        figures=lambda: pictures.lag(previews),
        sample=lambda path, epoch: pictures.save_sample_grid(previews, core.ema, path, epoch),
        finish=end,
        after=after,
        frozen=FROZEN,
    )


def schedule(config: TuneRewardConfig) -> Schedule:
    """The distances of a stage-2 run, in epochs."""
    return Schedule(config.epochs, config.save_every, config.log_every, config.sample_every, config.keep)


def measure(core: Trainer, measurement: Measurement, mixture: RewardMixture) -> dict[str, float]:
    """Mean of each reward, held-out ones first, over one picture of each measured prompt; the EMA's weights."""
    images = measured_images(core, measurement)
    if not len(images):
        return {}
    scores = mixture.measure(images, measurement.prompts)
    return {name: float(values.mean()) for name, values in scores.items()}


def measured_images(core: Trainer, measurement: Measurement) -> Tensor:
    """Pictures [n,3,H,W] of the measured prompts, from the evaluation's seed."""
    preset, count = measurement.preset, len(measurement.prompts)
    if count == 0:
        return torch.empty(0)
    plan = sampling_plan("generator", core.backbone, preset.model, preset.sampler)
    keys, batch = [(i, 0) for i in range(count)], preset.evaluate.batch
    with core.roles.swapped(GENERATOR, core.ema):
        latents = generate(
            core.backbone,
            core.roles,
            plan,
            measurement.cond,
            None,
            keys,
            shape=core.shape,
            seed=preset.evaluate.seed,
            batch=batch,
        )
    return decode_all(core.backbone, latents, batch)


def stage_1_state(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if `rtdmd distill` made it; DataError if not."""
    needed = {"ema", *ROLES}
    if checkpoint.state.get("stage") != "distill" or needed - checkpoint.tensors.keys():
        raise DataError(
            f"{checkpoint.path} was not made by rtdmd distill.",
            "Give --from a run of rtdmd distill; a run of tune-reward is continued with --resume.",
        )
    return checkpoint
