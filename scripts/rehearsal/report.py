"""The table of a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADINGS = (
    "command",
    "phase",
    "calls",
    "seconds",
    "CPU s",
    "TFLOP",
    "peak, GiB",
    "of it not file-backed, GiB",
    "live tensors, GiB",
    "planned, GiB",
    "live / planned",
)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a row for each phase of each command."""
    rows = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2))]
    for command in record["commands"]:
        for phase in command["phases"]:
            planned = command.get("planned_gib", {}).get(phase["phase"])
            rows.append((command["command"], phase["phase"], *_figures(phase), *_against(phase, planned)))
        if command["exit_code"]:
            ended = f"ended with exit code {command['exit_code']}"
            rows.append((command["command"], ended, *[""] * (len(HEADINGS) - 2)))
    head = (
        f"{record['name']} at {record['size']} px, {record['disk_gib']:.1f} GiB on disk, "
        f"written in {record['seconds_writing']:.0f} s"
    )
    return "\n".join([head, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _figures(phase: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(phase["calls"]),
        f"{phase['seconds']:.1f}",
        f"{phase['cpu_seconds']:.1f}",
        f"{phase['flops'] / 1e12:.3f}",
        f"{phase['peak_rss_gib']:.2f}",
        f"{phase['peak_anonymous_gib']:.2f}",
        f"{phase['peak_live_gib']:.2f}",
    )


def _against(phase: Mapping[str, Any], planned: float | None) -> tuple[str, str]:
    """What `rtdmd plan` says of the phase, and how much of it there was."""
    return ("", "") if planned is None else (f"{planned:.2f}", f"{phase['peak_live_gib'] / planned:.2f}")
