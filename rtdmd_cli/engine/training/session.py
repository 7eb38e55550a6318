"""A run in progress, for both stages: what it consists of, its checkpoints and its grids.

It is trained by `loop` and ended by `closing`; the recipes are `distill.recipe.iterate` and `tune_reward.recipe.tune`.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.storage.checkpoint import (
    save_checkpoint,
    step_name,
    step_of,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder, State
from rtdmd_cli.engine.storage.scrubbing import scrub_text
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training.clock import Clock
from rtdmd_cli.engine.training.restoring import STATE_KEYS, groups
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import Tracker
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of

LOADING, DRAWING = "stopping when the model is loaded", "stopping when the first pictures are drawn"
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
    alone has a grid. save_minutes: likewise between two checkpoints.
    """

    total: int
    save_every: int
    log_every: int
    sample_every: int
    keep: int
    sample_minutes: float | None = None
    save_minutes: float | None = None


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
    sizes: its micro-batch. prepare(i, stopping): before `advance`, what takes long and changes nothing that is trained;
    whether it is done. It asks now and then whether to leave it there.
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
    prepare: Callable[[int, Callable[[], bool]], bool] = lambda iteration, stopping: True


@dataclass
class Session:
    """A run in progress. newest: the last value of every figure, for the line of progress.

    `seconds` counts training time of all parts, `last` is the newest checkpoint, `records` are JSON values of the
    stage's own that survive a resume, `prompts` is what `prompts.reading.known_by` says of the prompts. Four records have a
    meaning here: with `stopped` (true) the run ends before its time; `best` is the step of a checkpoint that is
    made out of turn and never removed; `rewards_after`, mean rewards measured at the end, go into the status. `micro_batch`
    is what a full memory has brought it down to. say: prints a line for people. folder: by which the run's folder is known
    again when it is renamed. advancing: an iteration is being made; what fails then may have moved a part of it.
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
    advancing: bool = False

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


def save_unsaved(session: Session) -> None:
    """A checkpoint of this iteration, if there is none; by the main process."""
    if session.trainer.processes.main and not session.saved:
        save(session)


def write_live(session: Session) -> None:
    """The report of a run that goes on."""
    session.stage.report(session, "running", {})
    session.clock.report = time.monotonic()


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
    session.clock.saved = time.monotonic()
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


def saved_step(session: Session) -> int:
    """The step of the newest checkpoint, where a run goes on that was stopped at once; 0 without one."""
    return step_of(session.last) if session.last else 0
