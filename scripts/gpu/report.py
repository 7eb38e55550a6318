"""The table and the record of a check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
HEADINGS = (
    "model",
    "parameters",
    "weights, GiB",
    *("fake score, s", "peak, GiB", "planned, GiB"),
    *("generator, s", "peak, GiB", "planned, GiB"),
)


def table(rows: Sequence[Row]) -> str:
    """Markdown; a row with a "note" (out of memory, no time left) has that in the place of its figures."""
    lines = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    if "note" in row:
        return (row["model"], row["note"], *[""] * (len(HEADINGS) - 2))
    return (
        row["model"],
        f"{row['parameters'] / 1e9:.2f} B",
        _number(row["weights_gib"], 1),
        *(
            _number(row.get(f"{role}_{key}"), n)
            for role in ("fake", "generator")
            for key, n in (("seconds", 2), ("peak_gib", 1), ("planned_gib", 1))
        ),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def agreement_lines(found: Mapping[str, float], stated: Mapping[str, float]) -> list[str]:
    """A line for each comparison, with the stated bound."""
    return [
        f"{name}: {value:.5f} from the plain base, {'within' if value < stated[name] else 'BEYOND'} {stated[name]}"
        for name, value in found.items()
    ]


def beyond(found: Mapping[str, float], stated: Mapping[str, float]) -> list[str]:
    """Names of the comparisons beyond their bound; nan is beyond."""
    return [name for name, value in found.items() if not value < stated[name]]
