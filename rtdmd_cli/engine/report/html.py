"""report.html: one self-contained page that says how a run goes, and how it went. Nothing is loaded from anywhere.

The page of a run that lives has one small script, which reads the page anew; a run that is over has none.

The page takes plain data (`RunReport`); who reads the run folder decides what goes in. All text is escaped,
pictures are data URIs, and the content security policy forbids everything else.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Literal

from rtdmd_cli.engine.report.charts import Series, format_number, line_chart
from rtdmd_cli.engine.report.metrics import explained
from rtdmd_cli.engine.report.page import (
    Picture,
    Table,
    facts_html,
    figure_html,
    format_duration,
    page,
    pairs_html,
    table_html,
)
from rtdmd_cli.engine.storage.files import write_text

OPEN_GRIDS = 1  # grids shown at once; older ones unfold
MAX_GRIDS = 16  # embedded at most, spread evenly over the run, to keep the file small enough to send
RELOAD_SECONDS = 60  # of a live page
PATIENCE = 900  # s without news after which a live page says that its run may have died, where an iteration takes less
NO_CURVE = frozenset({"time", "seconds", "left_out"})  # clocks among the metrics, and rare events

Points = tuple[Sequence[float], Sequence[float]]
Status = Literal["finished", "interrupted", "failed", "running"]
STATUS_WORDS: dict[str, str] = {
    "finished": "The run finished",
    "interrupted": "The run was interrupted",
    "failed": "The run failed",
    "running": "The run is under way",
}


@dataclass(frozen=True)
class Live:
    """A run that goes on: when the page was written (UTC), the seconds left, and the seconds of an iteration, if known."""

    written: datetime
    seconds_left: float | None = None
    seconds_each: float | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything on the page. `metrics` are the rows of metrics.jsonl: a number for each name, and
    "iteration"."""

    title: str
    status: Status
    iterations: int
    target_iterations: int
    seconds: float
    verdict: str = ""  # opens the page: what came out, in a sentence or two
    warning: str = ""  # set apart, above all else
    facts: Sequence[tuple[str, str]] = ()  # model, sampler, learning rates, ...
    tables: Sequence[Table] = ()
    metrics: Sequence[Mapping[str, object]] = ()
    curves: Sequence["Curve"] = ()  # the stage's own, which come first
    grids: Sequence[Picture] = ()  # oldest first
    health: Picture | None = None
    lag: Mapping[str, Points] = field(default_factory=dict)  # name: (iterations, distances)
    preset_yaml: str = ""
    environment: Sequence[tuple[str, str]] = ()
    command: str = ""
    unit: str = "iteration"  # what the run counts: "iteration" or "epoch"
    live: Live | None = None  # None for a run that is over


@dataclass(frozen=True)
class Curve:
    """One chart of the page: metric names with their labels in it, and how to read it."""

    title: str
    metrics: Mapping[str, str]
    reading: str
    log: bool = False


CURVES = (
    Curve(
        "Reward back-propagation",
        {"hinge_loss": "hinge"},
        "Falls while the differentiable rewards rise; flat at zero once they all reach the margin.",
    ),
    Curve(
        "Tilt of distribution matching",
        {"tilt_effective": "effective share of the pictures"},
        "Near 1 the rewards hardly tilt what the fake score is fitted to; near 0 a few poor pictures decide it.",
    ),
    Curve(
        "Drift of the log-probability",
        {"drift": "drift"},
        "Between rollout and update, the same weights: anything but a tiny value is a fault.",
        log=True,
    ),
    Curve(
        "Fake-score loss",
        {"fake_loss": "fake score"},
        "Settles, but does not reach zero: the noise in its target cannot be predicted.",
    ),
    Curve(
        "DMD loss",
        {"dmd_loss": "generator"},
        "How far teacher and fake score disagree about the generator’s samples.",
    ),
    Curve(
        "Consistency",
        {"consistency_loss": "consistency"},
        "An unbiased estimate of a square: single values may be negative, the mean should be close to zero.",
    ),
    Curve(
        "Gradient norms, before clipping",
        {"fake_grad_norm": "fake score", "generator_grad_norm": "generator"},
        "Steady is good; a lasting rise announces trouble.",
        log=True,
    ),
    Curve(
        "Learning rates",
        {"learning_rate/fake": "fake score", "learning_rate/generator": "generator"},
        "As the preset's warm-up and decay have them.",
    ),
    Curve(
        "GPU memory",
        {"memory_gib": "GiB"},
        "The most that this process has held so far, GiB.",
    ),
    Curve(
        "Speed, per second",
        {"iterations_per_second": "iterations or epochs a second"},
        "A lasting fall means that something else takes the machine, or that memory runs short.",
    ),
)

HEALTH_READING = (
    "How to read it: the fake score’s picture should look like the generator’s beside it; where it looks like "
    "the teacher’s instead, or like neither, the fake score lags behind, and a higher "
    "distill.fake_per_generator or distill.fake_lr helps. With tune_reward.tilt the fake score leans to poor pictures "
    "on purpose."
)

LAG_READING = (
    "Distance of the fake score’s prediction (lag) and of the teacher’s (lag_teacher) from the generator’s own samples. "
    "A level line means that it keeps up; a rising one, that the generator runs away from it. With tune_reward.tilt a "
    "part of it is on purpose."
)


def write_report(path: Path, report: RunReport) -> None:
    """Write the page atomically. Raises EnvironmentFailure when the disk refuses."""
    write_text(path, render_report(report))


def render_report(report: RunReport) -> str:
    """The whole page. The same data gives the same text."""
    series = metrics_series(report.metrics)
    lag = report.lag or {name: points for name, points in series.items() if name.startswith("lag")}
    sections = [
        ("results", "Results", "".join(table_html(table) for table in report.tables)),
        ("samples", "Samples", _samples(report.grids)),
        (
            "curves",
            "Curves",
            _curves(
                {name: series[name] for name in series.keys() - lag.keys() - NO_CURVE},
                report.curves,
                report.unit,
            ),
        ),
        ("health", "Health of the fake score", _health(report.health, lag, report.unit)),
        ("settings", "Settings", _settings(report)),
    ]
    present = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in present)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>\n'
        for anchor, heading, content in present
    )
    warning = f'<p class="warning" role="alert">{escape(report.warning)}</p>' if report.warning else ""
    live = live_html(report.live, report.unit) if report.live else ""
    answer = f'{live}{warning}<p class="lead">{_answer(report, series, lag)}</p>{facts_html(report.facts)}'
    content = f'{answer}<nav aria-label="Sections">{links}</nav>\n{body}'
    return page(report.title, content, LIVE_CSS if live else "", RELOAD if live else "")


LIVE_CSS = """
.live { border-left: 4px solid var(--link); background: var(--panel); padding: .75rem 1rem; margin-bottom: 1.25rem; }
"""
RELOAD = """
(() => {
  const key = "rtdmd " + location.pathname, live = document.getElementById("live");
  const folds = [...document.querySelectorAll("details")];
  try {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    if (kept) {
      history.scrollRestoration = "manual";
      folds.forEach((fold) => { fold.open = kept.open.includes(fold.firstElementChild.textContent.split(" (")[0]); });
      scrollTo(0, kept.y);
    }
  } catch { /* no storage: the browser restores the scroll position by itself */ }
  const keep = () => {
    const open = folds.filter((fold) => fold.open).map((fold) => fold.firstElementChild.textContent.split(" (")[0]);
    try { sessionStorage.setItem(key, JSON.stringify({ y: scrollY, open })); } catch { /* as above */ }
  };
  addEventListener("pagehide", keep);
  const look = () => {
    if (Date.now() > Number(live.dataset.until)) document.getElementById("stale").hidden = false;
    if (document.visibilityState === "visible") { keep(); location.reload(); }
  };
  setInterval(look, Number(live.dataset.reload));
})();
"""
"""Reads a live page anew, keeping the scroll position and what is unfolded; says when there has been no news."""


LIVE = '<div class="live" id="live"'
_SCRIPT = re.compile(r"<script>.*?</script>\n(?=</body>)", re.DOTALL)
_SCRIPT_POLICY = re.compile("; script-src 'sha256-[^']*'")


def ended_page(page: str, words: str) -> str:
    """The page of a run that goes on as that of one that has ended; any other page stays as it is.

    words: how it ended, a sentence without its full stop. Figures and curves are those of the page.
    """
    before, live, rest = page.partition(LIVE)
    if not live:
        return page
    text = _SCRIPT.sub("", before + rest.partition("</div>")[2])
    told = f"{words}. When this page was written: <strong>"
    return _SCRIPT_POLICY.sub("", text, count=1).replace(f"{STATUS_WORDS['running']}: <strong>", told, 1)


def live_html(live: Live, unit: str) -> str:
    """That the run goes on, the time left, and, hidden until then, that it may have died."""
    left = (
        ""
        if live.seconds_left is None
        else f", about <strong>{format_duration(live.seconds_left)}</strong> left"
    )
    each = "" if live.seconds_each is None else f", {format_duration(live.seconds_each)} an {unit}"
    patience = max(PATIENCE, 3 * (live.seconds_each or 0))
    until = round(1000 * (live.written.timestamp() + patience))
    return (
        f'{LIVE} data-until="{until}" data-reload="{1000 * RELOAD_SECONDS}" role="status">'
        f"The run goes on{left}{each if live.seconds_each and live.seconds_each >= 1 else ''}. "
        f"Written {live.written:%Y-%m-%d %H:%M:%S} UTC; this page reads itself anew every {RELOAD_SECONDS} s. "
        f'<strong id="stale" hidden>No news for {format_duration(patience)}: the run may have been killed. '
        "See: rtdmd runs list</strong></div>"
    )


def metrics_series(rows: Sequence[Mapping[str, object]]) -> dict[str, tuple[list[float], list[float]]]:
    """For each metric name its (iterations, values), in the order of first appearance.

    Rows without a numeric "iteration", and values that are no finite numbers (a generator's loss is absent
    where only the fake score moved), are left out.
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        iteration = _number(row.get("iteration"))
        if iteration is None:
            continue
        for name, value in row.items():
            number = _number(value)
            if number is not None and name != "iteration":
                x, y = series.setdefault(name, ([], []))
                x.append(iteration)
                y.append(number)
    return series


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _answer(report: RunReport, series: Mapping[str, Points], lag: Mapping[str, Points]) -> str:
    """How it went, in one paragraph, with the key figures in it."""
    target = report.target_iterations
    done = f"{report.iterations:,}" + (f" of {target:,}" if report.iterations != target else "")
    speed = f" ({format_number(report.iterations / report.seconds)} a second)" if report.seconds > 0 else ""
    sentences = [escape(report.verdict)] if report.verdict else []
    sentences.append(
        f"{STATUS_WORDS[report.status]}: <strong>{done}</strong> {report.unit}s in "
        f"<strong>{format_duration(report.seconds)}</strong>{speed}."
    )
    for name, words in (("fake_loss", "fake-score loss"), ("dmd_loss", "DMD loss")):
        if name in series:
            y = series[name][1]
            tenth = max(1, len(y) // 10)
            sentences.append(_change(f"The {words}", _mean(y[:tenth]), _mean(y[-tenth:]), len(y) > 1))
    y = lag["lag"][1] if "lag" in lag else ()
    if y:
        sentences.append(_change("The fake score’s lag", y[0], y[-1], len(y) > 1))
    return " ".join(sentences)


def _change(what: str, first: float, last: float, moved: bool) -> str:
    if not moved:
        return f"{what} is <strong>{format_number(last)}</strong>."
    before, after = format_number(first), format_number(last)
    if before == after:
        return f"{what} stayed at <strong>{after}</strong>."
    return f"{what} went from {before} to <strong>{after}</strong>."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _samples(grids: Sequence[Picture]) -> str:
    """Newest first: the last grid open, the earlier ones folded away."""
    if not grids:
        return ""
    shown = [grids[index] for index in _spread(len(grids), MAX_GRIDS)][::-1]
    figures = [figure_html(picture) for picture in shown]
    text = f'<div class="figures">{"".join(figures[:OPEN_GRIDS])}</div>'
    if len(figures) > OPEN_GRIDS:
        count = f"{len(figures) - OPEN_GRIDS}"
        if len(shown) < len(grids):
            count += f" of {len(grids) - OPEN_GRIDS}"
        earlier = f'<div class="figures">{"".join(figures[OPEN_GRIDS:])}</div>'
        text += f"<details><summary>Earlier in the run ({count})</summary>{earlier}</details>"
    return text


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices of 0..count-1, evenly spaced, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]


def _curves(series: Mapping[str, Points], first: Sequence[Curve] = (), unit: str = "iteration") -> str:
    """The known curves, each with its reading, after those of `first`; metrics without one fold away below."""
    charts, curves = [], (*first, *CURVES)
    for curve in curves:
        lines = [Series(label, *series[name]) for name, label in curve.metrics.items() if name in series]
        if lines:
            charts.append(
                f"<div>{line_chart(curve.title, lines, unit, log=curve.log)}<p>{escape(curve.reading)}</p></div>"
            )
    text = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    known = {name for curve in curves for name in curve.metrics}
    others = "".join(
        f"<div>{line_chart(n, [Series(n, *series[n])], unit)}<p>{escape(explained(n))}</p></div>"
        for n in sorted(series.keys() - known)
    )
    if others:
        text += f'<details><summary>Other metrics</summary><div class="charts">{others}</div></details>'
    return text


def _health(picture: Picture | None, lag: Mapping[str, Points], unit: str) -> str:
    """The panel of fixed points and the lag beside it."""
    reading, parts = "", ""
    if picture is not None:
        reading = f"<p>{escape(HEALTH_READING)}</p>"
        parts += figure_html(picture)
    if lag:
        chart = line_chart("Lag", [Series(name, *points) for name, points in lag.items()], unit)
        parts += f"<div>{chart}<p>{escape(LAG_READING)}</p></div>"
    return f'{reading}<div class="figures">{parts}</div>' if parts else ""


def _settings(report: RunReport) -> str:
    parts = []
    if report.command:
        parts.append(f'<h3>Command</h3><pre class="command">{escape(report.command)}</pre>')
    if report.preset_yaml:
        yaml = escape(report.preset_yaml)
        parts.append(f"<details><summary>Preset, with every value</summary><pre>{yaml}</pre></details>")
    if report.environment:
        table = pairs_html(report.environment)
        parts.append(f"<details><summary>Environment</summary>{table}</details>")
    return "".join(parts)
