"""A run of stage 1: what surrounds the recipe in `distill.py`, from a preset to a finished run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, load_backbone
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.blocks import compile_blocks
from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.compute.mixed import MixedPrecision, resolve_mixed_precision
from rtdmd_cli.engine.compute.processes import join, require_parts
from rtdmd_cli.engine.distill.recipe import Trainer, chosen_prompts, iterate
from rtdmd_cli.engine.distill.report import write_run_report
from rtdmd_cli.engine.prompts.ahead import AheadEncoder
from rtdmd_cli.engine.prompts.embeddings import open_cache
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by
from rtdmd_cli.engine.roles.adapters import FAKE, GENERATOR, Roles, RoleSet
from rtdmd_cli.engine.roles.full import FullRoles
from rtdmd_cli.engine.sampling.sample import few_step_levels
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.session import (
    Outcome,
    Schedule,
    Session,
    Stage,
    failing,
    finish,
    opened,
    restore,
    train,
)
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.errors import UsageError

STAGE = "distill"
HARDWARE = HardwareConfig()
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
    processes, device = join(resolve_device(hardware.device))
    require_parts(processes, "distill.batch", resolved.preset.distill.batch, equal=False)
    dtype = resolve_dtype(hardware.dtype, device)
    backbone = load_backbone(resolved.preset.model, device, dtype, hardware)
    say(model_line(resolved.preset, backbone))
    with processes.first_here():
        conditioning, empty = encode_prompts(backbone, prompts.texts, say, hardware)
    trainer = build_trainer(backbone, resolved.preset, len(prompts), conditioning, empty)
    trainer.processes = processes
    saved = start.checkpoint
    if saved:
        restore(trainer, saved, STAGE)

    def make() -> RunFolder:
        return create_run(out, name, resolved, command, device)

    total = resolved.preset.distill.iterations
    with opened(start, out / name, make, resolved, total, processes) as (run, tracker, done):
        shown = pictures.make_previews(
            backbone, trainer.roles, resolved.preset, prompts.texts, conditioning, empty
        )
        seconds = float(saved.state["seconds"]) if saved else 0.0
        session = Session(
            run, resolved, trainer, stage(trainer, shown), tracker, done, seconds, {}, known_by(prompts)
        )
        session.last = saved.path if start.run and saved else None
        with failing(session):
            stop = train(session, quiet)
        return finish(session, stop)


def model_line(preset: Preset, backbone: Backbone) -> str:
    """Which model was loaded where and how, for people."""
    base = preset.hardware.base
    stored = "" if base == "plain" else f", blocks in {base}"
    mixed = resolve_mixed_precision(preset.hardware, backbone.device, backbone.dtype)
    products = f", trained with products in {mixed}" if mixed else ""
    line = f"model {preset.model.path} on {backbone.device}, {backbone.dtype}{stored}{products}"
    return line.replace("torch.", "")


def stage(trainer: Trainer, previews: pictures.Previews) -> Stage:
    """Stage 1 as a training run knows it."""

    def advance(iteration: int) -> None:
        total = trainer.config.iterations
        prepare_prompts(trainer, iteration, total, lambda i: chosen_prompts(trainer, i))
        with trainer.precision():
            iterate(trainer, iteration)

    def end(session: Session, state: State) -> None:
        run, preset = session.run, session.resolved.preset
        pictures.save_health_panel(previews, run.path / "health.png", session.iteration)
        figures = pictures.lag(previews)
        write_run_report(run, preset, state, session.iteration, session.seconds, figures)

    return Stage(
        name=STAGE,
        schedule=schedule(trainer.config),
        advance=advance,
        figures=lambda: pictures.lag(previews),
        sample=lambda path, iteration: pictures.save_sample_grid(previews, trainer.ema, path, iteration),
        finish=end,
    )


def schedule(config: DistillConfig) -> Schedule:
    """The distances of a stage-1 run."""
    return Schedule(config.iterations, config.save_every, config.log_every, config.sample_every, config.keep)


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[str],
    say: Callable[[str], None],
    hardware: HardwareConfig = HARDWARE,
) -> tuple[Callable[[Sequence[int]], Conditioning], Conditioning]:
    """A look-up of encoded prompts by index, and the empty prompt.

    Each prompt is encoded once and the text encoders are freed. Where the cache's bound does not take them all, the
    look-up is an `AheadEncoder`, and the encoders stay.
    """
    if hardware.text_encoder == "cpu":
        backbone.encoder_device = torch.device("cpu")
    cache = open_cache(backbone, hardware.cache_gb)
    fresh = cache.ensure([""], backbone.encode)
    empty = cache.fetch([""])
    row, distinct = empty.nbytes, len({*prompts, ""})
    capacity = cache.capacity(row)
    if distinct > capacity:
        if hardware.text_encoder == "auto":
            backbone.encoder_device = torch.device("cpu")
        say(
            f"{len(prompts)} prompts, of which the cache takes {capacity} at a time: "
            f"encoded ahead on {backbone.encoder_device}"
        )
        return AheadEncoder(cache, prompts, backbone.encode, capacity, say), empty
    fresh += cache.ensure(prompts, backbone.encode)
    say(
        f"{len(prompts)} prompts, {fresh} newly encoded"
        if fresh
        else f"{len(prompts)} prompts, all in the cache"
    )
    backbone.drop_text_encoders()
    if (len(prompts) + 1) * row > PRELOAD_BYTES:
        return lambda indices: cache.fetch([prompts[i] for i in indices]), empty
    everything = cache.fetch(list(prompts))
    return everything.select, empty


def prepare_prompts(trainer: Trainer, iteration: int, total: int, order: Callable[[int], Tensor]) -> None:
    """Encode ahead for an iteration, where that is needed. order: prompt indices of an iteration."""
    if isinstance(trainer.conditioning, AheadEncoder):
        with trainer.processes.first_here():
            trainer.conditioning.prepare(iteration, total, lambda i: order(i).tolist())


def build_trainer(
    backbone: Backbone,
    preset: Preset,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """Fresh roles, optimisers and EMA on the backbone; UsageError if schedule and preset disagree."""
    config = preset.distill
    sigmas = training_sigmas(backbone, preset)
    roles: RoleSet
    if config.train == "full":
        roles = FullRoles(backbone.transformer)
    else:
        roles = Roles(backbone.transformer, config.lora, config.seed)
    decays = {FAKE: config.weight_decay, GENERATOR: config.weight_decay}
    return assemble(backbone, preset, config, roles, sigmas, decays, prompts, conditioning, empty)


def training_sigmas(backbone: Backbone, preset: Preset) -> tuple[float, ...]:
    """The few-step schedule at the preset's resolution.

    UsageError for a size that the model can't do, or a first boundary above the levels of matching.
    """
    shape = backbone.latent_shape(preset.model.resolution, preset.model.resolution)
    sigmas = tuple(backbone.sigmas(few_step_levels(preset.sampler), shape).tolist())
    if sigmas[1] >= preset.distill.t_max:
        raise UsageError(
            f"The first boundary of the schedule lies at sigma {sigmas[1]:.3f}, not below `distill.t_max`.",
            "Choose other `sampler.raw_steps`, or a larger `distill.t_max`.",
        )
    return sigmas


def assemble(
    backbone: Backbone,
    preset: Preset,
    config: DistillConfig,
    roles: RoleSet,
    sigmas: tuple[float, ...],
    weight_decays: dict[str, float],
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """A trainer of either stage. config: section 3's settings; weight_decays: by role."""
    if preset.hardware.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if preset.hardware.compile:
        compile_blocks(backbone.transformer, backbone.device)
    fake, generator = (
        optim.build_optimizer(
            roles.named_parameters(role),
            lr,
            config.betas,
            config.eps,
            weight_decays[role],
            preset.hardware.optimizer,
        )
        for role, lr in ((FAKE, config.fake_lr), (GENERATOR, config.generator_lr))
    )
    mixed = resolve_mixed_precision(preset.hardware, backbone.device, backbone.dtype)
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
        matmul=preset.hardware.float32_matmul,
        mixed=MixedPrecision((backbone.transformer, backbone.decoder), mixed) if mixed else MixedPrecision(),
    )
