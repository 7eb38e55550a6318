"""`rtdmd distill`: stage 1."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdmd_cli.cli import console
from rtdmd_cli.config.loader import Resolved, load_preset
from rtdmd_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.distill_start import Start
    from rtdmd_cli.engine.runtime.run_folder import RunFolder

DEFAULT_PRESET = "shapes-4step"
FREE_ON_RESUME = ("distill.iterations", "distill.save_every", "distill.keep", "distill.log_every")
"""Keys that may differ when a run is continued, besides distill.sample_every, evaluate and hardware."""


def distill(
    preset: Annotated[
        str, typer.Option(help="Preset: a name (see `rtdmd presets list`) or a file.")
    ] = DEFAULT_PRESET,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a preset value; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: the preset's name.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: continue the run, if there is one. PATH: a run or checkpoint.",
        ),
    ] = "never",
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, stop.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Turn a model into a 4-step generator (stage 1).

    Example: rtdmd distill --preset shapes-4step
    """
    hardware = [f"hardware.{key}={value}" for key, value in (("device", device), ("dtype", dtype)) if value]
    resolved = load_preset(preset, [*(overrides or []), *hardware])
    from rtdmd_cli.engine.prompts import read_prompts

    prompts = read_prompts(resolved.preset.distill.prompts)
    run_name = name or resolved.preset.name
    start = find_start(resume, out, name, run_name, resolved, quiet)
    if dry_run:
        console.show(plan(resolved, len(prompts), out / run_name, start), json_output)
        return
    console.quiet_libraries()
    from rtdmd_cli.engine.distill_run import run_distill

    def say(text: str) -> None:
        console.say(text, quiet)

    outcome = run_distill(resolved, prompts, start, out, run_name, sys.argv, say, quiet)
    result = {
        "run": str(outcome.run),
        "iterations": outcome.iterations,
        "seconds": round(outcome.seconds, 1),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.run / "report.html"),
        "finished": outcome.iterations >= resolved.preset.distill.iterations,
    }
    console.show(result, json_output)
    if outcome.signal_exit_code:
        again = shlex.join(
            ["--preset", str(outcome.run / "preset.resolved.yaml"), "--resume", str(outcome.run)]
        )
        console.say(f"Stopped and saved. Go on with: rtdmd distill {again}", quiet)
        raise typer.Exit(outcome.signal_exit_code)
    console.say(
        f'Look at {outcome.run / "report.html"}, or draw: rtdmd sample "a photo of a red ring" -n 4', quiet
    )


def find_start(
    resume: str, out: Path, name: str | None, run_name: str, resolved: Resolved, quiet: bool
) -> "Start":
    """What --resume asks for; nothing is made or loaded but the checkpoint.

    Raises:
        UsageError: the run exists and is not to be resumed, or PATH names no run. DataError: no good
        checkpoint, or one that was made with other settings.
    """
    from rtdmd_cli.engine.distill_start import Start
    from rtdmd_cli.engine.runtime import checkpoint, run_folder

    if resume == "never":
        run_folder.refuse_existing(out / run_name)
        return Start(None, None)
    if resume == "auto":
        if not run_folder.is_run(out / run_name):
            run_folder.refuse_existing(out / run_name)
            return Start(None, None)
        reference = run_folder.RunReference(run_folder.RunFolder(out / run_name), None)
    else:
        named = run_folder.resolve_run(resume, out)
        if named is None:
            raise UsageError(
                f"`{resume}` is neither auto, never, a run nor a checkpoint.",
                "Look at the folders under runs/.",
            )
        reference = named
    run, chosen = reference.run, reference.checkpoint
    path = chosen or (newest(run, quiet) if run else None)
    loaded = checkpoint.load_checkpoint(path) if path else None
    if loaded and loaded.state.get("stage") != "distill":
        raise DataError(f"{path} was not made by rtdmd distill.", "Choose a checkpoint of a distill run.")
    if run:
        require_same_recipe(run.preset, resolved)
    if name and (run is None or run.path.resolve() != (out / name).resolve()):
        if loaded is None:
            raise DataError(f"{resume} has no checkpoint yet.", "Start a run of its own: leave --resume out.")
        run_folder.refuse_existing(out / name)
        console.say(f"a new run from {loaded.path}, at iteration {loaded.step}", quiet)
        return Start(None, loaded)
    if run is None or (
        chosen and checkpoint.checkpoint_steps(run.checkpoints)[-1:] != [loaded.step if loaded else -1]
    ):
        raise UsageError(
            f"{chosen} is not the newest checkpoint of a run.", "Start a new run from it with --name OTHER."
        )
    if loaded:
        console.say(f"continuing {run.path} at iteration {loaded.step}", quiet)
    else:
        console.say(f"{run.path} has no checkpoint yet: it starts from the beginning", quiet)
    return Start(run, loaded)


def newest(run: "RunFolder", quiet: bool) -> Path | None:
    """The newest good checkpoint of a run, saying which were skipped; None where the run never saved one."""
    from rtdmd_cli.engine.runtime import checkpoint

    path, skipped = checkpoint.newest_valid(run.checkpoints)
    for bad, reason in skipped:
        console.say(f"skipped the checkpoint {bad.name}: {reason}", quiet)
    if path is None and skipped:
        raise DataError(
            f"No checkpoint of {run.path} is intact: {skipped[0][1]}", "Start another run with --name OTHER."
        )
    return path


def require_same_recipe(own: Path, resolved: Resolved) -> None:
    """Raise DataError, naming the keys, if a run's preset differs in what changes the computation."""
    from rtdmd_cli.config.loader import preset_values

    try:
        made_with = load_preset(str(own), environ={}).preset
    except UsageError as error:
        raise DataError(f"The run {own.parent} is damaged: {error.message}", error.hint) from error
    before, now = preset_values(made_with), preset_values(resolved.preset)
    free = (*FREE_ON_RESUME, "distill.sample_every", "name", "description")
    changed = [
        key
        for key in now
        if before[key] != now[key] and key not in free and not key.startswith(("evaluate.", "hardware."))
    ]
    if changed:
        pairs = ", ".join(f"{key} was {before[key]}, now {now[key]}" for key in changed[:3])
        raise DataError(
            f"{own.parent} was made with other settings: {pairs}.", "Start another run with --name OTHER."
        )


def plan(resolved: Resolved, prompts: int, run: Path, start: "Start") -> dict[str, object]:
    """What a dry run prints: nothing has been loaded from disk but prompts and checkpoint."""
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
        "device": preset.hardware.device,
        "dtype": preset.hardware.dtype,
    }
