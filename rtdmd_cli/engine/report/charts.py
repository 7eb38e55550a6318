"""Small line charts as inline SVG, without a script, a font or anything else from outside.

A chart is one string for an HTML page that carries `CHART_CSS` once. Lengths are SVG user units, about CSS
pixels on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 420, 250
RIGHT, BOTTOM = 10, 36
TITLE_SIZE, TEXT_SIZE = 15, 12.5
CHARACTER = 0.56 * TEXT_SIZE  # mean width of a character of a system font; SVG cannot measure text
MAX_POINTS = 400  # drawn of one line; more would lie closer than a pixel
HUGE = 1e30  # no value beyond it, and none below 1e-30 on a logarithmic axis, is drawn
SPARSE = 40  # series with fewer points are drawn point by point, without smoothing

CHART_CSS = """
:root { --grid: #e4e4e0; --axis: #62666e; --ink: #222428;
  --series-0: #2563a8; --series-1: #b4501c; --series-2: #1b7f63; --series-3: #7a4fa3; --series-4: #8a6d00; }
@media (prefers-color-scheme: dark) {
  :root { --grid: #2e3136; --axis: #a2a7b0; --ink: #e8e8e5;
    --series-0: #7db4ec; --series-1: #f0a070; --series-2: #62cba9; --series-3: #c0a0e6; --series-4: #dcc25a; }
}
.chart { display: block; width: 100%; height: auto; font-family: inherit; }
.chart text { fill: var(--axis); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.chart .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.chart .value { fill: var(--ink); }
.chart .rule { stroke: var(--grid); stroke-width: 1; }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: .28; }
.chart circle { stroke: none; }
.chart .s0 { stroke: var(--series-0); } .chart circle.s0 { fill: var(--series-0); }
.chart .s1 { stroke: var(--series-1); stroke-dasharray: 7 4; } .chart circle.s1 { fill: var(--series-1); }
.chart .s2 { stroke: var(--series-2); stroke-dasharray: 2 4; } .chart circle.s2 { fill: var(--series-2); }
.chart .s3 { stroke: var(--series-3); stroke-dasharray: 9 3 2 3; } .chart circle.s3 { fill: var(--series-3); }
.chart .s4 { stroke: var(--series-4); stroke-dasharray: 4 2; } .chart circle.s4 { fill: var(--series-4); }
.chart .raw { stroke-dasharray: none; }
"""
STYLES = 5
MAX_DIGITS = 13  # of a tick: beyond, its exact value

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: `x` rising, `y` as long. Points that are not finite, or beyond 1e30, are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """Values `low`..`high` onto positions `start`..`end`, with labelled ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        """The position of a value; one outside the axis sits on its end."""
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_chart(
    title: str, series: Sequence[Series], x_label: str = "iteration", y_label: str = "", log: bool = False
) -> str:
    """The SVG of one chart: each series a faint raw line under a smoothed one, or points when it has few.

    log: logarithmic y axis; values of 0 and less are left out. The y axis covers the smoothed lines and all
    but the most extreme hundredth of the raw values at each end; raw values beyond it are drawn on its edge.
    Raises ValueError for a series whose x and y differ in length.
    """
    lines = [_points(item, log) for item in series]
    if not any(lines):
        return _empty(title)
    smooth = [_smoothed(points) for points in lines]
    y_values = [value for pair in zip(lines, smooth, strict=True) for value in _relevant(*pair)]
    y_low, y_high, y_ticks = _log_scale(y_values) if log else _linear_scale(y_values, 5)
    x_low, x_high, x_ticks = _linear_scale([x for points in lines for x, _ in points], 5, tight=True)

    names, top = _legend(series, smooth)
    top += 14 if y_label else 0
    left = 14 + CHARACTER * max(len(label) for label in tick_labels(y_ticks))
    x_axis = _Axis(x_low, x_high, left, WIDTH - RIGHT, x_ticks)
    y_axis = _Axis(y_low, y_high, HEIGHT - BOTTOM, top, y_ticks, log)

    body = [names, _axes(x_axis, y_axis, x_label, y_label)]
    for index, (points, line) in enumerate(zip(lines, smooth, strict=True)):
        body.append(_draw_series(points, line, x_axis, y_axis, f"s{index % STYLES}"))
    return _svg(title, _description(series, smooth, x_label), "".join(body))


def format_number(value: float, digits: int = 3) -> str:
    """Three significant digits, or `digits`, for a person: 15,000, 2.41, 0.00120 as 0.0012, 1.2e-5."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e7 or size < 9.995e-4:
        number, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trimmed(number)}e{int(exponent)}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.0f}" if size >= 999.5 and digits == 3 else _trimmed(f"{value:,.{decimals}f}")
    return text.replace("-", "−")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, each with as many digits as it takes to tell them apart."""
    for digits in range(3, MAX_DIGITS):
        labels = [format_number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            return labels
    return [repr(tick) for tick in ticks]


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _points(series: Series, log: bool) -> list[Point]:
    if len(series.x) != len(series.y):
        raise ValueError(f"{series.label}: {len(series.x)} x values, {len(series.y)} y values")
    pairs = zip(series.x, series.y, strict=True)
    return [(x, y) for x, y in pairs if abs(x) < HUGE and abs(y) < HUGE and (y > 1 / HUGE or not log)]


def _smoothed(points: list[Point]) -> list[Point]:
    """Means of at most 400 buckets, then a Gaussian-weighted mean over the neighbours (sigma: a fortieth of
    the line). A single spike would leave a hump, so the most extreme hundredth at each end counts as the
    value next to it. A line of few points, or of little noise, is not smoothed."""
    if len(points) <= SPARSE:
        return points
    low, high = _common_range(points)
    points = [(x, min(max(y, low), high)) for x, y in points]
    means = [_mean_point(bucket) for bucket in _buckets(points, MAX_POINTS)]
    if _is_calm(means):
        return means
    sigma = max(1.0, len(means) / 40)
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    result = []
    for i, (x, _) in enumerate(means):
        # Towards an end the window shrinks evenly, lest the line be bent there, but not to nothing.
        side = max(min(reach, i, len(means) - 1 - i), reach // 3)
        window = range(max(0, i - side), min(len(means), i + side + 1))
        near = [(weights[abs(j - i)], means[j][1]) for j in window]
        result.append((x, sum(w * y for w, y in near) / sum(w for w, _ in near)))
    return result


def _is_calm(points: list[Point]) -> bool:
    """Whether the line goes up and down so little (a schedule, say) that smoothing would only bend its
    corners."""
    y = [value for _, value in points]
    return sum(abs(b - a) for a, b in pairwise(y)) <= 3 * (max(y) - min(y))


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _buckets(points: list[Point], limit: int) -> list[list[Point]]:
    size = max(1, math.ceil(len(points) / limit))
    return [points[i : i + size] for i in range(0, len(points), size)]


def _thinned(points: list[Point]) -> list[Point]:
    """The raw line with at most 400 points or so: of each bucket the lowest and the highest, in their
    order."""
    thin: list[Point] = []
    for bucket in _buckets(points, MAX_POINTS // 2):
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        thin += sorted(ends)
    return thin


def _common_range(points: list[Point]) -> tuple[float, float]:
    """(low, high) of the y values without the most extreme hundredth at each end."""
    values = sorted(y for _, y in points)
    cut = len(values) // 100
    return values[cut], values[-1 - cut]


def _relevant(points: list[Point], smooth: list[Point]) -> list[float]:
    """The y values that the axis must cover."""
    return [*_common_range(points), *(y for _, y in smooth)] if points else []


def _linear_scale(
    values: Iterable[float], count: int, tight: bool = False
) -> tuple[float, float, list[float]]:
    """(low, high, ticks): about `count` ticks at 1, 2, 2.5 or 5 times a power of ten. The range ends at
    ticks, or with `tight` at the values; it starts at 0 when the values come near 0."""
    values = list(values)
    low, high = min(values), max(values)
    if low > 0 and low < 0.5 * high:
        low = 0.0
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < 1 / HUGE:
        pad = 0.1 * size if size > 1 / HUGE else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    if tight:
        return low, high, [tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step]
    return ticks[0], ticks[-1], ticks


def _log_scale(values: Iterable[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of a logarithmic axis: powers of ten, with 2 and 5 or more between them when they would be
    few, so that there are two at least."""
    values = list(values)
    low, high = min(values) / 1.15, max(values) * 1.15
    if high / low < 4:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 20 else steps
    stride = max(1, len(decades) // 6)
    ticks = [m * 10.0**d for d in decades if d % stride == 0 for m in steps]
    return low, high, [tick for tick in ticks if low <= tick <= high]


def _legend(series: Sequence[Series], smooth: list[list[Point]]) -> tuple[str, float]:
    """The legend under the title, wrapped, each name with its line's last value, and the y where the plot may
    start. One series alone needs none."""
    parts, x, y = [], 0.0, TITLE_SIZE + 20.0
    if len(series) == 1:
        return "", y
    for index, (item, points) in enumerate(zip(series, smooth, strict=True)):
        if not points:
            continue
        label, value = _shortened(item.label, int((WIDTH - 90) / CHARACTER)), format_number(points[-1][1])
        width = 26 + CHARACTER * (len(label) + 1 + len(value)) + 16
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + TEXT_SIZE + 6
        style = f"s{index % STYLES}"
        parts.append(f'<polyline class="{style}" points="{x + 1:.1f},{y - 4:.1f} {x + 20:.1f},{y - 4:.1f}"/>')
        number = f'<tspan class="value" dx="2">{value}</tspan>'
        parts.append(f'<text x="{x + 26:.1f}" y="{y:.1f}">{escape(label)} {number}</text>')
        x += width
    return "".join(parts), y + 18


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _axes(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick, label in zip(y_axis.ticks, tick_labels(y_axis.ticks), strict=True):
        y = y_axis.at(tick)
        parts.append(
            f'<line class="rule" x1="{x_axis.start:.1f}" x2="{x_axis.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(x_axis.start - 7, y + 4, label, "end"))
    below = y_axis.start + 18
    for tick, label in zip(x_axis.ticks, tick_labels(x_axis.ticks), strict=True):
        x = min(x_axis.at(tick), WIDTH - 1 - CHARACTER * len(label) / 2)
        parts.append(_text(x, below, label, "middle"))
    parts.append(_text(x_axis.end, below + 15, x_label, "end"))
    if y_label:
        parts.append(_text(2, y_axis.end - 11, y_label, "start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _draw_series(points: list[Point], line: list[Point], x_axis: _Axis, y_axis: _Axis, style: str) -> str:
    def place(some: list[Point]) -> list[Point]:
        return [(x_axis.at(x), y_axis.at(y)) for x, y in some]

    if len(points) <= SPARSE:
        dots = "".join(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in place(points)
        )
        return _polyline(place(line), style) + dots
    return _polyline(place(_thinned(points)), f"{style} raw") + _polyline(place(line), style)


def _polyline(points: list[Point], style: str) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _description(series: Sequence[Series], smooth: list[list[Point]], x_label: str) -> str:
    """What a reader who cannot see the chart is told: where each line starts and ends."""
    told = []
    for item, points in zip(series, smooth, strict=True):
        if points:
            (x0, y0), (x1, y1) = points[0], points[-1]
            told.append(
                f"{item.label}: {format_number(y0)} at {x_label} {format_number(x0)}, "
                f"{format_number(y1)} at {format_number(x1)}"
            )
    return "; ".join(told)


def _svg(title: str, description: str, body: str) -> str:
    shown = _shortened(title, int(WIDTH / (0.6 * TITLE_SIZE)))
    label = escape(f"{title}. {description}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f'<text class="title" x="0" y="{TITLE_SIZE}">{escape(shown)}</text>{body}</svg>'
    )


def _empty(title: str) -> str:
    return _svg(title, "no values", _text(WIDTH / 2, HEIGHT / 2, "no values", "middle"))
