"""A run of stage 1: what surrounds the recipe in `distill.py`, from a preset to a finished run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine import previews as pictures
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, load_backbone
from rtdmd_cli.engine.distill import Trainer, iterate
from rtdmd_cli.engine.distill_report import write_run_report
from rtdmd_cli.engine.distill_start import Start
from rtdmd_cli.engine.prompts import PromptSet, known_by
from rtdmd_cli.engine.roles import FAKE, GENERATOR, Roles
from rtdmd_cli.engine.runtime import optim
from rtdmd_cli.engine.runtime.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.runtime.embeddings import open_cache
from rtdmd_cli.engine.runtime.run_folder import State, create_run
from rtdmd_cli.engine.runtime.trackers import open_tracker
from rtdmd_cli.engine.sample import few_step_levels
from rtdmd_cli.engine.training_run import Outcome, Schedule, Session, Stage, finish, restore, rewind, train
from rtdmd_cli.errors import UsageError

STAGE = "distill"
PRELOAD_BYTES = 2_000_000_000
"""Encoded prompts up to this size are held in memory; more are read from the cache batch by batch."""


def run_distill(
    resolved: Resolved,
    prompts: PromptSet,
    start: Start,
    out: Path,
    name: str,
    command: Sequence[str],
    say: Callable[[str], None],
    quiet: bool,
) -> Outcome:
    """Train from `start` to `distill.iterations`, and write checkpoints, metrics, grids and the report.

    Args:
        resolved: the preset; prompts: its training prompts, at least one; out, name: where a new run goes;
            command: the command line, for the record; say: prints a line for people.

    Raises:
        UsageError, EnvironmentFailure, DataError: before anything is trained. NumericalError: a value is not
        finite; the last checkpoint is untouched.
    """
    hardware = resolved.preset.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    device = resolve_device(hardware.device)
    backbone = load_backbone(resolved.preset.model, device, resolve_dtype(hardware.dtype, device))
    say(f"model {resolved.preset.model.path} on {device}, {backbone.dtype}".replace("torch.", ""))
    conditioning, empty = encode_prompts(backbone, prompts.texts, say)
    trainer = build_trainer(backbone, resolved.preset, len(prompts), conditioning, empty)
    saved = start.checkpoint
    if saved:
        restore(trainer, saved, STAGE)
    run = start.run or create_run(out, name, resolved, command, device)
    with run.lock(), open_tracker(hardware.tracker, run.path) as tracker:
        done = rewind(run, resolved, saved, resolved.preset.distill.iterations)
        shown = pictures.make_previews(
            backbone, trainer.roles, resolved.preset, prompts.texts, conditioning, empty
        )
        seconds = float(saved.state["seconds"]) if saved else 0.0
        session = Session(
            run, resolved, trainer, stage(trainer, shown), tracker, done, seconds, {}, known_by(prompts)
        )
        session.last = saved.path if start.run and saved else None
        try:
            stop = train(session, quiet)
        except BaseException as error:
            run.set_status("failed", iteration=session.iteration, reason=str(error))
            raise
        return finish(session, stop)


def stage(trainer: Trainer, previews: pictures.Previews) -> Stage:
    """Stage 1 as a training run knows it."""

    def end(session: Session, state: State) -> None:
        run, preset = session.run, session.resolved.preset
        pictures.save_health_panel(previews, run.path / "health.png", session.iteration)
        figures = pictures.lag(previews)
        write_run_report(run, preset, state, session.iteration, session.seconds, figures)

    return Stage(
        name=STAGE,
        schedule=schedule(trainer.config),
        advance=lambda iteration: iterate(trainer, iteration),
        figures=lambda: pictures.lag(previews),
        sample=lambda path, iteration: pictures.save_sample_grid(previews, trainer.ema, path, iteration),
        finish=end,
    )


def schedule(config: DistillConfig) -> Schedule:
    """The distances of a stage-1 run."""
    return Schedule(config.iterations, config.save_every, config.log_every, config.sample_every, config.keep)


def encode_prompts(
    backbone: Backbone, prompts: Sequence[str], say: Callable[[str], None]
) -> tuple[Callable[[Sequence[int]], Conditioning], Conditioning]:
    """Encode every prompt once, free the text encoders; a look-up by prompt index, and the empty prompt."""
    cache = open_cache(backbone)
    fresh = cache.ensure([*prompts, ""], backbone.encode)
    say(
        f"{len(prompts)} prompts, {fresh} newly encoded"
        if fresh
        else f"{len(prompts)} prompts, all in the cache"
    )
    backbone.drop_text_encoders()
    empty = cache.fetch([""])
    if (len(prompts) + 1) * empty.nbytes > PRELOAD_BYTES:
        return lambda indices: cache.fetch([prompts[i] for i in indices]), empty
    everything = cache.fetch(list(prompts))
    return everything.select, empty


def build_trainer(
    backbone: Backbone,
    preset: Preset,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """Fresh adapters, optimisers and EMA on the backbone; UsageError if schedule and preset disagree."""
    config = preset.distill
    sigmas = training_sigmas(backbone, preset)
    if sigmas[1] >= config.t_max:
        raise UsageError(
            f"The first boundary of the schedule lies at sigma {sigmas[1]:.3f}, not below `distill.t_max`.",
            "Choose other `sampler.raw_steps`, or a larger `distill.t_max`.",
        )
    roles = Roles(backbone.transformer, config.lora, config.seed)
    decays = {FAKE: config.weight_decay, GENERATOR: config.weight_decay}
    return assemble(backbone, preset, config, roles, sigmas, decays, prompts, conditioning, empty)


def training_sigmas(backbone: Backbone, preset: Preset) -> tuple[float, ...]:
    """The few-step schedule at the preset's resolution; UsageError for a size that the model can't do."""
    shape = backbone.latent_shape(preset.model.resolution, preset.model.resolution)
    return tuple(backbone.sigmas(few_step_levels(preset.sampler), shape).tolist())


def assemble(
    backbone: Backbone,
    preset: Preset,
    config: DistillConfig,
    roles: Roles,
    sigmas: tuple[float, ...],
    weight_decays: dict[str, float],
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """A trainer of either stage. config: section 3's settings; weight_decays: by role."""
    if preset.hardware.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    fake, generator = (
        optim.build_optimizer(roles.named_parameters(role), lr, config.betas, config.eps, weight_decays[role])
        for role, lr in ((FAKE, config.fake_lr), (GENERATOR, config.generator_lr))
    )
    return Trainer(
        backbone=backbone,
        roles=roles,
        config=config,
        sigmas=sigmas,
        eta=preset.sampler.eta,
        guidance=preset.matching_guidance,
        shape=backbone.latent_shape(preset.model.resolution, preset.model.resolution),
        prompts=prompts,
        conditioning=conditioning,
        empty=empty.to(backbone.device, backbone.dtype),
        fake_optimizer=fake,
        generator_optimizer=generator,
        ema=optim.ema_start(roles.named_parameters(GENERATOR)),
    )
