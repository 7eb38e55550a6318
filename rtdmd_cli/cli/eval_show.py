"""What `rtdmd eval` shows people: the list of benchmarks, and an evaluation's table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import typer

from rtdmd_cli.cli import console

PIPED_WIDTH = 160  # columns, where no terminal says how wide it is


def show_benchmarks(as_json: bool, quiet: bool) -> None:
    """The benchmarks on stdout, as a table or one JSON list."""
    from rich.table import Table

    from rtdmd_cli.engine.evaluation.benchmarks import BENCHMARKS

    if as_json:
        rows = [
            dataclasses.asdict(row) | {"built_in": row.built_in, "prompts": row.prompts}
            for row in BENCHMARKS.values()
        ]
        typer.echo(json.dumps([console.plain(row) for row in rows], indent=2))
        return
    table = Table("benchmark", "measures", "prompts", "pictures each", "judged by")
    table.columns[0].no_wrap = True
    for row in BENCHMARKS.values():
        judged = ", ".join([row.judge] if row.judge else row.rewards)
        images = "the preset's" if row.images is None else str(row.images)
        table.add_row(row.name, row.measures, f"{row.prompts:,}", images, judged)
    _print(table, err=False)
    console.say("Any prompt file can be one: rtdmd eval prompts.txt --rewards clipscore", quiet)


def show_table(summary: Mapping[str, Any], err: bool) -> None:
    """The summary for people, on stderr or stdout."""
    from rich.console import Console

    screen = Console(stderr=err, highlight=False, markup=False)
    title = f"benchmark {summary['benchmark']}, model {summary['model']}"
    screen.print(console.printable(title), soft_wrap=True)
    if "tasks" in summary:
        _shapes_table(summary, err)
    else:
        _figure_table(summary, err)
    for line in (*_notes(summary), *_cost(summary), *_comparison(summary)):
        screen.print(console.printable(line), soft_wrap=True)


def _shapes_table(summary: Mapping[str, Any], err: bool) -> None:
    from rich.table import Table

    table = Table("task")
    for heading in ("strict score", "prompts"):
        table.add_column(heading, justify="right")
    evaluated = {task: counts["evaluated"] for task, counts in summary["prompts"].items()}
    for task, score in summary["tasks"].items():
        table.add_row(task, "-" if score is None else f"{score:.3f}", str(evaluated[task]))
    table.add_section()
    table.add_row("overall", f"{summary['overall']:.3f}", str(sum(evaluated.values())))
    _print(table, err, widen=False)


def _figure_table(summary: Mapping[str, Any], err: bool) -> None:
    """One row a figure, then the groups, then the published figures of the same measures."""
    from rich.table import Table

    table = Table("figure")
    for heading in ("value", "95% interval", "prompts"):
        table.add_column(heading, justify="right")
    for row in summary["figures"]:
        name = row["name"]
        table.add_row(f"{name} (trained on)" if row["trained_on"] else name, *_cells(row))
    for part in summary["breakdowns"]:
        table.add_section()
        for row in part["rows"]:
            table.add_row(console.printable(f"  {row['label']}"), *_cells(row))
    published = summary["published"]
    if published:
        table.add_section()
        for row in published["rows"]:
            for name, value in row["figures"].items():
                table.add_row(f"published, {row['model']}: {name}", f"{value:.4f}", "", "")
    _print(table, err)


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = row["interval"]
    return f"{row['value']:.4f}", f"{low:.4f} to {high:.4f}", str(row["prompts"])


def _notes(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    if "tasks" in summary:
        low, high = summary["interval"]
        lines.append(f"95% interval of overall: {low:.3f} to {high:.3f}")
    published = summary["published"]
    if published:
        lines.append(f"published: {published['source']}. {published['note']}".strip())
    if summary["trained_on"]:
        lines.append(f"trained on: {', '.join(summary['trained_on'])}; such a figure is no held-out measure")
    return lines


def _comparison(summary: Mapping[str, Any]) -> list[str]:
    """One line a judge: both figures, their difference with its interval, and who wins."""
    compare = summary.get("compare")
    if compare is None:
        return []
    other = compare["other"]
    lines = [f"compared with {other['model']}, {other['steps']} steps; equal prompts and seeds"]
    for pair in compare["pairs"]:
        (low, high), (win_low, win_high) = pair["interval"], pair["win_interval"]
        lines.append(
            f"{pair['label']}: {pair['here']:.4f} against {pair['there']:.4f}, difference "
            f"{pair['difference']:+.4f} (95%: {low:+.4f} to {high:+.4f}); wins {pair['win_rate']:.1%} "
            f"({win_low:.1%} to {win_high:.1%}): {pair['wins']} won, {pair['ties']} equal, {pair['losses']} lost"
        )
    return lines + ([compare["stamp"]] if compare["stamp"] else [])


def _cost(summary: Mapping[str, Any]) -> list[str]:
    lines = [_making(summary)]
    if summary["departures"]:
        lines.append(f"departs from the benchmark, so not comparable: {'; '.join(summary['departures'])}")
    if "extra_objects" in summary:
        lines.append(f"more objects than asked for in {summary['extra_objects']:.1%} of the pictures")
    if "clip" in summary:
        lines += _clip(summary["clip"])
    for each in summary["failures"][:3]:
        pictures = "1 picture" if each["pictures"] == 1 else f"{each['pictures']} pictures"
        lines.append(f"failed: {each['reason']} ({pictures})")
    return lines


def _making(summary: Mapping[str, Any]) -> str:
    pictures, seconds = f"{summary['images']} pictures", f"{summary['seconds']:.1f} s in all"
    if summary["steps"] is None:
        return f"{pictures}, made elsewhere; {seconds}"
    pace = summary["seconds_per_picture"]
    cost = "" if pace is None else f" and {pace:.3g} s"
    return (
        f"{summary['steps']} steps, {summary['evaluations']} evaluations{cost} a picture; "
        f"guidance {summary['guidance']:g}; {pictures}, seed {summary['seed']}, {seconds}"
    )


def _clip(clip: Mapping[str, Any] | None) -> list[str]:
    if clip is None:
        return []
    real_score = f"rendered pictures: {clip['score_of_rendered']:.4f}"
    lines = [f"shapes-clip of the independent judge {clip['score']:.4f} ({real_score})"]
    if clip["frechet"] is not None:
        ours, real = clip["frechet_pictures"]
        lines.append(
            f"Frechet distance of its features {clip['frechet']:.4f} "
            f"(floor {clip['frechet_floor']:.4f}), {ours} pictures against {real} rendered"
        )
    if clip["diversity"] is not None:
        lines.append(f"diversity within a prompt {clip['diversity']:.4f} (mean cosine distance)")
    return lines


def _print(table: Any, err: bool, widen: bool = True) -> None:
    from rich.console import Console

    screen = Console(stderr=err, highlight=False, markup=False)
    if widen and not screen.is_terminal:
        screen.width = PIPED_WIDTH
    screen.print(table)
