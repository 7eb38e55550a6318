"""What the page of `rtdmd runs view` is told of runs: JSON values of the list, the metrics and the single pictures."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.report.html import metrics_series
from rtdmd_cli.engine.report.metrics import explained
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.run_folder import PICTURES, RunFolder
from rtdmd_cli.engine.storage.runs import PICTURE_INDEX, RunSummary
from rtdmd_cli.errors import DataError

PICTURE = re.compile(r"(step-\d{6,}|teacher|few-step-teacher|start)-([0-9a-f]{12})\.(?:png|jpg)")
"""File name of a single picture: what it is of, and the key of its prompt and seed."""
REFERENCES = ("teacher", "few-step-teacher", "start")
MAX_POINTS = 4000
"""Of one line that is sent; of longer ones every n-th point is."""


def run_id(run: RunFolder) -> str:
    """Names a run in the page's addresses: 12 hexadecimal digits of its path."""
    return hashlib.sha256(str(run.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def listed(each: RunSummary) -> dict[str, Any]:
    """A run as a line of the list. stamp: changes when there is news."""
    return {
        "id": run_id(each.run),
        "name": shown(each.name),
        "stage": each.stage,
        "state": each.state,
        "problem": shown(each.problem),
        "iterations": each.iterations,
        "target": each.target,
        "unit": each.unit,
        "seconds": round(each.seconds, 1),
        "left": each.seconds_left,
        "preset": each.preset.name if each.preset else None,
        "date": f"{each.date:%Y-%m-%d %H:%M}",
        "stamp": f"{each.date.isoformat()} {_changed(each.run)}",
    }


def shown(text: str) -> str:
    """The text as UTF-8 can hold it: a folder's name may be anything."""
    return text.encode("utf-8", "replace").decode()


def _changed(run: RunFolder) -> str:
    """Size and time of the metrics."""
    path = run.metrics.path
    if not path.is_file():
        return ""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def metrics(run: RunFolder) -> dict[str, Any]:
    """Every metric as {"x": iterations, "y": values}, and its sentence."""
    series = metrics_series(run.metrics.read())
    thin = {name: _thinned(x, y) for name, (x, y) in series.items()}
    return {"series": thin, "explained": {name: explained(name) for name in series}}


def _thinned(x: list[float], y: list[float]) -> dict[str, list[float]]:
    step = -(-len(x) // MAX_POINTS)
    return {"x": x[::step], "y": y[::step]}


def pictures(run: RunFolder) -> dict[str, Any]:
    """Prompts as columns, what was drawn of them (references first, then steps, rising), and the file of each picture.

    Empty columns for a run without single pictures, or whose list of them is damaged.
    """
    folder = run.samples / PICTURES
    files: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*-*")) if folder.is_dir() else ():
        if match := PICTURE.fullmatch(path.name):
            files.setdefault(match[1], {})[match[2]] = path.name
    columns = _columns(folder / PICTURE_INDEX, {key for keys in files.values() for key in keys})
    return {
        "columns": columns,
        "seeds": len({column["seed"] for column in columns}),
        "references": [name for name in REFERENCES if name in files],
        "steps": sorted((n for n in files if n.startswith("step-")), key=lambda n: int(n[5:])),
        "files": files,
    }


def _columns(index: Path, there: set[str]) -> list[dict[str, Any]]:
    try:
        known = strict_json.read(index)
    except (DataError, ValueError, OSError):
        return []
    if not isinstance(known, dict) or not isinstance(known.get("pictures"), dict):
        return []
    told: Mapping[str, Any] = known["pictures"]
    order = [key for key in known.get("order", []) if key in told and key in there]
    return [{"key": key, "prompt": str(told[key]["prompt"]), "seed": int(told[key]["seed"])} for key in order]
