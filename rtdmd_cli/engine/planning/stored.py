"""What `rtdmd plan` found last for a preset, kept in the cache folder: a dry run shows it at once. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdmd_cli import __version__
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import cache_folder, write_json

TOTALS = ("card_peak_gib", "decides", "host_peak_gib", "disk_gib", "hours", "hours_on")
"""Of a stage, as a dry run shows them."""


def plan_path(sha256: str, stage: str) -> Path:
    """Where the plan of a preset's values and a stage lies."""
    return cache_folder("plans") / f"{__version__}-{sha256}-{stage}.json"


def keep(sha256: str, stage: str, totals: Mapping[str, Any]) -> None:
    """Keep a stage's TOTALS."""
    write_json(plan_path(sha256, stage), {name: totals[name] for name in TOTALS})


def kept(sha256: str, stage: str) -> dict[str, Any] | None:
    """A stage's TOTALS; None where it was never planned by this version, or the file can't be read."""
    try:
        found = strict_json.read(plan_path(sha256, stage))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == set(TOTALS) else None
