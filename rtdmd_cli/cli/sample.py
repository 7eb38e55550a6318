"""`rtdmd sample`: pictures of prompts. Paths or JSON on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.cli.counting import counting
from rtdmd_cli.engine.compute.signals import stop_on_signals
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdmd_cli.config.schema import Preset
    from rtdmd_cli.engine.sampling.model import Model
    from rtdmd_cli.engine.sampling.pictures import Job, Written
    from rtdmd_cli.engine.sampling.source import Source

RUNS = Path("runs")
LONGEST_SIDE = 8192  # px
MAX_SEED = 2**63 - 1

From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN|CHECKPOINT|EXPORT|PRESET",
        help="Run, checkpoint or exported folder, name of a run under runs/, or preset (its untouched base model). "
        "Default: the newest finished run, else the built-in model.",
        autocompletion=completing.sources,
    ),
]
WhichCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|N",
        help="Checkpoint of a run: the best by its held-out rewards, the newest, or that of a step. "
        "Default: best where the run has one, else last.",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps. Default: the preset's.")]
Guidance = Annotated[
    float | None,
    typer.Option(min=1, max=100, help="Guidance of a base model; 1 is none. Default: the preset's."),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65536,
        help="Pictures drawn at once; any number gives the same ones. Default: the preset's, fewer if large.",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps. Default: the preset's.")]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32 or bf16. Default: the preset's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="What the pictures show.")]
Number = Annotated[int, typer.Option("-n", min=1, max=100_000, help="Pictures of each prompt.")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-",
        help="Prompts, one a line: a UTF-8 file, - for standard input, or builtin:shapes.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise.")]
Side = Annotated[
    int | None, typer.Option(min=1, max=LONGEST_SIDE, help="Pixels. Default: the preset's resolution.")
]
Out = Annotated[
    Path,
    typer.Option(help="Folder for the pictures; if it holds others of the same names, OUT-2 is used."),
]
Grid = Annotated[bool, typer.Option("--grid", help="Also write grid.png, all pictures in one.")]


def sample(
    prompt: Prompt = None,
    number: Number = 1,
    from_: From = None,
    prompts: PromptFile = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    width: Side = None,
    height: Side = None,
    out: Out = Path("samples"),
    grid: Grid = False,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    checkpoint: WhichCheckpoint = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make pictures of a prompt, or of a file of prompts.

    The same seed, prompt index and picture index give the same picture, whatever the batch.
    """
    console.quiet_libraries(quiet)
    texts = _texts(prompt, prompts)
    from rtdmd_cli.engine.compute.importing import quick_imports

    with console.working(quiet) as say:
        say(console.LOADING)
        with quick_imports():
            from rtdmd_cli.engine.sampling.pictures import (
                Job,
                choose_folder,
                default_batch,
                write_grid,
                write_pictures,
            )

    sides = (height, width)
    source, model = load_model(from_, guidance, device, dtype, quiet, checkpoint, texts, sides)
    preset = source.preset
    if preset.model.path.startswith("builtin:"):
        say_foreign(texts, quiet)
    across, down = width or preset.model.resolution, height or preset.model.resolution
    plan = model.plan(steps, guidance, (down, across))
    size = batch or default_batch(preset, across, down)
    job = Job(model, plan, texts, number, seed, across, down, size)
    folder = choose_folder(out, job, grid)
    if folder != out:
        console.say(f"{out}/ holds other pictures of these names: writing to {folder}/", quiet)
    with counting(len(texts) * number, quiet) as advance, stop_on_signals() as stop:
        stop.quiet = quiet
        written = write_pictures(folder, job, advance, stop)
    if written.kept:
        console.say(f"{written.kept} of the pictures were there already and are kept", quiet)
    grid_path = write_grid(folder, job) if grid else None
    _print(written, folder, grid_path, job, as_json)


def say_foreign(texts: list[str], quiet: bool) -> None:
    """That the built-in model knows plain shapes only, where a prompt is none of its captions."""
    from rtdmd_cli.shapes.grammar import parse

    for text in texts:
        try:
            parse(text)
        except ValueError:
            console.say(
                f'The built-in model knows plain shapes only, as in "a photo of two red circles"; "{text[:60]}" is '
                "none of its captions.",
                quiet,
            )
            return


def _texts(prompt: str | None, prompts: str | None) -> list[str]:
    """The prompts of the command line. UsageError unless one of both is given; errors of `read_prompts`."""
    from rtdmd_cli.engine.prompts.reading import check_prompt, read_prompts

    if prompt is not None and prompts is not None:
        raise UsageError(
            "Give a prompt or --prompts, not both.", "Put the prompt into the file, or leave --prompts out."
        )
    if prompts is not None:
        if prompts == "-" and sys.stdin is None:  # closed by the shell: <&-
            raise UsageError("Standard input is closed.", "Give the prompts to it: --prompts - < FILE")
        return list(read_prompts(prompts, sys.stdin.buffer if sys.stdin else None))
    if prompt is None:
        raise UsageError("There is no prompt.", 'Write one, as in: rtdmd sample "a photo of two red circles"')
    return [check_prompt(prompt)]


def load_model(
    reference: str | None,
    guidance: float | None,
    device: str | None,
    dtype: str | None,
    quiet: bool,
    checkpoint: str | None = None,
    texts: Sequence[str] = (),
    size: tuple[int | None, int | None] = (None, None),
) -> tuple[Source, Model]:
    """Find and open what `--from` names; says on stderr what was chosen.

    texts, size: prompts and sides of the pictures; without prompts the text encoders come later, beside the transformer.
    """
    from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
    from rtdmd_cli.engine.sampling.model import open_model
    from rtdmd_cli.engine.sampling.pictures import encoding_ahead
    from rtdmd_cli.engine.sampling.source import refuse_guidance, resolve

    source = resolve(reference, RUNS, checkpoint)
    for note in source.notes:
        console.say(note, quiet)
    refuse_guidance(source, guidance)
    hardware = source.preset.hardware
    _limit_threads(source.preset)
    where = resolve_device(device or hardware.device)
    side = source.preset.model.resolution
    sides = (size[0] or side, size[1] or side)
    ahead = [encoding_ahead(texts, hardware.cache_gb, sides)] if texts else []
    with console.working(quiet) as say:
        say(f"loading the model {source.preset.model.path}")
        return source, open_model(source, where, resolve_dtype(dtype or hardware.dtype, where), *ahead)


def _limit_threads(preset: Preset) -> None:
    import torch

    if preset.hardware.threads is not None:
        torch.set_num_threads(preset.hardware.threads)


def _print(written: Written, folder: Path, grid: Path | None, job: Job, as_json: bool) -> None:
    paths = [str(path) for path, _ in written.pictures]
    if not as_json:
        typer.echo("\n".join([*paths, *([str(grid)] if grid else [])]))
        return
    result: dict[str, Any] = {
        "folder": str(folder),
        "grid": str(grid) if grid else None,
        "model": job.model.label,
        "model_hash": job.model.model_hash,
        "steps": job.plan.steps,
        "evaluations": job.plan.evaluations,
        "seconds": round(written.seconds, 3),
        "kept": written.kept,
        "pictures": [
            {"path": path, **record} for path, (_, record) in zip(paths, written.pictures, strict=True)
        ],
    }
    console.show(result, as_json)
