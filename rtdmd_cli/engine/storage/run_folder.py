"""A run folder: what a run is, what it did, and what came out.

<out>/<name>/
  preset.resolved.yaml  environment.json  status.json  metrics.jsonl  log.txt
  checkpoints/  samples/  report.html

torch and what imports it are imported where a run is made: lists of runs must not wait for them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import Resolved, dump_resolved
from rtdmd_cli.engine.storage import checkpoint, files, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.locks import is_held
from rtdmd_cli.engine.storage.scrubbing import scrub, scrub_text, scrub_values
from rtdmd_cli.errors import DataError, NumericalError, UsageError

if TYPE_CHECKING:
    import torch

State: TypeAlias = Literal["running", "finished", "interrupted", "failed"]

PRESET = "preset.resolved.yaml"
STATUS = "status.json"
ENVIRONMENT = "environment.json"
FROM = "from"
"""In environment.json: stage 1's checkpoint, of a run of tune-reward."""
ID = "id"
"""In environment.json: by which a tracker knows the run again, whatever its folder is called and wherever it lies."""
PICTURES = "pictures"
"""Folder, in that of the grids, of the grids' pictures one by one."""
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
)

_RUN_NAME = re.compile(r"\w[\w.-]{0,79}")


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: one JSON object a line, each with a whole "iteration"."""

    path: Path

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line, keys sorted. NumericalError names a value that is nan or infinite."""
        iteration = values["iteration"]
        if not isinstance(iteration, int):
            raise TypeError(f"the iteration must be a whole number, got {iteration!r}")
        try:
            text = json.dumps(dict(values), sort_keys=True, allow_nan=False)
        except ValueError as error:
            bad = [
                key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)
            ]
            raise NumericalError(
                f"The metric {', '.join(bad)} is not finite at iteration {iteration}."
            ) from error
        files.append_line(self.path, text)

    def read(self) -> list[dict[str, Any]]:
        """The lines in order; damaged ones are left out. Empty if there is no file."""
        return [entry for _, entry in self._lines() if entry is not None]

    def truncate_after(self, iteration: int) -> int:
        """Drop the lines of later iterations and damaged lines, as a kill leaves at the end; how many.

        The lines that stay keep their bytes.
        """
        lines = self._lines()
        kept = [raw for raw, entry in lines if entry is not None and entry["iteration"] <= iteration]
        if len(kept) < len(lines):
            files.write_bytes(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def _lines(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        """Each line's bytes, and its object or None if it is damaged."""
        return [(raw, _row(entry)) for raw, entry in strict_json.read_lines(self.path)]


def _row(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """The line of an iteration, or None for anything else."""
    return entry if entry is not None and type(entry.get("iteration")) is int else None


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and what is written to it in passing."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def preset(self) -> Path:
        return self.path / PRESET

    @property
    def stage(self) -> str:
        """The command that made it: "distill" or "tune-reward". DataError if environment.json is damaged."""
        path = self.path / ENVIRONMENT
        try:
            return str(strict_json.read(path).get("stage", "distill"))
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is missing or damaged.", "Restore it, or take another run.") from error

    @property
    def begun_from(self) -> Path | None:
        """The checkpoint of stage 1 that a run of tune-reward began from; None where its record doesn't say."""
        try:
            told = strict_json.read(self.path / ENVIRONMENT).get(FROM)
        except (OSError, ValueError, AttributeError):
            return None
        return Path(os.path.normpath(self.path / told)) if isinstance(told, str) else None

    @property
    def id(self) -> str | None:
        """What tells this run from every other one; None where its record doesn't say."""
        try:
            told = strict_json.read(self.path / ENVIRONMENT).get(ID)
        except (OSError, ValueError, AttributeError):
            return None
        return told if isinstance(told, str) else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def metrics(self) -> Metrics:
        return Metrics(self.path / "metrics.jsonl")

    def log(self, text: str) -> None:
        """Append to log.txt, each line with the time (UTC)."""
        for line in text.splitlines():
            files.append_line(self.path / "log.txt", f"{_now()} {scrub_text(line)}", keep_half=True)

    def set_status(self, state: State, **info: Any) -> None:
        """Replace status.json by the state, the time (UTC) and `info`."""
        files.write_json(self.path / STATUS, {**scrub_values(info), "state": state, "time": _now()})

    def status(self) -> dict[str, Any]:
        """The content of status.json. Raises DataError if it is missing or damaged."""
        status = _read_status(self.path)
        if status is None:
            raise DataError(
                f"{self.path / STATUS} is missing or damaged.", "Continue the run with --resume auto."
            )
        return status

    def note_changes(self, changes: Sequence[tuple[str, Any, Any]], iteration: int) -> None:
        """Keep in environment.json and log.txt that keys of the preset have other values from `iteration` on.

        changes: key, value before, value now.
        """
        if not changes:
            return
        told = strict_json.read(self.path / ENVIRONMENT)
        notes = [
            {"iteration": iteration, "key": key, "before": before, "now": now} for key, before, now in changes
        ]
        files.write_json(self.path / ENVIRONMENT, told | {"changes": [*told.get("changes", []), *notes]})
        for key, before, now in changes:
            self.log(f"from iteration {iteration} on {key} is {now}; it was {before}")

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint that the status of a run of tune-reward names as the best, if it is there."""
        status = _read_status(self.path)
        path = self.checkpoints / str(status.get("best", "")) if status else self.checkpoints
        return path if path != self.checkpoints and path.is_dir() else None

    def measured(self, step: int) -> dict[str, float]:
        """Mean rewards of the generator of that step, by name; empty where the run measured none then.

        In a line of metrics.jsonl, or, measured out of turn when the run ended, in its status.
        """
        mark = "measured/"
        for row in reversed(self.metrics.read()):
            found = {key.removeprefix(mark): value for key, value in row.items() if key.startswith(mark)}
            if row["iteration"] == step and found:
                return found
        status = _read_status(self.path) or {}
        return dict(status.get("measured", {})) if status.get("iteration") == step else {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process, and remove what a killed one left half written. BusyError as `files.locked`."""

        def inner() -> list[Path]:
            return [self.samples, self.samples / PICTURES, self.checkpoints]

        with files.locked(self.path, "Wait for it, or start another run with --name OTHER.", inner):
            yield

    def is_held(self) -> bool:
        """Whether a process, this one or another, is working on the run."""
        return is_held(self.path)


@dataclass(frozen=True)
class RunReference:
    """What a text names: a run, one of its checkpoints, or a checkpoint folder outside a run."""

    run: RunFolder | None
    checkpoint: Path | None


def create_run(
    out: Path,
    name: str,
    resolved: Resolved,
    command: Sequence[str],
    device: torch.device,
    stage: str = "distill",
    begun_from: Path | None = None,
) -> RunFolder:
    """Make <out>/<name>, whole or not at all, with preset, environment and status "running".

    command: the argument list as typed. begun_from: of stage 2, stage 1's checkpoint; noted as a path from the run's
    folder on. Raises UsageError for a bad name or an existing folder that is not empty, EnvironmentFailure for disk
    and permission.
    """
    from rtdmd_cli.engine.compute.mixed import products_of

    check_name(name)
    run = RunFolder(out / name)
    refuse_existing(run.path)
    files.make_folder(out)
    files.remove_leftovers(out, name=name)
    with files.building(run.path) as folder:
        made = RunFolder(folder)
        files.make_folder(made.checkpoints)
        files.make_folder(made.samples)
        files.write_text(made.preset, dump_resolved(resolved.preset))
        products = {"matrix_products": products_of(resolved.preset.hardware, device)}
        environment = {
            "stage": stage,
            ID: secrets.token_hex(8),
            **describe_environment(command, device),
            **products,
        }
        if begun_from is not None:
            environment[FROM] = scrub_text(os.path.relpath(begun_from.resolve(), run.path.resolve()))
        files.write_json(made.path / ENVIRONMENT, environment)
        made.set_status("running", iteration=0)
        files.rename_folder(folder, run.path)
    return run


def check_name(name: str) -> None:
    """UsageError for what can't be the name of a run."""
    if not _RUN_NAME.fullmatch(name):
        raise UsageError(
            f"`{name}` cannot be the name of a run.",
            "Give --name with at most 80 letters, digits, `.`, `_` and `-`.",
        )


def refuse_existing(path: Path) -> None:
    """Raise UsageError, naming both choices, if `path` is anything but an empty folder or nothing."""
    with os_errors(path, "read"):
        taken = os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))
    if taken:
        raise UsageError(
            f"{path} already exists and is not empty; a run is never overwritten.",
            "Continue it with --resume auto, or start another run with --name OTHER.",
        )


def is_run(path: Path) -> bool:
    """Whether the folder is a run."""
    return os.path.isfile(path / PRESET)


def open_run(path: Path) -> RunFolder:
    """An existing run. Raises UsageError if there is no such folder, DataError if it is no run."""
    if not os.path.isdir(path):
        raise UsageError(f"There is no run folder {path}.", "Look at the folders under runs/.")
    if not is_run(path):
        raise DataError(
            f"{path} is not a run folder: {PRESET} is missing.", "Look at the folders under runs/."
        )
    return RunFolder(path)


def find_newest_finished(out: Path, stage: str | None = None) -> RunFolder | None:
    """The run under `out` (of that stage) that finished last, by the time in its status; None if there is none.

    A run that does not tell its stage is passed over, as it can't be gone on from.
    """
    found: list[tuple[str, str, Path]] = []
    if out.is_dir():
        with os_errors(out, "list"):
            folders = [path for path in out.iterdir() if not path.name.startswith(".") and is_run(path)]
        for path in folders:
            status = _read_status(path)
            finished = status is not None and status["state"] == "finished"
            if status is not None and finished and (stage is None or _stage(path) == stage):
                found.append((str(status["time"]), path.name, path))
    return RunFolder(max(found)[2]) if found else None


def resolve_run(reference: str, out: Path) -> RunReference | None:
    """What `reference` names: a path of a run or checkpoint first, then the name of a run under `out`.

    None if it is neither, so that the caller can look further (an exported folder, a preset).
    """
    path = Path(reference)
    if is_run(path):
        return RunReference(RunFolder(path), None)
    if os.path.isfile(path / checkpoint.MANIFEST):
        owner = path.resolve().parent.parent
        inside = path.resolve().parent.name == "checkpoints" and is_run(owner)
        return RunReference(RunFolder(owner) if inside else None, path)
    if _RUN_NAME.fullmatch(reference) and is_run(out / reference):
        return RunReference(RunFolder(out / reference), None)
    return None


def describe_environment(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Versions, machine and command, without home path, user name, host name and tokens."""
    import torch

    from rtdmd_cli.engine.compute.device import device_name

    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["torch"] = str(torch.__version__)  # with the build, which a wheel's own version can leave out
    arguments = [Path(part).name if number == 0 else part for number, part in enumerate(command)]
    return {
        "rtdmd": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "packages": versions,
        "command": scrub(arguments),
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _stage(path: Path) -> str | None:
    try:
        return RunFolder(path).stage
    except DataError:
        return None


def _read_status(path: Path) -> dict[str, Any] | None:
    try:
        status = strict_json.read(path / STATUS)
    except (OSError, ValueError):
        return None
    told = isinstance(status, dict) and all(isinstance(status.get(key), str) for key in ("state", "time"))
    return status if told else None
