"""The strict score by row as an SVG file: a dot for the mean, small dots for the seeds, a line for their range."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rtdmd_cli.engine.report.charts import CHART_CSS, format_number
from scripts.reproduce.table import NOT_RUN, Line, Spread

WIDTH, LEFT, RIGHT = 920, 540, 60  # px; LEFT holds the labels, RIGHT the values
TOP, STEP, BOTTOM = 40, 26, 44  # px; STEP from row to row
TICKS = 5
LONGEST = 76  # characters of a label

STYLE = """
svg { font-family: system-ui, sans-serif; background: transparent; }
.chart .muted { fill: var(--axis); font-style: italic; }
.chart .label { fill: var(--ink); }
.chart line.range { stroke: var(--series-0); stroke-width: 3; opacity: .45; stroke-linecap: round; }
.chart .seed { fill: var(--series-0); opacity: .45; }
.chart .mean { fill: var(--series-0); }
"""


def score_chart(lines: Sequence[Line]) -> str:
    """The SVG of a dot chart of the strict score, 0..1 or from a round number below the lowest value."""
    spreads = [line.figures["score"] for line in lines]
    values = [value for spread in spreads if spread for value in spread.values]
    low = max(0.0, int(min(values) * 10 - 0.5) / 10) if values else 0.0
    bottom = TOP + STEP * len(lines)

    def at(value: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * (value - low) / (1 - low)

    body = []
    for tick in (low + (1 - low) * step / TICKS for step in range(TICKS + 1)):
        x = at(tick)
        body.append(
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom - STEP / 2:.1f}"/>'
        )
        body.append(_text(x, bottom + 6, format_number(round(tick, 3)), "middle"))
    body.append(_text(WIDTH - RIGHT, bottom + 24, "strict score", "end"))
    for index, (line, spread) in enumerate(zip(lines, spreads, strict=True)):
        y = TOP + STEP * index
        label = line.label if len(line.label) <= LONGEST else line.label[: LONGEST - 1] + "…"
        body.append(_text(LEFT - 12, y + 4, label, "end", "label"))
        if spread is None:
            body.append(_text(LEFT + 6, y + 4, line.failure or NOT_RUN, "start", "muted"))
            continue
        body += [_marks(spread, [at(value) for value in spread.values], y)]
        body.append(_text(WIDTH, y + 4, f"{spread.record()['mean']:.3f}", "end", "value"))
    return _svg(lines, spreads, "".join(body), bottom + BOTTOM)


def _marks(spread: Spread, places: Sequence[float], y: float) -> str:
    middle = sum(places) / len(places)
    several = len(spread.values) > 1
    line = f'<line class="range" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="{y}" y2="{y}"/>'
    dots = "".join(f'<circle class="seed" cx="{x:.1f}" cy="{y}" r="3"/>' for x in places)
    return (line + dots if several else "") + f'<circle class="mean" cx="{middle:.1f}" cy="{y}" r="5"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(lines: Sequence[Line], spreads: Sequence[Spread | None], body: str, height: float) -> str:
    told = "; ".join(
        f"{line.label}: {spread.text(3) if spread else line.failure or NOT_RUN}"
        for line, spread in zip(lines, spreads, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {WIDTH} {height:.0f}">'
        f"<title>Strict score of the shapes world</title><desc>{escape(told)}</desc>"
        f"<style>{CHART_CSS}{STYLE}</style>"
        f'<text class="title" x="0" y="16">Strict score of the shapes world</text>{body}</svg>\n'
    )
