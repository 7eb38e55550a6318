"""`rtdmd eval`: benchmarks. The table or JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli.counting import counting
from rtdmd_cli.cli.sample import MAX_SEED, Batch, Device, Dtype, From, Guidance, Json, Quiet, Steps, load_model, tell
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.evaluation.shapes import ShapesResult

BENCHMARKS = ("shapes",)
RESULTS, SAMPLES = "results.json", "samples.png"


def eval_command(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="shapes: the built-in world's held-out prompts.")],
    from_: From = None,
    steps: Steps = None,
    guidance: Guidance = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Pictures of each prompt. Default: the preset's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, evenly spread; the result says so.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise. Default: the preset's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write results.json and samples.png there; with results in it, OUT-2 is taken."),
    ] = None,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a benchmark: strict score, interval, and what it cost.

    The strict score is the mean of the six tasks' accuracies by GenEval's rule.
    """
    if benchmark not in BENCHMARKS:
        nearest = max(BENCHMARKS, key=lambda name: SequenceMatcher(None, benchmark, name).ratio())
        raise UsageError(
            f"There is no benchmark `{benchmark}`; the nearest is `{nearest}`.", f"Run: rtdmd eval {nearest}"
        )
    folder = _free(out) if out is not None else None
    from rtdmd_cli.engine.evaluation.shapes import chosen_prompts, evaluate, open_judge

    source, model = load_model(from_, guidance, device, dtype, quiet)
    settings = source.preset.evaluate
    plan, per_prompt = model.plan(steps, guidance), images_per_prompt or settings.images_per_prompt
    with counting(len(chosen_prompts(limit)) * per_prompt, quiet) as advance:
        result = evaluate(
            model,
            plan,
            open_judge(model.backbone.device),
            images_per_prompt=per_prompt,
            limit=limit,
            seed=settings.seed if seed is None else seed,
            batch=batch or settings.batch,
            on_pictures=advance,
        )
    if folder is not None:
        _write(result, folder, quiet)
    if as_json:
        typer.echo(json.dumps(result.summary, indent=2, ensure_ascii=False))
    if not (as_json and quiet):
        show_table(result.summary, err=as_json)


def _free(out: Path) -> Path:
    from rtdmd_cli.engine.pictures import free_folder
    from rtdmd_cli.engine.runtime.files import os_errors

    with os_errors(out, "read"):
        return free_folder(out, lambda folder: not any((folder / name).exists() for name in (RESULTS, SAMPLES)))


def _write(result: ShapesResult, folder: Path, quiet: bool) -> None:
    from rtdmd_cli.engine.evaluation.shapes_grid import save_verdict_grid
    from rtdmd_cli.engine.runtime.files import write_json

    save_verdict_grid(result, folder / SAMPLES)
    write_json(folder / RESULTS, result.summary | {"pictures": [each.record() for each in result.judged]})
    tell(f"wrote {folder / RESULTS} and {folder / SAMPLES}", quiet)


def show_table(summary: dict[str, Any], err: bool) -> None:
    """The summary for people, on stderr or stdout."""
    from rich.console import Console
    from rich.table import Table

    low, high = summary["interval"]
    table = Table("task", title=f"{summary['benchmark']}: {summary['model']}", title_justify="left")
    for heading in ("strict score", "prompts", "distinct"):
        table.add_column(heading, justify="right")
    for task, score in summary["tasks"].items():
        counts = summary["prompts"][task]
        shown = "-" if score is None else f"{score:.3f}"
        table.add_row(task, shown, str(counts["evaluated"]), str(counts["distinct"]))
    table.add_section()
    evaluated = sum(counts["evaluated"] for counts in summary["prompts"].values())
    table.add_row("overall", f"{summary['overall']:.3f}", str(evaluated), "")
    console = Console(stderr=err, highlight=False)
    console.print(table)
    console.print(f"95% interval of overall: {low:.3f} to {high:.3f}")
    for line in _cost(summary):
        console.print(line, markup=False)


def _cost(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"{summary['steps']} steps, {summary['evaluations']} evaluations and "
        f"{summary['seconds_per_picture']:.3g} s a picture; guidance {summary['guidance']:g}; "
        f"{summary['images']} pictures, seed {summary['seed']}, {summary['seconds']:.1f} s in all"
    ]
    if "limit" in summary:
        lines.append(f"limited to {summary['limit']} prompts: not comparable with the whole benchmark")
    clip = summary["clip"]
    if clip is not None:
        lines.append(f"shapes-clip of the independent judge {clip['score']:.4f} (rendered: {clip['score_of_rendered']:.4f})")
        if clip["frechet"] is not None:
            ours, real = clip["frechet_pictures"]
            lines.append(
                f"Frechet distance of its features {clip['frechet']:.4f} (floor {clip['frechet_floor']:.4f}), "
                f"{ours} pictures against {real} rendered"
            )
    lines += [f"failed: {each['reason']} ({each['pictures']} pictures)" for each in summary["failures"][:3]]
    return lines
