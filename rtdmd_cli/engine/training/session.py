"""What surrounds a recipe, for both stages: the loop, checkpoints, metric lines, grids, signals.

The recipes themselves are `distill.recipe.iterate` and `tune_reward.recipe.tune`.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.storage.checkpoint import (
    rotate,
    save_checkpoint,
    step_name,
    step_of,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, create_run
from rtdmd_cli.engine.storage.scrubbing import scrub_text
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training.clock import Clock
from rtdmd_cli.engine.training.following import found_again, gone, identity, new_name
from rtdmd_cli.engine.training.opening import note_end
from rtdmd_cli.engine.training.progress import training_progress
from rtdmd_cli.engine.training.restoring import STATE_KEYS, groups
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import Tracker
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of
from rtdmd_cli.errors import EnvironmentFailure, PictureFailure

RECENT = 10  # iterations whose times tell how long one takes: some do more than others
LOADING, DRAWING = "stopping when the model is loaded", "stopping when the first pictures are drawn"
LAST_WORK = "drawing the last pictures and writing the report"
REPORT_SECONDS = 300.0
"""Longest time between two writings of a live report, where an iteration takes less."""
Row: TypeAlias = Mapping[str, Any]
"""A metric line, or nothing."""


@dataclass(frozen=True)
class Outcome:
    """What came out. `signal_exit_code` is 0 unless a signal ended the run early."""

    run: Path
    iterations: int
    seconds: float
    checkpoint: Path
    signal_exit_code: int
    records: Mapping[str, Any]


@dataclass(frozen=True)
class Schedule:
    """The length of a training and the distances of what is written on the way, in iterations (epochs).

    sample_minutes: the longest time between two grids, None for any; both at once for `sample_every` 0, where the end
    alone has a grid.
    """

    total: int
    save_every: int
    log_every: int
    sample_every: int
    keep: int
    sample_minutes: float | None = None


@dataclass(frozen=True)
class Stage:
    """What differs between the stages.

    name: in checkpoints and run folders. advance(i): one iteration (0-based). grid(path, iteration): writes a grid, and
    gives what is measured with it. baseline(path): likewise, before training; None for no such grid.
    report(session, state, last): writes the report from what is known, without measuring anything. finish(session,
    state, last): the last measurements, the health panel and the report. last: a metric line that is not in the run
    folder, or nothing.
    after(session): measured by the stage after an iteration; a metric line is written where there is any. It may set
    the records `stopped` and `best`, see `Session`.
    frozen: adapters that belong into every checkpoint although they don't change. unit: what `advance` does one of.
    sizes: its micro-batch.
    """

    name: str
    schedule: Schedule
    sizes: memory.Sizes
    advance: Callable[[int], None]
    grid: Callable[[Path, int], Mapping[str, float]]
    report: Callable[["Session", State, Row], None]
    finish: Callable[["Session", State, Row], None]
    baseline: Callable[[Path], Mapping[str, float]] | None = None
    after: Callable[["Session"], Mapping[str, float]] = lambda session: {}
    frozen: tuple[str, ...] = ()
    unit: str = "iteration"


@dataclass
class Session:
    """A run in progress. newest: the last value of every figure, for the line of progress.

    `seconds` counts training time of all parts, `last` is the newest checkpoint, `records` are JSON values of the
    stage's own that survive a resume, `prompts` is what `prompts.reading.known_by` says of the prompts. Four records have a
    meaning here: with `stopped` (true) the run ends before its time; `best` is the step of a checkpoint that is
    made out of turn and never removed; `rewards_after`, mean rewards measured at the end, go into the status. `micro_batch`
    is what a full memory has brought it down to. say: prints a line for people. folder: by which the run's folder is known
    again when it is renamed.
    """

    run: RunFolder
    resolved: Resolved
    trainer: Trainer
    stage: Stage
    tracker: Tracker
    iteration: int
    seconds: float
    records: dict[str, Any]
    prompts: str
    last: Path | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    clock: Clock = field(default_factory=Clock)
    newest: dict[str, float] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    folder: os.stat_result | None = None

    @property
    def stopped(self) -> bool:
        """Whether the stage has ended the run."""
        return bool(self.records.get("stopped"))

    @property
    def seconds_each(self) -> float | None:
        """Of an iteration, at this process's pace; None before the first one."""
        return self.clock.seconds_each(self.iteration)

    @property
    def seconds_left(self) -> float | None:
        """At this process's pace; None before the first iteration."""
        each = self.seconds_each
        return None if each is None else each * (self.stage.schedule.total - self.iteration)

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by the stage's own measure; None without one."""
        return self.records.get("best")

    @property
    def kept(self) -> str:
        """What is left if it is stopped here at once, half a sentence."""
        return kept(self.last)

    @property
    def saved(self) -> bool:
        """Whether the newest checkpoint is of this iteration."""
        return self.last is not None and self.last.name == step_name(self.iteration)


def kept(checkpoint: Path | None) -> str:
    """What is left of a run that is stopped at once, half a sentence. checkpoint: its newest one."""
    return f"the last checkpoint ({checkpoint}) is kept" if checkpoint else "there is no checkpoint yet"


def kept_by(start: Start) -> str:
    """What is left of a run that is stopped before it trains, half a sentence."""
    return kept(start.checkpoint.path) if start.checkpoint else "nothing is lost, as nothing was trained yet"


def train(session: Session, quiet: bool) -> StopRequest:
    """Iterate to the end or to the first signal; every save, metric line and grid on the way."""
    stage, total, processes, stop = (
        session.stage,
        session.stage.schedule.total,
        session.trainer.processes,
        session.stop,
    )
    silent = quiet or not processes.main
    recent: deque[float] = deque(maxlen=RECENT)
    with processes.agreeing(), stop.during("finishing the pictures", session.kept):
        if processes.main and session.last:
            catch_up(session)
        if processes.main:
            begin(session)
            session.folder = identity(session.run)
    with training_progress(total, session.iteration, silent) as show:
        while session.iteration < total:
            with stop.during(ending(stage.unit, recent), session.kept):
                if ended(session, stop):
                    break
                began = time.monotonic()
                advance(session)
                session.iteration += 1
                took = time.monotonic() - began
                session.seconds += took
                recent.append(took)
                session.newest |= session.trainer.metrics
                show(session.iteration, session.newest)
            with (
                processes.agreeing(),
                stop.during("finishing measures, pictures and checkpoint", session.kept),
            ):
                if processes.main:
                    follow(session)
                    note(session, took, stage.after(session))
        with stop.during("saving the checkpoint", session.kept):
            save_unsaved(session)
    return stop


def follow(session: Session) -> None:
    """Go on where the run's folder lies now: another name beside the old one is said.

    EnvironmentFailure where it is gone; a new run has a checkpoint of this iteration then.
    """
    assert session.folder is not None
    before, now = session.run.path, found_again(session.run, session.folder)
    if now is not None and now.path == before:
        return
    if now is not None:
        session.run = now
        session.last = session.last and now.checkpoints / session.last.name
        session.say(f"{before} has been renamed: going on in {now.path}")
        return
    device, name = session.trainer.backbone.device, new_name(before)
    session.run = create_run(before.parent, name, session.resolved, sys.argv, device, session.stage.name)
    session.last = None
    save(session)
    raise gone(before, session.run, session.iteration)


def catch_up(session: Session) -> None:
    """Do what a kill right after the last checkpoint has left undone: its rotation, and its grid."""
    rotate(session.run.checkpoints, session.iteration, session.stage.schedule.keep, session.best)
    if grid_due(session.stage.schedule, session.iteration, 0.0) and not grid_path(session).exists():
        sample_grid(session)


def ending(unit: str, seconds: Collection[float]) -> str:
    """What the first signal lets come to its end. seconds: that the last iterations took; the longest is named."""
    return f"finishing this {unit}" + (f" (about {in_words(max(seconds))})" if seconds else "")


def in_words(seconds: float) -> str:
    """About that time: 40 s, 3 min."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"


def advance(session: Session) -> None:
    """One iteration, within the memory there is: see `memory`. A run that finds no way is saved as it was before."""
    sizes, iteration = session.stage.sizes, session.iteration

    def tell(line: str) -> None:
        session.run.log(f"iteration {iteration + 1}: {line}")
        session.say(line)

    try:
        smaller = memory.advance_within_memory(
            session.trainer, sizes, lambda: session.stage.advance(iteration), session.resolved.preset, tell
        )
    except memory.MemoryFull:
        if iteration:
            save_unsaved(session)
        raise
    if smaller:
        session.records[memory.RECORD] = sizes.micro_batch()


def ended(session: Session, stop: StopRequest) -> bool:
    """Whether the training ends before its time: in all processes alike, whichever a signal came to."""
    processes = session.trainer.processes
    number = processes.largest(stop.received or 0)
    if number:
        stop.received = number
    return bool(number) or bool(processes.largest(int(session.stopped)))


def save_unsaved(session: Session) -> None:
    """A checkpoint of this iteration, if there is none; by the main process."""
    if session.trainer.processes.main and not session.saved:
        save(session)


def begin(session: Session) -> None:
    """Before the first iteration of this process: the baseline grid, in a new run, and the report."""
    path = session.run.samples / "step-000000.png"
    if session.iteration == 0 and session.stage.baseline and not session.run.metrics.read():
        session.say("drawing and measuring the pictures before training")
        measured = session.stage.baseline(path)
        session.newest |= measured
        figures = {"iteration": 0, **measured}
        session.tracker.log(figures)
        session.run.metrics.append(figures)
        session.tracker.show(path, 0)
    write_live(session)
    session.clock.start(session.iteration)


def write_live(session: Session) -> None:
    """The report of a run that goes on."""
    session.stage.report(session, "running", {})
    session.clock.report = time.monotonic()


def grid_due(schedule: Schedule, iteration: int, seconds: float) -> bool:
    """Whether this iteration has a grid, by iterations or by minutes, whichever come first.

    seconds: since the last grid.
    """
    if not schedule.sample_every:
        return False
    late = schedule.sample_minutes is not None and seconds >= 60 * schedule.sample_minutes
    return late or iteration % schedule.sample_every == 0


def note(session: Session, took: float, measured: Mapping[str, float]) -> None:
    """After an iteration: grid, metrics, checkpoint and report, each at its own distance."""
    schedule, done = session.stage.schedule, session.iteration
    news = grid_due(schedule, done, time.monotonic() - session.clock.grid)
    figures = sample_grid(session) if news else {}
    if done % schedule.log_every == 0 or done == schedule.total or measured or figures:
        row: dict[str, Any] = {"iteration": done, **session.trainer.metrics, **measured, **figures}
        machine = machine_figures(session.trainer)
        session.newest |= {**measured, **figures, **machine}
        row |= {**machine, "seconds": session.seconds, "iterations_per_second": 1 / took}
        session.tracker.log(row)
        session.run.metrics.append(row)
    if done % schedule.save_every == 0 or session.best == done:
        save(session)
        news = True
    late = time.monotonic() - session.clock.report >= REPORT_SECONDS
    if (news or late) and done != schedule.total:
        write_live(session)


def machine_figures(trainer: Trainer) -> dict[str, float]:
    """Of the newest iteration: learning rates, and on a GPU the most memory that was held, GiB."""
    figures = {
        f"learning_rate/{role}": float(optimizer_of(trainer, role).param_groups[0]["lr"]) for role in ROLES
    }
    device = trainer.backbone.device
    if device.type == "cuda":
        figures["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures


def save(session: Session) -> None:
    """Write a checkpoint of everything that the next iteration depends on."""
    trainer, stage = session.trainer, session.stage
    tensors: dict[str, dict[str, torch.Tensor]] = {"ema": trainer.ema}
    for adapter in stage.frozen:
        tensors[adapter] = {name: p.detach() for name, p in trainer.roles.named_parameters(adapter)}
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
        "stage": stage.name,
        "generator_updates": trainer.generator_updates,
        "optimizers": scalars,
        "seconds": round(session.seconds, 3),
        "records": session.records,
    }
    assert state.keys() == STATE_KEYS and tensors.keys() == groups(stage.frozen)
    meta = {
        "preset_sha256": session.resolved.sha256,
        "rtdmd": __version__,
        "base_model": scrub_text(session.resolved.preset.model.path),
        "base_hash": trainer.backbone.model_id.hash,
        "dtype": str(trainer.backbone.dtype).removeprefix("torch."),
        "prompts_sha256": session.prompts,
    }
    run, keep = session.run, stage.schedule.keep
    session.last = save_checkpoint(
        run.checkpoints, session.iteration, tensors, state, keep, meta, session.best
    )
    run.set_status("running", iteration=session.iteration)


def grid_path(session: Session) -> Path:
    """The grid of this iteration."""
    return session.run.samples / f"step-{session.iteration:06d}.png"


def sample_grid(session: Session) -> Mapping[str, float]:
    """Write the grid of this iteration; what is measured with it."""
    path = grid_path(session)
    figures = session.stage.grid(path, session.iteration)
    session.tracker.show(path, session.iteration)
    session.clock.grid, session.clock.grid_of = time.monotonic(), session.iteration
    return figures


def finish(session: Session, stop: StopRequest) -> Outcome:
    """Final grid, the stage's own panel and report, and the status, by the main process.

    An interrupted run has its status before its last pictures are drawn; a finished one after its report is written.
    """
    run = session.run
    over = session.iteration >= session.stage.schedule.total or session.stopped
    if session.trainer.processes.main:
        state: State = "finished" if over else "interrupted"
        if not over:
            set_end(session, state)
        with stop.during(LAST_WORK, session.kept):
            session.say(LAST_WORK)
            figures: dict[str, Any] = {}
            baseline = (
                session.iteration == 0 and grid_path(session).exists()
            )  # of a run that is stopped at once
            if session.clock.grid_of != session.iteration and not baseline:
                # Not in the metrics, so that a run that is extended goes on as if it had not ended here.
                figures = {"iteration": session.iteration, **sample_grid(session)}
            session.stage.finish(session, state, figures)
        set_end(session, state)
        run.log(f"{state} at iteration {session.iteration}")
    last = run.checkpoints / step_name(session.iteration)
    code = 0 if over else stop.exit_code
    return Outcome(run.path, session.iteration, session.seconds, last, code, session.records)


def set_end(session: Session, state: State) -> None:
    """The status of a run that ends with a checkpoint of this iteration, with what is known of it by then."""
    known: dict[str, Any] = {} if session.best is None else {"best": step_name(session.best)}
    known |= {"measured": session.records["rewards_after"]} if "rewards_after" in session.records else {}
    session.run.set_status(state, iteration=session.iteration, seconds=round(session.seconds, 3), **known)


@contextmanager
def failing(session: Session) -> Iterator[None]:
    """What is raised within becomes the status of the run; after a signal the status is that of the last checkpoint."""
    try:
        yield
    except BaseException as error:
        if session.trainer.processes.main:
            if isinstance(error, PictureFailure) and session.iteration > session.clock.first:
                save_unsaved(session)
            done = saved_step(session) if isinstance(error, KeyboardInterrupt) else session.iteration
            state = note_end(session.run, error, done, session.stage.schedule.total)
            with suppress(EnvironmentFailure):  # of a full disk, say: what is to be said is the error
                session.stage.report(session, state, {})
        raise


def saved_step(session: Session) -> int:
    """The step of the newest checkpoint, where a run goes on that was stopped at once; 0 without one."""
    return step_of(session.last) if session.last else 0
