"""A run of stage 1: what surrounds the recipe in `distill.py`, from a preset to a finished run folder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import Resolved, dump_resolved
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine import previews as pictures
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, load_backbone
from rtdmd_cli.engine.distill import ROLES, Trainer, iterate
from rtdmd_cli.engine.distill_report import write_run_report
from rtdmd_cli.engine.distill_start import Start
from rtdmd_cli.engine.roles import Roles
from rtdmd_cli.engine.runtime import files, optim
from rtdmd_cli.engine.runtime.checkpoint import Checkpoint, newest_valid, remove_after, save_checkpoint
from rtdmd_cli.engine.runtime.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.runtime.embeddings import open_cache
from rtdmd_cli.engine.runtime.progress import training_progress
from rtdmd_cli.engine.runtime.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.runtime.signals import StopRequest, stop_on_signals
from rtdmd_cli.engine.runtime.trackers import Tracker, open_tracker
from rtdmd_cli.engine.sample import few_step_levels
from rtdmd_cli.errors import DataError, UsageError

STATE_KEYS = {"stage", "generator_updates", "optimizers", "seconds"}
OTHER_HINT = "Resume from another checkpoint, or start another run with --name OTHER."
PRELOAD_BYTES = 2_000_000_000
"""Encoded prompts up to this size are held in memory; more are read from the cache batch by batch."""


@dataclass(frozen=True)
class Outcome:
    """What came out. `signal_exit_code` is 0 unless a signal ended the run early."""

    run: Path
    iterations: int
    seconds: float
    checkpoint: Path
    signal_exit_code: int


@dataclass
class Session:
    """A run in progress. `seconds` counts training time of all parts, `last` is the newest checkpoint."""

    run: RunFolder
    resolved: Resolved
    trainer: Trainer
    previews: pictures.Previews
    tracker: Tracker
    iteration: int
    seconds: float
    last: Path | None = None

    @property
    def preset(self) -> Preset:
        """The preset in force."""
        return self.resolved.preset


def run_distill(
    resolved: Resolved,
    prompts: Sequence[str],
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
    conditioning, empty = encode_prompts(backbone, prompts, say)
    trainer = build_trainer(backbone, resolved.preset, len(prompts), conditioning, empty)
    if start.checkpoint:
        restore(trainer, start.checkpoint)
    run = start.run or create_run(out, name, resolved, command, device)
    with run.lock(), open_tracker(hardware.tracker, run.path) as tracker:
        done, seconds = rewind(run, resolved, start.checkpoint)
        shown = pictures.make_previews(backbone, trainer.roles, resolved.preset, prompts, conditioning, empty)
        session = Session(run, resolved, trainer, shown, tracker, done, seconds)
        session.last = start.checkpoint.path if start.run and start.checkpoint else None
        try:
            stop = train(session, quiet)
        except BaseException as error:
            run.set_status("failed", iteration=session.iteration, reason=str(error))
            raise
        return finish(session, stop, quiet)


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
    if (len(prompts) + 1) * (empty.embeds.nbytes + empty.pooled.nbytes) > PRELOAD_BYTES:
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
    sigmas = tuple(backbone.sigmas(few_step_levels(preset.sampler)).tolist())
    if sigmas[1] >= config.t_max:
        raise UsageError(
            f"The first boundary of the schedule lies at sigma {sigmas[1]:.3f}, not below `distill.t_max`.",
            "Choose other `sampler.raw_steps`, or a larger `distill.t_max`.",
        )
    if preset.hardware.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    roles = Roles(backbone.transformer, config.lora, config.seed)
    fake, generator = (
        optim.build_optimizer(roles.named_parameters(role), lr, config.betas, config.eps, config.weight_decay)
        for role, lr in (("fake", config.fake_lr), ("generator", config.generator_lr))
    )
    return Trainer(
        backbone=backbone,
        roles=roles,
        config=config,
        sigmas=sigmas,
        eta=preset.sampler.eta,
        guidance=preset.model.guidance,
        shape=backbone.latent_shape(preset.model.resolution, preset.model.resolution),
        prompts=prompts,
        conditioning=conditioning,
        empty=empty.to(backbone.device, backbone.dtype),
        fake_optimizer=fake,
        generator_optimizer=generator,
        ema=optim.ema_start(roles.named_parameters("generator")),
    )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, optimiser states and EMA into a trainer; DataError if one doesn't fit."""
    groups = {"ema", *ROLES, *(f"optimizer_{role}" for role in ROLES)}
    if checkpoint.tensors.keys() != groups or STATE_KEYS - checkpoint.state.keys():
        raise DataError(f"{checkpoint.path} is no full checkpoint of rtdmd distill.", OTHER_HINT)
    base, made_on = trainer.backbone.model_id, checkpoint.meta.get("base_hash")
    if made_on != base.hash:
        raise DataError(f"{checkpoint.path} was trained on another version of {base.path}.", OTHER_HINT)
    trainer.roles.load("generator", checkpoint.tensors["ema"])  # so that its names and shapes are checked
    trainer.ema = optim.ema_start(trainer.roles.named_parameters("generator"))
    for role in ROLES:
        trainer.roles.load(role, checkpoint.tensors[role])
        names = [name for name, _ in trainer.roles.named_parameters(role)]
        group = checkpoint.tensors[f"optimizer_{role}"]
        optim.load_optimizer(optimizer_of(trainer, role), names, group, checkpoint.state["optimizers"][role])
    trainer.generator_updates = checkpoint.state["generator_updates"]


def rewind(run: RunFolder, resolved: Resolved, checkpoint: Checkpoint | None) -> tuple[int, float]:
    """Make the run folder look as it did at a checkpoint (None: at the start); iterations and seconds done.

    The run is locked. UsageError if another process has continued it since the checkpoint was chosen.
    """
    newest, _ = newest_valid(run.checkpoints)
    if newest and (checkpoint is None or newest.resolve() != checkpoint.path.resolve()):
        raise UsageError(f"{run.path} has been continued by another process.", "Look at it, then try again.")
    done = checkpoint.step if checkpoint else 0
    run.metrics.truncate_after(done)
    remove_after(run.checkpoints, done)
    files.write_text(run.preset, dump_resolved(resolved.preset))
    run.set_status("running", iteration=done)
    run.log(f"start at iteration {done} of {resolved.preset.distill.iterations}")
    return done, float(checkpoint.state["seconds"]) if checkpoint else 0.0


def optimizer_of(trainer: Trainer, role: str) -> torch.optim.Optimizer:
    """The optimiser of "fake" or "generator"."""
    return trainer.fake_optimizer if role == "fake" else trainer.generator_optimizer


def train(session: Session, quiet: bool) -> StopRequest:
    """Iterate to the end or to the first signal; every save, metric line and grid on the way."""
    config, trainer = session.preset.distill, session.trainer
    with (
        stop_on_signals() as stop,
        training_progress(config.iterations, session.iteration, quiet) as show,
    ):
        while session.iteration < config.iterations and stop.received is None:
            began = time.monotonic()
            iterate(trainer, session.iteration)
            session.iteration += 1
            took = time.monotonic() - began
            session.seconds += took
            show(session.iteration, trainer.metrics)
            note(session, took)
        if session.last is None or session.last.name != f"step-{session.iteration:06d}":
            save(session)
    return stop


def note(session: Session, took: float) -> None:
    """After an iteration: metrics, checkpoint and grid, each at its own distance."""
    config, done = session.preset.distill, session.iteration
    if done % config.log_every == 0 or done == config.iterations:
        row: dict[str, Any] = {"iteration": done, **session.trainer.metrics}
        if config.sample_every and done % config.sample_every == 0:
            row |= pictures.lag(session.previews)
        session.tracker.log(row)
        session.run.metrics.append(row | {"seconds": session.seconds, "iterations_per_second": 1 / took})
    if done % config.save_every == 0:
        save(session)
    if config.sample_every and done % config.sample_every == 0 and done != config.iterations:
        sample_grid(session)


def save(session: Session) -> None:
    """Write a checkpoint of everything that the next iteration depends on."""
    trainer, preset = session.trainer, session.preset
    tensors: dict[str, dict[str, torch.Tensor]] = {"ema": trainer.ema}
    scalars = {}
    for role in ROLES:
        named = trainer.roles.named_parameters(role)
        tensors[role] = {name: parameter.detach() for name, parameter in named}
        for name, tensor in tensors[role].items():
            optim.check_finite(f"The weight {role}/{name}", tensor, session.iteration)
        names = [name for name, _ in named]
        saved = optim.optimizer_tensors(optimizer_of(trainer, role), names)
        tensors[f"optimizer_{role}"], scalars[role] = saved
    state: dict[str, Any] = {
        "stage": "distill",
        "generator_updates": trainer.generator_updates,
        "optimizers": scalars,
        "seconds": round(session.seconds, 3),
    }
    assert state.keys() == STATE_KEYS
    meta = {
        "preset_sha256": session.resolved.sha256,
        "rtdmd": __version__,
        "base_model": preset.model.path,
        "base_hash": trainer.backbone.model_id.hash,
    }
    run, keep = session.run, preset.distill.keep
    session.last = save_checkpoint(run.checkpoints, session.iteration, tensors, state, keep, meta)
    run.set_status("running", iteration=session.iteration)


def sample_grid(session: Session) -> Path:
    """Write the grid of this iteration."""
    path = session.run.samples / f"step-{session.iteration:06d}.png"
    pictures.save_sample_grid(session.previews, session.trainer.ema, path, session.iteration)
    return path


def finish(session: Session, stop: StopRequest, quiet: bool) -> Outcome:
    """Final grid, health panel, report and status."""
    run, config = session.run, session.preset.distill
    assert session.last is not None
    sample_grid(session)
    pictures.save_health_panel(session.previews, run.path / "health.png", session.iteration)
    state: State = "finished" if session.iteration >= config.iterations else "interrupted"
    figures = pictures.lag(session.previews)
    write_run_report(run, session.preset, state, session.iteration, session.seconds, figures)
    run.set_status(state, iteration=session.iteration, seconds=round(session.seconds, 3))
    run.log(f"{state} at iteration {session.iteration}")
    return Outcome(run.path, session.iteration, session.seconds, session.last, stop.exit_code)
