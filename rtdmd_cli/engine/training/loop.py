"""The loop of a training, for both stages: iterations, and after each what is due: metrics, checkpoint, grid, report."""

import sys
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch

from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.storage.checkpoint import rotate
from rtdmd_cli.engine.storage.run_folder import create_run
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training.following import found_again, gone, identity, new_name
from rtdmd_cli.engine.training.progress import training_progress
from rtdmd_cli.engine.training.session import (
    Schedule,
    Session,
    grid_path,
    sample_grid,
    save,
    save_unsaved,
    write_live,
)
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of

RECENT = 10  # iterations whose times tell how long one takes: some do more than others
REPORT_SECONDS = 300.0
"""Longest time between two writings of a live report, where an iteration takes less."""


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
    if session.iteration < total:  # the first encoding tells nothing of what an iteration takes
        with stop.during("finishing a few prompts", session.kept):
            stage.prepare(session.iteration, lambda: stop.received is not None)
    with processes.agreeing(), stop.during("finishing the pictures", session.kept):
        if processes.main and session.last:
            catch_up(session)
        if processes.main and stop.received is None:
            begin(session)
            session.folder = identity(session.run)
    with training_progress(total, session.iteration, silent) as show:
        while session.iteration < total:
            with stop.during(ending(stage.unit, recent), session.kept):
                if ended(session, stop):
                    break
                began = time.monotonic()
                if not stage.prepare(session.iteration, lambda: stop.received is not None):
                    continue  # a signal, which `ended` tells to all processes
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
    sizes, iteration, session.advancing = session.stage.sizes, session.iteration, True

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
    session.advancing = False
    if smaller:
        session.records[memory.RECORD] = sizes.micro_batch()


def ended(session: Session, stop: StopRequest) -> bool:
    """Whether the training ends before its time: in all processes alike, whichever a signal came to."""
    processes = session.trainer.processes
    number = processes.largest(stop.received or 0)
    if number:
        stop.received = number
    return bool(number) or bool(processes.largest(int(session.stopped)))


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


def grid_due(schedule: Schedule, iteration: int, seconds: float) -> bool:
    """Whether this iteration has a grid, by iterations or by minutes, whichever come first.

    seconds: since the last grid.
    """
    if not schedule.sample_every:
        return False
    late = schedule.sample_minutes is not None and seconds >= 60 * schedule.sample_minutes
    return late or iteration % schedule.sample_every == 0


def save_due(schedule: Schedule, iteration: int, seconds: float) -> bool:
    """Whether this iteration has a checkpoint, by iterations or by minutes; seconds: since the last one."""
    late = schedule.save_minutes is not None and seconds >= 60 * schedule.save_minutes
    return late or iteration % schedule.save_every == 0


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
    asked = session.stop.save  # read once: a signal that comes later is for the next iteration
    if save_due(schedule, done, time.monotonic() - session.clock.saved) or session.best == done or asked:
        save(session)
        news = True
    if asked:
        session.stop.save = False
        session.say(f"SIGUSR1: {session.kept}; going on")
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
