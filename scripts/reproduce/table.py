"""The table: figures of the cells that are there, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from scripts.reproduce.matrix import Cell, Row

NOT_RUN = "not run yet"
HEADINGS = (
    "model",
    "strict score",
    "shapes-clip, independent judge",
    "Frechet distance to renders",
    "diversity",
    "evaluations",
    "seconds a picture",
    "training, min",
    "seeds",
)


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of `values`, one for each seed."""

    values: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        low, high = min(self.values), max(self.values)
        return {"mean": mean(self.values), "min": low, "max": high, "n": len(self.values)}

    def text(self, digits: int) -> str:
        """The mean, and the range in brackets where there are several."""
        if len(self.values) == 1:
            return f"{self.values[0]:.{digits}f}"
        return (
            f"{mean(self.values):.{digits}f} ({min(self.values):.{digits}f} to {max(self.values):.{digits}f})"
        )


@dataclass(frozen=True)
class Line:
    """A row with its figures; None where there are none. failure: of a cell in this session."""

    row: Row
    label: str
    planned: int
    done: int
    failure: str | None
    figures: dict[str, Spread | None]

    def record(self) -> dict[str, Any]:
        figures = {name: spread.record() if spread else None for name, spread in self.figures.items()}
        facts = {"row": self.row.name, "label": self.label, "seeds": self.planned, "done": self.done}
        return facts | {"failure": self.failure} | figures

    def cells(self) -> list[str]:
        """The texts of a table's row."""
        state = NOT_RUN if self.failure is None else self.failure
        digits = {"score": 3, "clip": 3, "frechet": 4, "diversity": 3, "evaluations": 0}
        digits |= {"seconds_per_picture": 4, "training_minutes": 1}
        texts = [
            spread.text(digits[name]) if spread else ("" if self.done else "-")
            for name, spread in self.figures.items()
        ]
        texts[0] = texts[0] if self.done else state
        return [self.label, *texts, f"{self.done} of {self.planned}"]


def table_lines(
    rows: Sequence[Row],
    cells: Sequence[Cell],
    records: Mapping[str, dict[str, Any]],
    failures: Mapping[str, str],
) -> list[Line]:
    """A line for each row. records and failures: by the key of a cell."""
    lines = []
    for row in rows:
        own = [cell for cell in cells if cell.row.name == row.name]
        found = [records[cell.key] for cell in own if cell.key in records]
        failed = [failures[cell.key] for cell in own if cell.key in failures]
        failure = failed[0] if failed else None
        lines.append(Line(row, _label(row, found), len(own), len(found), failure, _figures(found)))
    return lines


def _label(row: Row, found: Sequence[dict[str, Any]]) -> str:
    """The row's label; which sampling was the better is said where it is known."""
    used = {(each["evaluation"]["steps"], each["evaluation"]["guidance"]) for each in found}
    if len(row.samplings) < 2 or len(used) != 1:
        return row.label
    ((steps, guidance),) = used
    return f"teacher at equal cost, {steps} steps " + (
        "without guidance" if guidance == 1 else f"with guidance {guidance:g}"
    )


def _figures(found: Sequence[dict[str, Any]]) -> dict[str, Spread | None]:
    evaluations = [each["evaluation"] for each in found]
    clips = [each["clip"] or {} for each in evaluations]
    minutes = [None if each["training_seconds"] is None else each["training_seconds"] / 60 for each in found]
    return {
        "score": _spread([each["overall"] for each in evaluations]),
        "clip": _spread([each.get("score") for each in clips]),
        "frechet": _spread([each.get("frechet") for each in clips]),
        "diversity": _spread([each["diversity"] for each in found]),
        "evaluations": _same([each["evaluations"] for each in evaluations]),
        "seconds_per_picture": _spread([each["seconds_per_picture"] for each in evaluations]),
        "training_minutes": _spread(minutes),
    }


def _spread(values: Sequence[float | None]) -> Spread | None:
    """None for no value, or for any that is missing."""
    known = tuple(float(value) for value in values if value is not None)
    return Spread(known) if known and len(known) == len(values) else None


def _same(values: Sequence[float]) -> Spread | None:
    """A figure that no seed changes, once."""
    return Spread((float(values[0]),)) if len(set(values)) == 1 else _spread(values)


def markdown(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The table, and the notes under it."""
    rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
    grid = [list(HEADINGS), rule, *(line.cells() for line in lines)]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in grid), "", *notes]) + "\n"


def conditions(preset: str, limit: int | None, records: Sequence[dict[str, Any]]) -> list[str]:
    """How the figures were made."""
    lines = [
        f"Preset `{preset}`. Mean over the seeds, in brackets the lowest and the highest. Strict score, judge and "
        "distance from `rtdmd eval shapes`; diversity is the mean cosine distance of two pictures of a prompt."
    ]
    if limit is not None:
        lines.append(f"Limited to {limit} prompts: not comparable with the whole benchmark.")
    made = sorted({f"{each['evaluation']['device']}, {each['evaluation']['dtype']}" for each in records})
    versions = sorted({str(each["version"]) for each in records})
    machines = sorted({name for each in records for name in each.get("machines", ["a machine not recorded"])})
    if records:
        lines.append(f"Evaluated on {' and '.join(made)}, one CPU thread; rtdmd {' and '.join(versions)}.")
        lines += _formats(records)
        lines.append(
            f"Times are those of {' and '.join(machines)}. Minutes of training depend on its threads and on what else it "
            "did: they do not compare rows."
        )
    return lines


def _formats(records: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on the formats of training's matrix products, where there are trainings among the cells."""
    kinds = {"distill": "stage 1", "tune-reward": "stage 2"}
    found: dict[str, set[str]] = {}
    for each in records:
        kind = each["settings"]["training"]["kind"]
        if kind in kinds:  # cells that don't tell are from the time when all were in float32
            found.setdefault(kinds[kind], set()).update(each.get("products") or ["float32"])
    parts = [f"{stage} in {' and '.join(sorted(formats))}" for stage, formats in sorted(found.items())]
    return [f"Matrix products of the trainings: {', '.join(parts)}."] if parts else []


def missing(lines: Sequence[Line]) -> list[str]:
    """Names of the rows that lack a seed."""
    return [line.row.name for line in lines if line.done < line.planned]


def missing_note(lines: Sequence[Line], command: str) -> str:
    """What is missing, and the command that fills it in."""
    parts = [
        f"{line.row.name} ({line.planned - line.done} of {line.planned})"
        for line in lines
        if line.done < line.planned
    ]
    if not parts:
        return "Nothing is missing."
    only = "" if len(parts) == len(lines) else f" --only {','.join(missing(lines))}"
    return f"Missing: {', '.join(parts)}. Fill in with: {command}{only}"
