"""A run of stage 1: what surrounds `recipe.py`, from a preset to a finished run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.previews import PreviewsConfig
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
from rtdmd_cli.engine.compute.processes import Processes, join, require_parts
from rtdmd_cli.engine.compute.signals import StopRequest, stop_on_signals
from rtdmd_cli.engine.distill.recipe import chosen_prompts, iterate
from rtdmd_cli.engine.distill.report import write_run_report
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by
from rtdmd_cli.engine.report.run_facts import live_now
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, RoleSet
from rtdmd_cli.engine.roles.full import FullRoles
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.assembly import (
    assemble,
    encode_prompts,
    model_line,
    prepare_prompts,
    training_sigmas,
)
from rtdmd_cli.engine.training.closing import failing, finish
from rtdmd_cli.engine.training.downloading import bring
from rtdmd_cli.engine.training.health import Health
from rtdmd_cli.engine.training.held_out import HeldOut, open_held_out, scored_prompts
from rtdmd_cli.engine.training.loop import train
from rtdmd_cli.engine.training.opening import opened
from rtdmd_cli.engine.training.restoring import accepted, restore
from rtdmd_cli.engine.training.session import (
    DRAWING,
    LOADING,
    Outcome,
    Row,
    Schedule,
    Session,
    Stage,
    kept_by,
)
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import require_tracker
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


def _load_model(preset: Preset, say: Callable[[str], None]) -> tuple[Processes, Backbone]:
    """The processes of this training and its base model, after all that can be refused beforehand."""
    hardware = preset.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    processes, device = join(resolve_device(hardware.device))
    require_tracker(hardware.tracker)
    require_parts(processes, "distill.batch", preset.distill.batch, equal=False)
    dtype = resolve_dtype(hardware.dtype, device)
    bring(needed.models(preset.model), say)
    say(f"loading the model {preset.model.path}")
    backbone = load_backbone(preset.model, device, dtype, hardware)
    say(model_line(preset, backbone))
    return processes, backbone


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
    processes, backbone = _load_model(resolved.preset, say)
    device = backbone.device
    stop.check()
    own, scored = resolved.preset.previews.prompts, scored_prompts(resolved.preset)
    with processes.first_here():
        every = [*prompts.texts, *own, *scored.texts]
        conditioning, empty = encode_prompts(backbone, every, say, hardware, stop.check, len(prompts))
    trainer = build_trainer(backbone, resolved.preset, len(prompts), conditioning, empty)
    trainer.processes = processes
    saved = start.checkpoint
    if saved:
        restore(trainer, saved, STAGE)
    start = accepted(start, backbone.dtype)
    stop.check()

    def make() -> RunFolder:
        return create_run(out, name, resolved, command, device)

    seconds = float(saved.state["seconds"]) if saved else 0.0

    def report(run: RunFolder, state: State, done: int) -> None:
        live = live_now(None, None) if state == "running" else None
        write_run_report(run, resolved.preset, state, done, seconds, live=live)

    total = resolved.preset.distill.iterations
    with opened(start, out / name, make, resolved, total, processes, say, report, stop.quiet) as (
        run,
        tracker,
        done,
    ):
        first = len(prompts) + len(own)
        texts, rows = pictures.chosen(resolved.preset, prompts.texts, len(prompts))
        say(pictures.drawing_line(resolved.preset, len(texts)))
        with stop.during(DRAWING, kept_by(start)):
            shown = pictures.make_previews(
                backbone, trainer.roles, resolved.preset, texts, conditioning(rows), empty
            )
            stop.check()
        cond = conditioning(range(first, first + len(scored))) if len(scored) else None
        judge = open_held_out(resolved.preset, shown, scored, cond, backbone, say)
        if processes.main:
            pictures.save_reference(shown, run.samples)
        plan = stage(trainer, shown, judge)
        records = dict(saved.state["records"]) if saved else {}
        session = Session(run, resolved, trainer, plan, tracker, done, seconds, records, known_by(prompts))
        session.last, session.stop = saved.path if start.run and saved else None, stop
        session.say = say
        memory.keep_size(session.stage.sizes, records)
        with failing(session):
            return finish(session, train(session, stop.quiet))


def stage(trainer: Trainer, previews: pictures.Previews, judge: HeldOut) -> Stage:
    """Stage 1 as a training run knows it."""
    settings, health = previews.preset.previews, Health(previews)

    def prepare(iteration: int, stopping: Callable[[], bool]) -> bool:
        total = trainer.config.iterations
        return prepare_prompts(trainer, iteration, total, lambda i: chosen_prompts(trainer, i), stopping)

    def advance(iteration: int) -> None:
        with trainer.precision():
            iterate(trainer, iteration)

    def grid(path: Path, iteration: int) -> dict[str, float]:
        images = pictures.save_sample_grid(previews, trainer.ema, path, iteration)
        return judge.measure(trainer, images) | health.lag(iteration)

    def baseline(path: Path) -> dict[str, float]:
        images = pictures.save_baseline(previews, trainer.ema, path)
        return judge.measure(trainer, images) | health.lag(0)

    def report(session: Session, state: State, last: Row) -> None:
        preset, iteration = session.resolved.preset, session.iteration
        live = live_now(session.seconds_left, session.seconds_each) if state == "running" else None
        write_run_report(session.run, preset, state, iteration, session.seconds, last, live)

    def end(session: Session, state: State, last: Row) -> None:
        health.save_panel(session.run.path / "health.png", session.iteration)
        report(session, state, last)

    return Stage(
        name=STAGE,
        schedule=schedule(trainer.config, settings),
        sizes=sizes(trainer),
        advance=advance,
        grid=grid,
        baseline=baseline if settings.baseline and trainer.config.sample_every else None,
        report=report,
        finish=end,
        prepare=prepare,
    )


def sizes(trainer: Trainer) -> memory.Sizes:
    """Stage 1's micro-batch."""

    def resize(size: int) -> None:
        trainer.config = trainer.config.model_copy(update={"micro_batch": size})

    batch = trainer.config.batch
    return memory.Sizes("distill", batch, lambda: trainer.config.micro_batch or batch, resize)


def schedule(config: DistillConfig, previews: PreviewsConfig) -> Schedule:
    """The distances of a stage-1 run."""
    return Schedule(
        config.iterations,
        config.save_every,
        config.log_every,
        config.sample_every,
        config.keep,
        previews.minutes,
        config.save_minutes,
    )


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
