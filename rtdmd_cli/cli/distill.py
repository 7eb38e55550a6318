"""`rtdmd distill`: stage 1."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdmd_cli.cli import checking, completing, console
from rtdmd_cli.cli.plan import dry_run_figures, refuse_too_large, this_card
from rtdmd_cli.cli.quiet import attention_left_out
from rtdmd_cli.cli.starting import (
    DEFAULT_PRESET,
    DISTILL,
    AllowChange,
    Device,
    DryRun,
    Dtype,
    Json,
    Out,
    Overrides,
    Processes,
    Quiet,
    Resume,
    find_prompts,
    find_start,
    going_on,
    in_processes,
    is_follower,
    load_recipe,
)
from rtdmd_cli.config.loader import Resolved

if TYPE_CHECKING:
    from rtdmd_cli.engine.training.session import Outcome
    from rtdmd_cli.engine.training.start import Start


def distill(
    preset: Annotated[
        str,
        typer.Option(
            help="Preset: a name (see `rtdmd presets list`) or a file.", autocompletion=completing.presets
        ),
    ] = DEFAULT_PRESET,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: the preset's name.")] = None,
    out: Out = Path("runs"),
    resume: Resume = "never",
    allow_change: AllowChange = None,
    device: Device = None,
    dtype: Dtype = None,
    processes: Processes = None,
    dry_run: DryRun = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a model into a 4-step generator (stage 1).

    The model is the teacher. A second network, the fake score, learns what the generator draws. The generator samples
    from noise in a few steps (a rollout). At the noise levels between the steps (the boundaries) the difference between
    teacher and fake score moves it towards the teacher. While it runs, look at runs/NAME/report.html or rtdmd runs view.

    Example: rtdmd distill --preset shapes-4step
    """
    hardware = [f"hardware.{key}={value}" for key, value in (("device", device), ("dtype", dtype)) if value]
    settings, place = [*(overrides or []), *hardware], Path(preset).stem if name is None else name
    resolved = load_recipe(preset, settings, resume, out, place)
    if not dry_run:
        in_processes(processes)
    quiet, silent = quiet or is_follower(), is_follower()
    console.quiet_libraries(quiet)
    from rtdmd_cli.engine.prompts.reading import known_by

    preset_prompts = resolved.preset.distill.prompts
    prompts = find_prompts(preset_prompts, dry_run, "distill.prompts")
    run_name = resolved.preset.name if name is None else name
    known = known_by(prompts) if prompts else None
    start = find_start(resume, out, name, run_name, resolved, known, quiet, DISTILL, allow_change or ())
    if dry_run or prompts is None:
        count = len(prompts) if prompts else None
        shown = plan(resolved, count, out / run_name, start) | dry_run_figures(resolved, "distill", quiet)
        checking.report(shown, checking.findings(resolved, False, [preset_prompts]), json_output)
        return
    checking.require_adapters(resolved.preset)
    if left_out := attention_left_out():
        console.say(left_out, quiet)
    refuse_too_large(resolved, "distill", this_card(resolved.preset.hardware.device))
    from rtdmd_cli.engine.compute.importing import quick_imports

    with console.working(quiet) as say:
        say(console.LOADING)
        with quick_imports():
            from rtdmd_cli.engine.distill.run import run_distill
        outcome = run_distill(resolved, prompts, start, out, run_name, sys.argv, say, quiet)
    if not silent:
        console.show(result(outcome, resolved.preset.distill.iterations), json_output)
    finish(outcome, quiet)


def result(outcome: "Outcome", iterations: int) -> dict[str, object]:
    """What is shown of a training; iterations: those that the preset asks for."""
    return {
        "run": str(outcome.run),
        "iterations": outcome.iterations,
        "seconds": round(outcome.seconds, 1),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.run / "report.html"),
        "finished": outcome.iterations >= iterations,
    }


def finish(outcome: "Outcome", quiet: bool) -> None:
    """Say how the run goes on. Exit: a signal ended it."""
    if outcome.signal_exit_code:
        from rtdmd_cli.engine.storage.run_folder import RunFolder

        again = going_on(RunFolder(outcome.run), DISTILL.name)
        console.say(f"Stopped and saved. Go on with: {again}", quiet)
        raise typer.Exit(outcome.signal_exit_code)
    console.say(
        f'Look at {outcome.run / "report.html"}, or draw: rtdmd sample "a photo of a red ring" -n 4', quiet
    )


def plan(resolved: Resolved, prompts: int | None, run: Path, start: "Start") -> dict[str, object]:
    """What a dry run prints: nothing has been loaded from disk but prompts and checkpoint.

    prompts: None where they have not been fetched.
    """
    preset = resolved.preset
    config = preset.distill
    return {
        "run": str(start.run.path if start.run else run),
        "preset": preset.name,
        "preset_sha256": resolved.sha256,
        "model": preset.model.path,
        "resolution": preset.model.resolution,
        "prompts": prompts,
        "start": start.checkpoint.step if start.checkpoint else 0,
        "iterations": config.iterations,
        "generator_updates": config.iterations // config.fake_per_generator,
        "batch": config.batch,
        "micro_batch": config.micro_batch or config.batch,
        "device": checking.device_of(preset.hardware.device),
        "to_download": "; ".join(checking.downloads(resolved, False)) or None,
        "dtype": preset.hardware.dtype,
    }
