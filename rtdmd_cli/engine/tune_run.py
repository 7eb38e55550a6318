"""A run of stage 2: what surrounds the recipe in `tune_reward.py`, from a stage-1 checkpoint to a finished run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_paths, split_weights
from rtdmd_cli.engine import previews as pictures
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, load_backbone
from rtdmd_cli.engine.distill import ROLES, Trainer
from rtdmd_cli.engine.distill_run import (
    assemble,
    encode_prompts,
    model_line,
    prepare_prompts,
    training_sigmas,
)
from rtdmd_cli.engine.distill_start import Start
from rtdmd_cli.engine.full_roles import FullRoles
from rtdmd_cli.engine.prompts import PromptSet, known_by
from rtdmd_cli.engine.rewards.mixture import RewardMixture, open_mixture
from rtdmd_cli.engine.rewards.scoring import Limits
from rtdmd_cli.engine.roles import FAKE, GENERATOR, Roles, RoleSet
from rtdmd_cli.engine.runtime import optim
from rtdmd_cli.engine.runtime.checkpoint import Checkpoint
from rtdmd_cli.engine.runtime.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.runtime.processes import Processes, join, require_parts
from rtdmd_cli.engine.runtime.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.runtime.signals import StopRequest
from rtdmd_cli.engine.training_run import (
    Outcome,
    Schedule,
    Session,
    Stage,
    failing,
    finish,
    opened,
    require_base,
    restore,
    save_unsaved,
    train,
)
from rtdmd_cli.engine.tune_measure import (
    Measured,
    Measurement,
    evenly_chosen,
    measure,
    open_clip,
    teacher_features,
)
from rtdmd_cli.engine.tune_report import write_tune_report
from rtdmd_cli.engine.tune_reward import tune
from rtdmd_cli.engine.tune_rollouts import Tuner, chosen_prompts
from rtdmd_cli.engine.tune_watch import (
    AFTER,
    BEFORE,
    BEST,
    LEFT_OUT,
    STOPPED,
    WATCH,
    begin_watch,
    standing,
    watch,
)
from rtdmd_cli.errors import DataError, RewardFailure, UsageError

STAGE = "tune-reward"


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
        finite; the last checkpoint is untouched. RewardFailure: too many pictures got no reward; saved before.
    """
    preset, config = resolved.preset, resolved.preset.tune_reward
    if preset.hardware.threads is not None:
        torch.set_num_threads(preset.hardware.threads)
    processes, device = join(resolve_device(preset.hardware.device))
    require_shares(processes, config)
    mixture = open_rewards(config, prompts, eval_prompts, device, say)
    dtype = resolve_dtype(preset.hardware.dtype, device)
    backbone = load_backbone(preset.model, device, dtype, preset.hardware)
    say(model_line(preset, backbone))
    measured = evenly_chosen(eval_prompts, config.eval_images)
    wide = evenly_chosen(eval_prompts, config.watch.prompt_count if config.watch.features else 0)
    every = [*prompts.texts, *measured.texts, *wide.texts]
    with processes.first_here():
        conditioning, empty = encode_prompts(backbone, every, say, preset.hardware)
    tuner = build_tuner(backbone, preset, mixture, len(prompts), conditioning, empty)
    tuner.core.processes = processes
    load_stage_1(tuner.core, begin)
    untrained, saved = tuner.core.roles.state(GENERATOR), start.checkpoint
    if saved:
        restore(tuner.core, saved, STAGE, tuner.core.roles.frozen)

    def make() -> RunFolder:
        return create_run(out, name, resolved, command, device, STAGE)

    with opened(start, out / name, make, resolved, config.epochs, processes) as (run, tracker, done):
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
        if processes.main:
            tuner.tell = run.log
        if wide.texts:
            say(f"drawing {len(wide)} pictures of the teacher to compare with")
        measurement = begin_measurement(tuner.core, preset, measured, len(prompts), len(every))

        def warn(text: str) -> None:
            run.log(text)
            say(text)

        stage = tune_stage(tuner, shown, measurement, mixture, warn)
        seconds, records = float(saved.state["seconds"]) if saved else 0.0, records_of(start, config)
        session = Session(
            run, resolved, tuner.core, stage, tracker, done, seconds, records, known_by(prompts, eval_prompts)
        )
        session.last = saved.path if start.run and saved else None
        with failing(session):
            return finish(session, train_watched(session, measurement, mixture, say, quiet))


def require_shares(processes: Processes, config: TuneRewardConfig) -> None:
    """UsageError where there are more processes than pictures for them."""
    require_parts(processes, "tune_reward.images_per_epoch", config.images_per_epoch, equal=True)
    if config.matching_images is not None:
        require_parts(processes, "tune_reward.matching_images", config.matching_images, equal=False)


def begin_measurement(
    core: Trainer, preset: Preset, measured: PromptSet, first: int, end: int
) -> Measurement:
    """What is measured: encoded prompts `first` and on are those of `measured`, then, up to `end`, those of the watch.

    The teacher's pictures of the latter are drawn here.
    """
    there = first + len(measured)
    cond = core.conditioning(range(first, there)) if measured.texts else core.empty
    wide = core.conditioning(range(there, end)) if there < end else None
    return Measurement(measured, cond, preset, wide, teacher_features(core, preset, wide))


def records_of(start: Start, config: TuneRewardConfig) -> dict[str, Any]:
    """What a run goes on with of the records of `start`."""
    records = dict(start.checkpoint.state["records"]) if start.checkpoint else {}
    if not config.watch.stop:
        records.pop(STOPPED, None)
    if start.run is None:
        records.pop(BEST, None)  # the best checkpoint of another run is not in this one's folder
    return records


def train_watched(
    session: Session,
    measurement: Measurement,
    mixture: RewardMixture,
    say: Callable[[str], None],
    quiet: bool,
) -> StopRequest:
    """Measure the start if it wasn't, and train. What rewards failed to judge is saved before the run ends by it."""
    try:
        with session.trainer.processes.agreeing():
            if session.trainer.processes.main and BEFORE not in session.records:
                say("measuring the generator of stage 1")
                where = "the first measurement"
                found = measure(session.trainer, measurement, mixture, where, session.run.log)
                begin_watch(session.records, found)
        return train(session, quiet)
    except RewardFailure:
        save_unsaved(session)
        raise


def open_rewards(
    config: TuneRewardConfig,
    prompts: PromptSet,
    eval_prompts: PromptSet,
    device: torch.device,
    say: Callable[[str], None],
) -> RewardMixture:
    """The preset's rewards, each (and the watch's CLIP) loaded once; says which take no part in back-propagation."""
    weights, paths = split_weights(config.rewards), split_paths(config.reward_paths)
    memory, limits = config.rewards_in_memory, Limits(config.max_bad_share, config.reward_seconds)
    open_mixture(weights, config.held_out, paths, eval_prompts, device, memory)
    mixture = open_mixture(weights, config.held_out, paths, prompts, device, memory, limits=limits)
    without = [name for name in weights if name not in mixture.differentiable]
    tilted = config.tilt and config.dmd_weight
    others = [
        name for name, on in (("policy term", config.policy_weight), ("tilt of matching", tilted)) if on
    ]
    if without and not others:
        say(
            f"no gradient in {', '.join(without)}, and neither policy term nor tilt: measured, not trained on"
        )
    elif without and config.backprop_weight:
        say(
            f"no gradient in {', '.join(without)}: in the {' and the '.join(others)} only, not in back-propagation"
        )
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
    if config.watch.features:
        open_clip(config.watch.features, device)
    return mixture


def build_tuner(
    backbone: Backbone,
    preset: Preset,
    rewards: RewardMixture,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Tuner:
    """Frozen stage-1 adapters (still to be loaded) with fresh ones on top, or full copies; optimisers and EMA.

    UsageError if the preset asks for more prompts, stochastic steps or back-propagated steps than there are.
    """
    config = preset.tune_reward
    sigmas = training_sigmas(backbone, preset)
    check_counts(config, prompts, len(sigmas) - 1, preset.sampler.eta)
    check_tilt(preset)
    roles: RoleSet
    if preset.distill.train == "full":
        roles = FullRoles(backbone.transformer, tuning=True)
    else:
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
            "`distill.interval: full`, which this run was distilled with.",
            "Set `tune_reward.matching` to last, or `tune_reward.tilt` to 0.",
        )


def load_stage_1(core: Trainer, begin: Checkpoint) -> None:
    """Start from stage 1's generator (EMA) and its raw fake score; DataError if they don't fit."""
    require_base(core, begin)
    core.roles.begin_stage_2(begin.tensors["ema"], begin.tensors["fake"])
    core.ema = optim.ema_start(core.roles.named_parameters(GENERATOR))


def tune_stage(
    tuner: Tuner,
    previews: pictures.Previews,
    measurement: Measurement,
    mixture: RewardMixture,
    warn: Callable[[str], None],
) -> Stage:
    """Stage 2 as a training run knows it. `warn` is given a sentence for people and the log."""
    core, config = tuner.core, tuner.config
    newest: dict[int, Measured] = {}
    alarmed: set[int] = set()

    def advance(epoch: int) -> None:
        prepare_prompts(core, epoch, config.epochs, lambda i: chosen_prompts(tuner, i))
        with core.float32_matmul():
            tune(tuner, epoch)

    def measured(session: Session) -> Measured:
        """Of this epoch, once."""
        epoch = session.iteration
        if epoch not in newest:
            newest.clear()
            where = f"the measurement of epoch {epoch}"
            newest[epoch] = measure(core, measurement, mixture, where, session.run.log)
        return newest[epoch]

    def judged(session: Session) -> dict[str, float]:
        """Measure, and take it into the records; as figures of a metric line."""
        found, figures = measured(session), figures_of(measured(session))
        if WATCH not in session.records:  # a run that was begun by a version without a watch
            return figures
        now = standing(session.iteration, found, session.records, mixture.weights)
        warning = watch(session.records, now, config.watch)
        if warning:
            warn(f"warning, epoch {session.iteration}: {warning}")
            alarmed.add(session.iteration)
        return figures if now.held_out is None else figures | {"watch/held_out": now.held_out}

    def due(session: Session) -> bool:
        return bool(config.eval_every) and session.iteration % config.eval_every == 0

    def after(session: Session) -> dict[str, float]:
        count_left_out(session, warn)
        figures = judged(session) if due(session) else {}
        if config.watch.stop and session.iteration in alarmed:
            session.records[STOPPED] = True
        return figures

    def end(session: Session, state: State) -> None:
        # Out of turn: not in the checkpoint, so that a run that is extended goes on as if it had not ended here.
        last = {} if due(session) else {"iteration": session.iteration, **judged(session)}
        session.records[AFTER] = measured(session).means
        path = session.run.path / "health.png"
        pictures.save_health_panel(previews, path, session.iteration)
        write_tune_report(session, state, config, mixture.held_out, pictures.lag(previews), last)

    return Stage(
        name=STAGE,
        schedule=schedule(config),
        advance=advance,
        figures=lambda: pictures.lag(previews),
        sample=lambda path, epoch: pictures.save_sample_grid(previews, core.ema, path, epoch),
        finish=end,
        after=after,
        frozen=core.roles.frozen,
    )


def count_left_out(session: Session, warn: Callable[[str], None]) -> None:
    """Keep the number of pictures that were left out of training; say so the first time."""
    count = int(session.trainer.metrics.get(LEFT_OUT, 0))
    if count and LEFT_OUT not in session.records:
        warn(
            f"epoch {session.iteration}: {count} pictures that a reward can't judge are left out, see log.txt"
        )
    if count:
        session.records[LEFT_OUT] = session.records.get(LEFT_OUT, 0) + count


def figures_of(found: Measured) -> dict[str, float]:
    """As names of a metric line."""
    features = {f"watch/{name}": value for name, value in found.features.items()}
    return {f"measured/{name}": value for name, value in found.means.items()} | features


def schedule(config: TuneRewardConfig) -> Schedule:
    """The distances of a stage-2 run, in epochs."""
    return Schedule(config.epochs, config.save_every, config.log_every, config.sample_every, config.keep)


def stage_1_state(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if `rtdmd distill` made it; DataError if not."""
    needed = {"ema", *ROLES}
    if checkpoint.state.get("stage") != "distill" or needed - checkpoint.tensors.keys():
        raise DataError(
            f"{checkpoint.path} was not made by rtdmd distill.",
            "Give --from a run of rtdmd distill; a run of tune-reward is continued with --resume.",
        )
    return checkpoint
