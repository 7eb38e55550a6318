"""A run of stage 1: what surrounds `recipe.py`, from a preset to a finished run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.compute.processes import join, require_parts
from rtdmd_cli.engine.compute.signals import StopRequest, stop_on_signals
from rtdmd_cli.engine.distill.recipe import chosen_prompts, iterate
from rtdmd_cli.engine.distill.report import write_run_report
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, RoleSet
from rtdmd_cli.engine.roles.full import FullRoles
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.assembly import (
    assemble,
    encode_prompts,
    model_line,
    prepare_prompts,
    training_sigmas,
)
from rtdmd_cli.engine.training.session import (
    DRAWING,
    LOADING,
    Outcome,
    Schedule,
    Session,
    Stage,
    accepted,
    failing,
    finish,
    kept_by,
    opened,
    restore,
    train,
)
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trainer import Trainer

STAGE = "distill"


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
    with stop_on_signals() as stop, stop.during(LOADING, kept_by(start)):
        stop.quiet = quiet
        return _run(resolved, prompts, start, out, name, command, say, stop)


def _run(
    resolved: Resolved,
    prompts: PromptSet,
    start: Start,
    out: Path,
    name: str,
    command: Sequence[str],
    say: Callable[[str], None],
    stop: StopRequest,
) -> Outcome:
    hardware = resolved.preset.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    processes, device = join(resolve_device(hardware.device))
    require_parts(processes, "distill.batch", resolved.preset.distill.batch, equal=False)
    dtype = resolve_dtype(hardware.dtype, device)
    backbone = load_backbone(resolved.preset.model, device, dtype, hardware)
    say(model_line(resolved.preset, backbone))
    stop.check()
    with processes.first_here():
        conditioning, empty = encode_prompts(backbone, prompts.texts, say, hardware, stop.check)
    trainer = build_trainer(backbone, resolved.preset, len(prompts), conditioning, empty)
    trainer.processes = processes
    saved = start.checkpoint
    if saved:
        restore(trainer, saved, STAGE)
    start = accepted(start, backbone.dtype)
    stop.check()

    def make() -> RunFolder:
        return create_run(out, name, resolved, command, device)

    total = resolved.preset.distill.iterations
    with opened(start, out / name, make, resolved, total, processes, say) as (run, tracker, done):
        with stop.during(DRAWING, kept_by(start)):
            shown = pictures.make_previews(
                backbone, trainer.roles, resolved.preset, prompts.texts, conditioning, empty
            )
            stop.check()
        seconds = float(saved.state["seconds"]) if saved else 0.0
        session = Session(
            run, resolved, trainer, stage(trainer, shown), tracker, done, seconds, {}, known_by(prompts)
        )
        session.last, session.stop = saved.path if start.run and saved else None, stop
        with failing(session):
            return finish(session, train(session, stop.quiet))


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


def build_trainer(
    backbone: Backbone,
    preset: Preset,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """Fresh roles, optimisers and EMA on the backbone; UsageError if schedule and preset disagree."""
    sigmas = training_sigmas(backbone, preset)
    return trainer_on(sigmas, backbone, preset, prompts, conditioning, empty)


def trainer_on(
    sigmas: tuple[float, ...],
    backbone: Backbone,
    preset: Preset,
    prompts: int,
    conditioning: Callable[[Sequence[int]], Conditioning],
    empty: Conditioning,
) -> Trainer:
    """`build_trainer` on a schedule that is known."""
    config = preset.distill
    roles: RoleSet
    if config.train == "full":
        roles = FullRoles(backbone.transformer)
    else:
        roles = Roles(backbone.transformer, config.lora, config.seed)
    decays = {FAKE: config.weight_decay, GENERATOR: config.weight_decay}
    return assemble(backbone, preset, config, roles, sigmas, decays, prompts, conditioning, empty)
