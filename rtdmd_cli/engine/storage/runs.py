"""What lies under a folder of runs: one row for each, also for those that were killed or damaged."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.storage import checkpoint, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.run_folder import (
    ENVIRONMENT,
    PRESET,
    STATUS,
    RunFolder,
    is_run,
    resolve_run,
)
from rtdmd_cli.errors import RtdmdError, UsageError

T = TypeVar("T")
TRACES = (PRESET, STATUS, ENVIRONMENT, "checkpoints", "metrics.jsonl")
"""A folder that holds one of these is, or was, a run."""
CLOCKS = frozenset({"iteration", "seconds", "iterations_per_second"})
PICTURE_INDEX = "index.json"
"""In a run's folder of single pictures: what they are of."""
KILLED, DAMAGED = "killed", "damaged"


@dataclass(frozen=True)
class RunSummary:
    """One run. state: as its status says; "killed" where no process works on it any more; "damaged".

    stage, preset and target (iterations or epochs) are None where the folder does not tell. seconds of training.
    figures: the last value of every metric, rows: all lines of them. date: of the last change, UTC. problem: what is
    damaged, or "".
    """

    run: RunFolder
    state: str
    stage: str | None
    preset: Preset | None
    iterations: int
    target: int | None
    seconds: float
    figures: Mapping[str, float]
    date: datetime
    problem: str = ""
    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run.path.resolve().name

    @property
    def unit(self) -> str:
        """What its length is counted in: "iteration" or "epoch"."""
        return "epoch" if self.stage == "tune-reward" else "iteration"

    @property
    def seconds_left(self) -> float | None:
        """Of a run that goes on, at its mean pace; None for others, and before there is a pace."""
        if self.state != "running" or not (self.target and self.iterations and self.seconds):
            return None
        return self.seconds / self.iterations * max(self.target - self.iterations, 0)


def list_runs(out: Path) -> list[RunSummary]:
    """Every run under `out`, the one that changed last first. Empty if there is no such folder."""
    if not out.is_dir():
        return []
    with os_errors(out, "list"):
        folders = [path for path in out.iterdir() if not path.name.startswith(".") and looks_like_run(path)]
    found = [replace(summary(RunFolder(path)), rows=()) for path in folders]
    return sorted(found, key=lambda each: (each.date, each.name), reverse=True)


def looks_like_run(path: Path) -> bool:
    """Whether a folder is a run, or what is left of one."""
    return os.path.isdir(path) and any(os.path.lexists(path / name) for name in TRACES)


def find_run(reference: str, out: Path) -> RunFolder:
    """The run of that path or name, damaged or not. UsageError, naming those there are, if there is none."""
    found = resolve_run(reference, out)
    if found is not None and found.run is not None:
        return found.run
    for path in (Path(reference), out / reference):
        if reference and looks_like_run(path):
            return RunFolder(path)
    names = ", ".join(each.name for each in list_runs(out)[:5])
    raise UsageError(
        f"There is no run `{reference}` under {out}/.",
        f"There are: {names}." if names else "Make one first: rtdmd distill",
    )


def summary(run: RunFolder) -> RunSummary:
    """What the folder tells; what can't be read becomes `problem`, and nothing is raised."""
    problems: list[str] = []
    preset = _preset(run, problems)
    stage = _told(lambda: run.stage, problems)
    status = _told(run.status, problems) or {}
    rows = _told(run.metrics.read, problems) or []
    held = _told(run.is_held, problems)
    state = DAMAGED if problems else str(status["state"])
    if state == "running" and not held:
        state = KILLED
    last = rows[-1] if rows else {}
    return RunSummary(
        run=run,
        state=state,
        stage=stage,
        preset=preset,
        iterations=_iterations(state, status, last),
        target=_target(preset, stage),
        seconds=_number(status.get("seconds")) or _number(last.get("seconds")) or 0.0,
        figures=last_figures(rows),
        date=_date(run, status),
        problem=" ".join(problems),
        rows=rows,
    )


def _iterations(state: str, status: Mapping[str, Any], last: Mapping[str, Any]) -> int:
    """How far a run is: by its status where it ended by itself, so that it agrees with the last checkpoint."""
    told, measured = _whole(status.get("iteration")), _whole(last.get("iteration"))
    by_itself = state in ("finished", "interrupted") and "iteration" in status
    return told if by_itself else max(told, measured)


def last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric; clocks are left out."""
    found: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            number = _number(value)
            if name not in CLOCKS and number is not None:
                found[name] = number
    return found


@dataclass(frozen=True)
class Saved:
    """The checkpoints of a run: all steps that have a folder, the newest good one, and why newer ones are not."""

    steps: Sequence[int]
    newest: str | None
    skipped: Mapping[str, str]


def saved(run: RunFolder) -> Saved:
    """Reads the newest checkpoint through, and older ones only while they turn out damaged."""
    steps = checkpoint.checkpoint_steps(run.checkpoints)
    try:
        newest, skipped = checkpoint.newest_valid(run.checkpoints)
    except checkpoint.RefusedCheckpoint as error:  # it names the folder
        return Saved(steps, None, {run.checkpoints.name: error.message})
    return Saved(steps, newest.name if newest else None, {path.name: reason for path, reason in skipped})


def recorded(run: RunFolder) -> dict[str, Any]:
    """What environment.json tells of command, versions and machine; nothing if it is damaged."""
    try:
        found = strict_json.read(run.path / ENVIRONMENT)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _preset(run: RunFolder, problems: list[str]) -> Preset | None:
    if not is_run(run.path):
        problems.append(f"{PRESET} is missing.")
        return None
    return _told(lambda: load_preset(str(run.preset), environ={}).preset, problems)


def _told(read: Callable[[], T], problems: list[str]) -> T | None:
    """What `read` gives, or None and a problem."""
    try:
        return read()
    except RtdmdError as error:
        problems.append(error.message)
        return None


def _target(preset: Preset | None, stage: str | None) -> int | None:
    if preset is None or stage is None:
        return None
    return preset.tune_reward.epochs if stage == "tune-reward" else preset.distill.iterations


def _date(run: RunFolder, status: Mapping[str, Any]) -> datetime:
    """Of the status; where it has none, the folder's own."""
    try:
        return datetime.strptime(str(status.get("time")), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        with os_errors(run.path, "read"):
            return datetime.fromtimestamp(run.path.stat().st_mtime, UTC)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: object) -> int:
    return int(_number(value) or 0)
