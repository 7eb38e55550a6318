"""`rtdmd eval`: benchmarks. The table or JSON on stdout, everything else on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import console
from rtdmd_cli.cli.counting import counting
from rtdmd_cli.cli.failures import nearest
from rtdmd_cli.cli.sample import (
    MAX_SEED,
    Batch,
    Device,
    Dtype,
    From,
    Guidance,
    Json,
    Quiet,
    Steps,
    load_model,
)
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.evaluation.shapes import ShapesResult

BENCHMARKS = ("shapes",)
RESULTS, SAMPLES = "results.json", "samples.png"


def eval_command(
    benchmark: Annotated[
        str, typer.Argument(metavar="BENCHMARK", help="shapes: the built-in world's held-out prompts.")
    ],
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
        typer.Option(
            help="Also write results.json and samples.png there; with results in it, OUT-2 is taken."
        ),
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
        close = nearest(benchmark, BENCHMARKS)
        raise UsageError(
            f"There is no benchmark `{benchmark}`; the nearest is `{close}`.", f"Run: rtdmd eval {close}"
        )
    folder = _free(out) if out is not None else None
    console.quiet_libraries(quiet)
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
        console.show(result.summary, as_json)
    if not (as_json and quiet):
        show_table(result.summary, err=as_json)


def _free(out: Path) -> Path:
    from rtdmd_cli.engine.pictures import free_folder
    from rtdmd_cli.engine.runtime.files import os_errors

    with os_errors(out, "read"):
        return free_folder(
            out, lambda folder: not any((folder / name).exists() for name in (RESULTS, SAMPLES))
        )


def _write(result: ShapesResult, folder: Path, quiet: bool) -> None:
    from rtdmd_cli.engine.evaluation.shapes_grid import save_verdict_grid
    from rtdmd_cli.engine.runtime.files import write_json

    save_verdict_grid(result, folder / SAMPLES)
    write_json(folder / RESULTS, result.summary | {"pictures": [each.record() for each in result.judged]})
    console.say(f"wrote {folder / RESULTS} and {folder / SAMPLES}", quiet)


def show_table(summary: dict[str, Any], err: bool) -> None:
    """The summary for people, on stderr or stdout."""
    from rich.console import Console
    from rich.table import Table

    low, high = summary["interval"]
    table = Table("task")
    for heading in ("strict score", "prompts"):
        table.add_column(heading, justify="right")
    evaluated = {task: counts["evaluated"] for task, counts in summary["prompts"].items()}
    for task, score in summary["tasks"].items():
        table.add_row(task, "-" if score is None else f"{score:.3f}", str(evaluated[task]))
    table.add_section()
    table.add_row("overall", f"{summary['overall']:.3f}", str(sum(evaluated.values())))
    screen = Console(stderr=err, highlight=False, markup=False)
    screen.print(f"benchmark {summary['benchmark']}, model {summary['model']}", soft_wrap=True)
    screen.print(table)
    for line in (f"95% interval of overall: {low:.3f} to {high:.3f}", *_cost(summary)):
        screen.print(line, soft_wrap=True)


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
        real_score = f"rendered pictures: {clip['score_of_rendered']:.4f}"
        lines.append(f"shapes-clip of the independent judge {clip['score']:.4f} ({real_score})")
        if clip["frechet"] is not None:
            ours, real = clip["frechet_pictures"]
            lines.append(
                f"Frechet distance of its features {clip['frechet']:.4f} "
                f"(floor {clip['frechet_floor']:.4f}), {ours} pictures against {real} rendered"
            )
        if clip["diversity"] is not None:
            lines.append(f"diversity within a prompt {clip['diversity']:.4f} (mean cosine distance)")
    lines += [f"failed: {each['reason']} ({each['pictures']} pictures)" for each in summary["failures"][:3]]
    return lines
