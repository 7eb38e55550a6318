"""Two runs on one self-contained page: their curves in the same charts, their sample grids side by side.

The page takes plain data (`Comparison`), which `run_compare` reads from the run folders. All text is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rtdmd_cli.engine.report.charts import Series, line_chart
from rtdmd_cli.engine.report.html import CURVES, NO_CURVE, metrics_series
from rtdmd_cli.engine.report.metrics import explained
from rtdmd_cli.engine.report.page import Cell, Picture, Table, figure_html, page, table_html
from rtdmd_cli.engine.storage.files import remove_leftovers, write_text

EARLIER_GRIDS = 8  # steps that both runs have, at most, below the newest grids


@dataclass(frozen=True)
class Side:
    """One of the runs. label: its name on the page. facts: one cell for each of `Comparison.facts`.

    metrics: the rows of metrics.jsonl. grids: by step, rising. problem: what is damaged, or "".
    """

    label: str
    facts: Sequence[Cell]
    metrics: Sequence[Mapping[str, object]]
    grids: Mapping[int, Picture]
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything on the page. facts: names of the rows; settings: (key, left, right) where the presets differ."""

    left: Side
    right: Side
    facts: Sequence[str]
    settings: Sequence[tuple[str, str, str]]
    settings_note: str = ""
    unit: str = "iteration"

    @property
    def sides(self) -> tuple[Side, Side]:
        """Left and right."""
        return self.left, self.right


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page atomically. Raises EnvironmentFailure when the disk refuses."""
    remove_leftovers(path.parent, name=path.name)
    write_text(path, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The whole page. The same data gives the same text."""
    left, right = comparison.sides
    columns = ("", left.label, right.label)
    facts = list(zip(comparison.facts, left.facts, right.facts, strict=True))
    settings = Table("Settings that differ", columns, comparison.settings, comparison.settings_note)
    no_settings = (
        f'<p class="note">{escape(comparison.settings_note)}</p>' if comparison.settings_note else ""
    )
    sections = [
        ("runs", "The runs", _problems(comparison) + table_html(Table("At a glance", columns, facts))),
        ("samples", "Samples", _samples(comparison)),
        ("curves", "Curves", _curves(comparison)),
        ("settings", "Settings", table_html(settings) if comparison.settings else no_settings),
    ]
    present = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in present)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>\n'
        for anchor, heading, content in present
    )
    return page(f"{left.label} and {right.label}", f'<nav aria-label="Sections">{links}</nav>\n{body}')


def _problems(comparison: Comparison) -> str:
    return "".join(
        f'<p class="note"><strong>{escape(side.label)}</strong> is damaged: {escape(side.problem)}</p>'
        for side in comparison.sides
        if side.problem
    )


def _samples(comparison: Comparison) -> str:
    """The newest grid of each run; steps that both have fold away below, newest first."""
    left, right = comparison.sides
    if not left.grids and not right.grids:
        return ""
    newest = _pair(
        [side.grids[max(side.grids)] if side.grids else None for side in (left, right)], comparison
    )
    last = {max(side.grids) for side in comparison.sides if side.grids}
    common = sorted((left.grids.keys() & right.grids.keys()) - (last if len(last) == 1 else set()))
    shown = common[-EARLIER_GRIDS:][::-1]
    if not shown:
        return newest
    pairs = "".join(
        f"<h3>Step {step}</h3>{_pair([s.grids[step] for s in (left, right)], comparison)}" for step in shown
    )
    count = f"{len(shown)}" + (f" of {len(common)}" if len(shown) < len(common) else "")
    return f"{newest}<details><summary>At equal steps ({count})</summary>{pairs}</details>"


def _pair(pictures: Sequence[Picture | None], comparison: Comparison) -> str:
    cells = []
    for side, picture in zip(comparison.sides, pictures, strict=True):
        if picture is None:
            cells.append(f'<div><p class="note">{escape(side.label)} has no sample grid.</p></div>')
        else:
            named = Picture(picture.path, f"{side.label}: {picture.caption}")
            cells.append(f"<div>{figure_html(named)}</div>")
    return f'<div class="figures">{"".join(cells)}</div>'


def _curves(comparison: Comparison) -> str:
    """A chart for each metric, with a line for each run that has it: the known ones first, others fold away."""
    series = [metrics_series(side.metrics) for side in comparison.sides]
    labels = [side.label for side in comparison.sides]

    def chart(title: str, name: str, log: bool = False) -> str:
        lines = [
            Series(label, *found[name]) for label, found in zip(labels, series, strict=True) if name in found
        ]
        return line_chart(title, lines, comparison.unit, log=log)

    names = (series[0].keys() | series[1].keys()) - NO_CURVE
    charts = ""
    for curve in CURVES:
        for name, label in curve.metrics.items():
            if name in names:
                title = curve.title if len(curve.metrics) == 1 else f"{curve.title}: {label}"
                charts += f"<div>{chart(title, name, curve.log)}<p>{escape(curve.reading)}</p></div>"
    known = {name for curve in CURVES for name in curve.metrics}
    text = f'<div class="charts">{charts}</div>' if charts else ""
    others = "".join(
        f"<div>{chart(name, name)}<p>{escape(explained(name))}</p></div>" for name in sorted(names - known)
    )
    if others:
        text += f'<details open><summary>Other metrics</summary><div class="charts">{others}</div></details>'
    return text
