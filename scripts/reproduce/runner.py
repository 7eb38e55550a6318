"""Makes cells with the real commands, each in a process of its own, and keeps what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import dump_resolved
from rtdmd_cli.engine.compute.device import device_name, resolve_device
from rtdmd_cli.engine.storage.checkpoint import checkpoint_steps
from rtdmd_cli.engine.storage.files import write_json, write_text
from rtdmd_cli.engine.storage.run_folder import ENVIRONMENT, RunFolder
from rtdmd_cli.errors import DataError, RtdmdError
from scripts.reproduce.matrix import Cell

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = "matrix_products"  # in a run's ENVIRONMENT
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked to stop. exit_code: 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


class CommandFailed(RtdmdError):
    """A command of ours did not end well; it has said why on stderr."""

    def __init__(self, arguments: list[str], code: int) -> None:
        super().__init__(f"rtdmd {arguments[0]} ended with exit code {code}.", "Its own message is above.")
        self.exit_code = code if code > 0 else 128 - code


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the block the signals of STOPS raise Stopped."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    previous = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Runner:
    """Works in the folder `out`: runs/ and presets/. ran: the arguments of every command so far.

    cells: where the figures are kept. They name no path but those that a `--set` gave, so that they can be shared.
    """

    out: Path
    cells: Path
    say: Callable[[str], None]
    ran: list[list[str]] = field(default_factory=list)

    def stored(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell's file holds; None if there is none, or one that is damaged (and will be redone)."""
        path = self._path(cell)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_bytes())
            whole = record["key"] == cell.key and _is_evaluation(record["evaluation"])
            whole = whole and {"training_seconds", "diversity", "version"} <= record.keys()
        except (OSError, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            self.say(f"{path} is damaged: the cell counts as not run")
        return record if whole else None

    def make(self, cell: Cell) -> dict[str, Any]:
        """Train what the cell needs, evaluate, keep the figures; a cell that is there is only read.

        CommandFailed if a command fails; Stopped on a signal, after the training has saved.
        """
        record = self.stored(cell)
        if record is not None:
            return record
        if cell.stage_1 is not None:
            self.make(cell.stage_1)
        self.say(f"{cell.label} ({cell.name})")
        first = len(self.ran)
        seconds = self._train(cell)
        asked = cell.settings["evaluation"]
        evaluations = [self._eval(asked, cell, *sampling) for sampling in self._samplings(cell)]
        best = max(evaluations, key=lambda each: float(each["overall"]))
        diversity, preset = self._diversity(cell, evaluations.index(best), best), cell.resolved.preset
        record = {
            "key": cell.key,
            "row": cell.row.name,
            "run": None if cell.row.kind == "teacher" else cell.run_name,
            "seed": cell.seed,
            "settings": cell.settings,
            "preset": preset.name,
            "preset_sha256": cell.resolved.sha256,
            "overrides": list(cell.row.overrides),
            "version": __version__,
            "machines": sorted(
                {device_name(resolve_device(preset.hardware.device)), *self._trained(cell, "device")}
            ),
            "products": self._trained(cell, PRODUCTS),
            "commands": [[self._portable(text) for text in command] for command in self.ran[first:]],
            "training_seconds": seconds,
            "evaluation": best,
            "alternatives": [each for each in evaluations if each is not best],
            "diversity": diversity,
        }
        write_json(self._path(cell), record)
        return record

    def run_of(self, cell: Cell) -> RunFolder:
        return RunFolder(self.out / "runs" / cell.run_name)

    def has_weights(self, cell: Cell) -> bool:
        """Whether the training of the cell is here, and over."""
        return _is_finished(self.run_of(cell))

    def reference(self, cell: Cell) -> str:
        """What `--from` takes for the cell's model."""
        return self._preset(cell) if cell.row.kind == "teacher" else str(self.run_of(cell).path)

    def _path(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"

    def _trained(self, cell: Cell, fact: str) -> list[str]:
        """What the cell's run recorded of its surroundings (its device is perhaps another than this one), if it did."""
        if cell.row.kind == "teacher":
            return []
        recorded = json.loads((self.run_of(cell).path / ENVIRONMENT).read_bytes())
        return [str(recorded[fact])] if fact in recorded else []

    def _portable(self, text: str) -> str:
        """A path inside `out` as seen from there."""
        path = Path(text)
        return str(path.relative_to(self.out)) if path.is_relative_to(self.out) else text

    def _preset(self, cell: Cell) -> str:
        """The cell's settings as a preset file: a name could also be that of a run, and would have no overrides."""
        path = self.out / "presets" / f"{cell.name}.yaml"
        write_text(path, dump_resolved(cell.resolved.preset))
        return str(path)

    def _train(self, cell: Cell) -> float | None:
        """Seconds of the cell's training, which is continued if it had begun; None for a teacher."""
        if cell.row.kind == "teacher":
            return None
        run = self.run_of(cell)
        if not _is_finished(run):
            arguments = ["--preset", self._preset(cell), "--name", run.name, "--out", str(run.path.parent)]
            if cell.stage_1 is not None:
                self._train(cell.stage_1)  # its folder may be gone although its figures are there
                arguments += ["--from", str(self.run_of(cell.stage_1).path)]
            self.command([cell.row.kind, *arguments, "--resume", "auto", "--json"])
        return float(run.status()["seconds"])

    def _samplings(self, cell: Cell) -> list[tuple[list[str], str]]:
        """(options, reference) of each evaluation of the cell."""
        if cell.row.kind != "teacher":
            return [([], self.reference(cell))]
        return [
            (["--steps", str(each.steps), "--guidance", str(each.guidance)], self.reference(cell))
            for each in cell.row.samplings
        ]

    def _diversity(self, cell: Cell, chosen: int, best: dict[str, Any]) -> float | None:
        """The judge's diversity, of several pictures of fewer prompts; None where there is no judge."""
        asked, result = cell.settings["diversity"], best
        if asked is not None and best["clip"] is not None:
            asked = {**cell.settings["evaluation"], **asked}
            result = self._eval(asked, cell, *self._samplings(cell)[chosen])
        return None if result["clip"] is None else float(result["clip"]["diversity"])

    def _eval(self, asked: dict[str, Any], cell: Cell, options: list[str], reference: str) -> dict[str, Any]:
        hardware = cell.resolved.preset.hardware
        arguments = ["eval", "shapes", "--from", reference, *options]
        arguments += ["--seed", str(asked["seed"]), "--images-per-prompt", str(asked["images_per_prompt"])]
        arguments += ["--limit", str(asked["limit"])] if asked["limit"] is not None else []
        arguments += ["--device", hardware.device, "--dtype", hardware.dtype, "--json", "--quiet"]
        # One thread: seconds a picture then mean the same on every machine's CPU.
        result = self.command(arguments, {"OMP_NUM_THREADS": "1"})
        if not _is_evaluation(result):
            raise DataError("rtdmd eval shapes gave no score.", "Run it by hand: rtdmd eval shapes --json")
        return result

    def command(self, arguments: list[str], fixed: dict[str, str] | None = None) -> dict[str, Any]:
        """The JSON object of a command run with `fixed` in its environment.

        On a signal it gets the chance to save before Stopped goes on.
        """
        self.ran.append(arguments)
        process = subprocess.Popen(
            [sys.executable, "-m", "rtdmd_cli", *arguments],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **(fixed or {})},
            process_group=0,  # a Ctrl-C reaches us alone, and is passed on once
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.communicate()
            finally:
                if process.poll() is None:
                    process.kill()
            raise
        if process.returncode != 0:
            raise CommandFailed(arguments, process.returncode)
        result = json.loads(output)
        assert isinstance(result, dict)
        return result


def _is_evaluation(value: Any) -> bool:
    """Whether it holds the figures that the table shows."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("overall"), float)
        and {"clip", "evaluations", "seconds_per_picture", "steps", "guidance", "device", "dtype"}
        <= value.keys()
    )


def _is_finished(run: RunFolder) -> bool:
    """Whether a training is over and its last checkpoint there. Its length is part of the run's name."""
    try:
        return run.status()["state"] == "finished" and bool(checkpoint_steps(run.checkpoints))
    except DataError:
        return False
