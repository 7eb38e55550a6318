"""A run of stage 2: what surrounds `recipe.py`, from a stage-1 checkpoint to a finished run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_weights
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.compute.processes import join
from rtdmd_cli.engine.compute.signals import StopRequest, stop_on_signals
from rtdmd_cli.engine.prompts.reading import PromptSet, evenly_chosen, known_by
from rtdmd_cli.engine.report.run_facts import live_now
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.rewards.mixture import RewardMixture
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, RoleSet
from rtdmd_cli.engine.roles.full import FullRoles
from rtdmd_cli.engine.storage.checkpoint import Checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.assembly import assemble, encode_prompts, model_line, training_sigmas
from rtdmd_cli.engine.training.closing import failing, finish
from rtdmd_cli.engine.training.downloading import bring
from rtdmd_cli.engine.training.loop import train
from rtdmd_cli.engine.training.opening import opened
from rtdmd_cli.engine.training.restoring import accepted, require_base, restore
from rtdmd_cli.engine.training.session import (
    DRAWING,
    LOADING,
    Outcome,
    Session,
    Stage,
    kept_by,
    save_unsaved,
)
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import require_tracker
from rtdmd_cli.engine.training.trainer import ROLES, Trainer
from rtdmd_cli.engine.tune_reward.checks import check_counts, check_tilt, open_rewards, require_shares
from rtdmd_cli.engine.tune_reward.measure import Measurement, measure, teacher_features
from rtdmd_cli.engine.tune_reward.report import write_tune_report
from rtdmd_cli.engine.tune_reward.rollouts import Rewards, Tuner
from rtdmd_cli.engine.tune_reward.stage import STAGE, held_out_of, tune_stage
from rtdmd_cli.engine.tune_reward.watch import BEFORE, BEST, STOPPED, begin_watch
from rtdmd_cli.errors import DataError, RewardFailure


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

    A run that is continued has its own copy of stage 1's weights, which is used instead.

    Args:
        resolved: the preset; prompts, eval_prompts: for training and for measuring the rewards; out, name: where a
            new run goes; command: the command line, for the record; say: prints a line for people.

    Raises:
        UsageError, EnvironmentFailure, DataError: before anything is trained. NumericalError: a value is not
        finite; the last checkpoint is untouched. RewardFailure: too many pictures got no reward; saved before.
    """
    with stop_on_signals() as stop, stop.during(LOADING, kept_by(start)):
        stop.quiet = quiet
        loaded = _load(resolved.preset, prompts, eval_prompts, begin, say, stop)
        return _run(loaded, resolved, begin.path, start, out, name, command, say, stop)


def _run(
    loaded: "_Loaded",
    resolved: Resolved,
    begun_from: Path,
    start: Start,
    out: Path,
    name: str,
    command: Sequence[str],
    say: Callable[[str], None],
    stop: StopRequest,
) -> Outcome:
    core, saved = loaded.tuner.core, start.checkpoint
    if saved:
        restore(core, saved, STAGE, core.roles.frozen)
    start = accepted(start, core.backbone.dtype)
    stop.check()

    def make() -> RunFolder:
        return create_run(out, name, resolved, command, core.backbone.device, STAGE, begun_from)

    preset, epochs = resolved.preset, resolved.preset.tune_reward.epochs
    seconds = float(saved.state["seconds"]) if saved else 0.0
    records, known = records_of(start, loaded.tuner.config), known_by(loaded.prompts, loaded.eval_prompts)

    def report(run: RunFolder, state: State, done: int) -> None:
        live = live_now(None, None) if state == "running" else None
        others = held_out_of(preset.tune_reward, loaded.mixture)
        write_tune_report(run, preset, state, done, seconds, records, others, None, live)

    with opened(start, out / name, make, resolved, epochs, core.processes, say, report, stop.quiet) as (
        run,
        tracker,
        done,
    ):
        with stop.during(DRAWING, kept_by(start)):
            stage, measurement = _begin(loaded, preset, run, say)
            stop.check()
        session = Session(run, resolved, core, stage, tracker, done, seconds, records, known)
        session.last, session.stop = saved.path if start.run and saved else None, stop
        session.say = say
        memory.keep_size(stage.sizes, records)
        with failing(session):
            return finish(session, train_watched(session, measurement, loaded.mixture, say, stop.quiet))


@dataclass(frozen=True)
class _Loaded:
    """What a run needs before it has a folder.

    Encoded prompts are `prompts`, those of the grids if the preset has any, `measured` and `wide`, in this order.
    """

    tuner: Tuner
    mixture: RewardMixture
    conditioning: Callable[[Sequence[int]], Conditioning]
    prompts: PromptSet
    eval_prompts: PromptSet
    measured: PromptSet
    wide: PromptSet


def _load(
    preset: Preset,
    prompts: PromptSet,
    eval_prompts: PromptSet,
    begin: Checkpoint,
    say: Callable[[str], None],
    stop: StopRequest,
) -> _Loaded:
    """Rewards, base and encoded prompts; the generator is stage 1's."""
    config = preset.tune_reward
    if preset.hardware.threads is not None:
        torch.set_num_threads(preset.hardware.threads)
    processes, device = join(resolve_device(preset.hardware.device))
    require_tracker(preset.hardware.tracker)
    require_shares(processes, config)
    bring([*needed.of_stage_2(preset), *needed.models(preset.model)], say)
    say(f"loading the rewards {', '.join([*split_weights(config.rewards), *config.held_out])}")
    mixture = open_rewards(config, prompts, eval_prompts, device, say, preset.model.resolution)
    stop.check()
    dtype = resolve_dtype(preset.hardware.dtype, device)
    say(f"loading the model {preset.model.path}")
    backbone = load_backbone(preset.model, device, dtype, preset.hardware)
    say(model_line(preset, backbone))
    stop.check()
    measured = evenly_chosen(eval_prompts, config.eval_images)
    wide = evenly_chosen(eval_prompts, config.watch.prompt_count if config.watch.features else 0)
    with processes.first_here():
        every = [*prompts.texts, *preset.previews.prompts, *measured.texts, *wide.texts]
        conditioning, empty = encode_prompts(backbone, every, say, preset.hardware, stop.check, len(prompts))
    tuner = build_tuner(backbone, preset, mixture, len(prompts), conditioning, empty)
    tuner.core.processes = processes
    load_stage_1(tuner.core, begin)
    return _Loaded(tuner, mixture, conditioning, prompts, eval_prompts, measured, wide)


def _begin(
    loaded: _Loaded, preset: Preset, run: RunFolder, say: Callable[[str], None]
) -> tuple[Stage, Measurement]:
    """The stage and what it measures, with the pictures that both compare with: stage 1's and the teacher's."""
    tuner, texts = loaded.tuner, loaded.prompts.texts
    core = tuner.core
    own, rows = pictures.chosen(preset, texts, len(texts))
    say("drawing the pictures of stage 1's generator for the sample grids")
    shown = pictures.make_previews(
        core.backbone, core.roles, preset, own, loaded.conditioning(rows), core.empty, "start", "stage 1"
    )
    if core.processes.main:
        pictures.save_reference(shown, run.samples)
        tuner.tell = run.log
    if loaded.wide.texts:
        say(f"drawing {len(loaded.wide)} pictures of the teacher to compare with")
    first = len(texts) + len(preset.previews.prompts)
    end = first + len(loaded.measured) + len(loaded.wide)
    measurement = begin_measurement(core, preset, loaded.measured, first, end)

    def warn(text: str) -> None:
        run.log(text)
        say(text)

    return tune_stage(tuner, shown, measurement, loaded.mixture, warn), measurement


def begin_measurement(
    core: Trainer, preset: Preset, measured: PromptSet, first: int, end: int
) -> Measurement:
    """What is measured. The encoded prompts from `first` on belong to `measured`, then, up to `end`, to the watch.

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
                with session.stop.during("stopping when the generator is measured", session.kept):
                    found = measure(session.trainer, measurement, mixture, where, session.run.log)
                    begin_watch(session.records, found)
                    session.stop.check()
        return train(session, quiet)
    except RewardFailure:
        save_unsaved(session)
        raise


def build_tuner(
    backbone: Backbone,
    preset: Preset,
    rewards: Rewards,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Tuner:
    """Frozen stage-1 adapters (still to be loaded) with fresh ones on top, or full copies; optimisers and EMA.

    UsageError if the preset asks for more prompts, stochastic steps or back-propagated steps than there are.
    """
    sigmas = training_sigmas(backbone, preset)
    check_counts(preset.tune_reward, prompts, len(sigmas) - 1, preset.sampler.eta)
    check_tilt(preset)
    return tuner_on(sigmas, backbone, preset, rewards, prompts, conditioning, empty)


def tuner_on(
    sigmas: tuple[float, ...],
    backbone: Backbone,
    preset: Preset,
    rewards: Rewards,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Tuner:
    """`build_tuner` on a schedule that is known, without its checks."""
    config = preset.tune_reward
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
    steps = config.matching_backprop_steps or preset.distill.backprop_steps
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
            "backprop_steps": steps,
        }
    )


def load_stage_1(core: Trainer, begin: Checkpoint) -> None:
    """Start from stage 1's generator (EMA) and its raw fake score; DataError if they don't fit."""
    require_base(core, begin)
    core.roles.begin_stage_2(begin.tensors["ema"], begin.tensors["fake"])
    core.ema = optim.ema_start(
        core.roles.named_parameters(GENERATOR), torch.float32
    )  # published: stage 1's alone is bf16
    begin.release()


def stage_1_state(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if `rtdmd distill` made it; DataError if not."""
    needed = {"ema", *ROLES}
    if checkpoint.state.get("stage") != "distill" or needed - checkpoint.tensors.keys():
        raise DataError(
            f"{checkpoint.path} was not made by rtdmd distill.",
            "Give --from a run of rtdmd distill; a run of tune-reward is continued with --resume.",
        )
    return checkpoint
