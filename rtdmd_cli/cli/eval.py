"""`rtdmd eval`: benchmarks. The table or JSON on stdout, everything else on stderr."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.cli.eval_show import show_benchmarks, show_table
from rtdmd_cli.cli.eval_steps import (
    Interrupted,
    Options,
    find_made,
    make,
    say_made,
    say_stopped,
    score_and_write,
)
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
    WhichCheckpoint,
)
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.evaluation.benchmarks import Benchmark
    from rtdmd_cli.engine.evaluation.metrics import JudgeEntry

LIST = "list"


BenchmarkName = Annotated[
    str,
    typer.Argument(
        metavar="BENCHMARK|FILE|list",
        help="A benchmark of `rtdmd eval list`, or a prompt file (.txt, .json, .jsonl) with --rewards.",
        autocompletion=completing.benchmarks,
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="What to compare with: another evaluation's folder, or a run, checkpoint or preset, which is "
        "evaluated too (with its own steps and guidance). Pictures of the same prompt and seed are compared.",
        autocompletion=completing.sources,
    ),
]
ImagesPerPrompt = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, help="Pictures of each prompt. Default: the benchmark's."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Take only N prompts, evenly spread; the results say so.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise. Default: the preset's.")
]
Size = Annotated[
    int | None,
    typer.Option(
        min=16,
        max=4096,
        metavar="PIXELS",
        help="Side of the pictures. Default: the preset's evaluate.resolution, or what it was trained at.",
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Rewards to be measured (rtdmd rewards list). Default: the benchmark's. Its own judge always is.",
        autocompletion=completing.rewards,
    ),
]
RewardPath = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER",
        help="Weights of a judge or reward, instead of the published; repeatable.",
    ),
]
RewardSeconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Longest time a reward may take for one picture, 0 for any. Default: 600, and 60 for module:Class.",
    ),
]
PromptsFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="The benchmark's prompts, where they aren't fetched.")
]
ImagesOnly = Annotated[
    bool, typer.Option("--images-only", help="Make the pictures and stop: --score-only goes on.")
]
ScoreOnly = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Score the pictures of this folder, in GenEval's layout."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures, scores and report; if it holds something, OUT-2 is taken. "
        "Default: evals/BENCHMARK-MODEL, and none for `shapes`, unless another option needs one."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the same evaluation where it was stopped.")
]


def eval_command(
    benchmark: BenchmarkName,
    from_: From = None,
    steps: Steps = None,
    guidance: Guidance = None,
    compare: Compare = None,
    images_per_prompt: ImagesPerPrompt = None,
    limit: Limit = None,
    seed: Seed = None,
    size: Size = None,
    rewards: Rewards = None,
    reward_path: RewardPath = None,
    reward_seconds: RewardSeconds = None,
    prompts_file: PromptsFile = None,
    images_only: ImagesOnly = False,
    score_only: ScoreOnly = None,
    out: Out = None,
    resume: Resume = False,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    checkpoint: WhichCheckpoint = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a benchmark: strict score, interval, and what it cost.

    Pictures are made first, then judged. Both go on with --resume. `rtdmd eval list` shows the benchmarks.
    """
    if benchmark == LIST:
        show_benchmarks(as_json, quiet)
        return
    from rtdmd_cli.engine.evaluation.benchmarks import find_benchmark

    began, row = time.monotonic(), find_benchmark(benchmark)
    _refuse_contradictions(score_only, images_only, compare, from_, steps, guidance, seed, size)
    keep = bool(out or resume or images_only or score_only or compare) or not row.built_in
    options = Options(
        from_,
        steps,
        guidance,
        images_per_prompt,
        limit,
        seed,
        tuple(reward_path or ()),
        out,
        keep,
        resume,
        batch,
        device,
        dtype,
        quiet,
        compare,
        size,
        checkpoint,
    )
    console.quiet_libraries(quiet)
    from rtdmd_cli.engine.compute.importing import quick_imports

    with console.working(quiet) as say:
        say(console.LOADING)
        with quick_imports():
            from rtdmd_cli.engine.evaluation.run import choose_judges

    named = [name for text in rewards or () for name in text.split(",") if name]
    judges = choose_judges(row, named, reward_seconds)
    summary = _evaluate(row, judges, score_only, prompts_file, images_only, options, as_json, began)
    if as_json and summary:
        console.show(summary, as_json)
    if summary and not (as_json and quiet):
        show_table(summary, err=as_json)


def _evaluate(
    row: Benchmark,
    judges: tuple[JudgeEntry, ...],
    score_only: Path | None,
    prompts_file: str | None,
    images_only: bool,
    options: Options,
    as_json: bool,
    began: float,
) -> dict[str, Any]:
    """Make or find the pictures, and score them; the summary, empty with --images-only. Exit: a signal came."""
    from rtdmd_cli.engine.compute.signals import stop_on_signals

    with stop_on_signals() as stop, ExitStack() as held:
        stop.quiet = options.quiet
        try:
            if score_only is not None:
                made = find_made(row, judges, score_only, prompts_file, options, held)
            else:
                made = make(row, judges, prompts_file, options, stop, held)
            if images_only:
                say_made(made, as_json, options.quiet)
                return {}
            return score_and_write(made, options, stop, held, began)
        except Interrupted as stopped:
            say_stopped(stopped, options.quiet)
            raise typer.Exit(stop.exit_code) from None


def _refuse_contradictions(
    score_only: Path | None,
    images_only: bool,
    compare: str | None,
    from_: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    size: int | None,
) -> None:
    if images_only and compare is not None:
        raise UsageError(
            "--images-only judges nothing, so that nothing can be compared.", "Leave one of them out."
        )
    if score_only is None:
        return
    given = {"--images-only": images_only or None, "--from": from_, "--steps": steps, "--guidance": guidance}
    for name, value in {**given, "--seed": seed, "--size": size}.items():
        if value is not None:
            raise UsageError(
                f"{name} makes pictures, --score-only makes none.", f"Leave one of them out: {name}."
            )
