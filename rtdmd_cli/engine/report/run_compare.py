"""Reads two run folders and fills in the page of `report/compare.py`."""

import json
from pathlib import Path

from rtdmd_cli.config.loader import preset_values
from rtdmd_cli.engine.report.charts import format_number
from rtdmd_cli.engine.report.compare import Comparison, Side, write_comparison
from rtdmd_cli.engine.report.page import Cell, format_duration
from rtdmd_cli.engine.report.run_facts import grid_steps, grids
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.storage.runs import RunSummary, summary
from rtdmd_cli.errors import UsageError

FACTS = (
    "Stage",
    "State",
    "Length",
    "Training time",
    "Iterations or epochs a second",
    "Preset",
    "Model",
    "Last change (UTC)",
)
ROWS = {
    "distill": ("generator above, teacher below", "Iteration"),
    "tune-reward": ("stage 2 above, stage 1 below", "Epoch"),
}
"""Stage -> what stands above what in a sample grid, and what its steps count."""


def compare_runs(left: RunFolder, right: RunFolder, path: Path, force: bool = False) -> None:
    """Write the page of two runs to `path`.

    UsageError if there is something at `path` already, unless `force`, or if both are the same run.
    """
    if left.path.resolve() == right.path.resolve():
        raise UsageError(f"{left.path} is compared with itself.", "Name two different runs.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Give --out the name of an HTML file.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already.", "Replace it with --force, or choose another --out.")
    both = (summary(left), summary(right))
    one, other = _labels(both)
    settings, note = _settings(both)
    units = {each.unit for each in both}
    unit = units.pop() if len(units) == 1 else "iteration or epoch"
    comparison = Comparison(_side(both[0], one), _side(both[1], other), FACTS, settings, note, unit)
    write_comparison(path, comparison)


def _labels(both: tuple[RunSummary, RunSummary]) -> tuple[str, str]:
    """The runs' names; with the folder above where they are the same."""
    if both[0].name != both[1].name:
        return both[0].name, both[1].name
    one, other = (f"{each.run.path.resolve().parent.name}/{each.name}" for each in both)
    return (one, other) if one != other else (f"{one} (left)", f"{other} (right)")


def _side(each: RunSummary, label: str) -> Side:
    rows, unit = ROWS.get(each.stage or "distill", ROWS["distill"])
    pictures = dict(zip(sorted(grid_steps(each.run)), grids(each.run, rows, unit), strict=True))
    return Side(label, _facts(each), each.rows, pictures, each.problem)


def _facts(each: RunSummary) -> list[Cell]:
    done = f"{each.iterations:,}" + (f" of {each.target:,}" if each.target else "") + f" {each.unit}s"
    return [
        each.stage,
        each.state,
        done,
        format_duration(each.seconds) if each.seconds else None,
        format_number(each.iterations / each.seconds) if each.seconds else None,
        each.preset.name if each.preset else None,
        each.preset.model.path if each.preset else None,
        f"{each.date:%Y-%m-%d %H:%M}",
    ]


def _settings(both: tuple[RunSummary, RunSummary]) -> tuple[list[tuple[str, str, str]], str]:
    """(key, left, right) of every preset value that differs, and a note."""
    if both[0].preset is None or both[1].preset is None:
        return [], "The presets can't be compared: one of them is damaged."
    left, right = preset_values(both[0].preset), preset_values(both[1].preset)
    keys = [key for key in left if left[key] != right[key] and key not in ("name", "description")]
    rows = [(key, _json(left[key]), _json(right[key])) for key in keys]
    return rows, "All other settings are equal." if rows else "Both presets have the same values."


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
