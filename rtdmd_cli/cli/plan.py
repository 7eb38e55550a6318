"""`rtdmd plan`: what a training takes, before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import console
from rtdmd_cli.cli.starting import DEFAULT_PRESET, Json, Overrides, Quiet
from rtdmd_cli.config.loader import Resolved, load_preset
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.planning.plan import Plan, StageName

STAGES = ("distill", "tune-reward")


def plan(
    preset: Annotated[
        str, typer.Option(help="Preset: a name (see `rtdmd presets list`) or a file.")
    ] = DEFAULT_PRESET,
    stage: Annotated[
        str | None, typer.Option(metavar="distill|tune-reward", help="One stage. Default: both.")
    ] = None,
    overrides: Overrides = None,
    vram: Annotated[
        float | None, typer.Option(min=1, max=10_000, help="Memory of the card, GB. Default: the GPU's.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Card that the hours are for, such as 4090. Default: this machine.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Choose the quickest settings that fit, and write them as a preset.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File of that preset. Default: NAME-fit.yaml here.")
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a training takes: memory of card and host, disk, hours.

    Counted on shapes alone: nothing is loaded or downloaded.

    Example: rtdmd plan --preset sd3-4step-24gb --gpu 4090
    """
    if stage is not None and stage not in STAGES:
        raise UsageError(f"There is no stage `{stage}`.", f"Choose one of {', '.join(STAGES)}.")
    if out is not None and not fit:
        raise UsageError("`--out` is the file of `--fit`.", "Add --fit, or leave --out out.")
    resolved = load_preset(preset, overrides or [])
    console.quiet_libraries(quiet)
    from rtdmd_cli.engine.compute.importing import quick_imports

    with quick_imports():
        from rtdmd_cli.engine.planning import fitting
        from rtdmd_cli.engine.planning.plan import STAGES as ALL
        from rtdmd_cli.engine.planning.plan import make_plan
        from rtdmd_cli.engine.planning.stored import keep

    stages = tuple(name for name in ALL if stage in (None, name))
    memory = card_memory(vram, gpu)
    if fit:
        if memory is None:
            raise UsageError(
                "`--fit` needs a card.", "Give its memory or its name: --vram 24, or --gpu 4090."
            )
        with console.working(quiet) as say:
            chosen = fitting.fit(resolved.preset, stages, memory, tell=say)
        path = out or Path(f"{resolved.preset.name}-fit.yaml")
        fitting.write(chosen, preset, path)
        console.say(chosen.reasons[-1], quiet)
        console.say(f"Written to {path}. Use it: rtdmd distill --preset {path}", quiet)
        resolved = load_preset(str(path))
    with console.working(quiet) as say:
        say("counting memory and operations on shapes alone")
        made = make_plan(resolved.preset, stages, gpu)
    for each in made.stages:
        keep(resolved.sha256, each.stage, made.totals(each))
    console.show(answer(resolved, made, memory), True) if json_output else show(resolved, made, memory)


def card_memory(vram: float | None, gpu: str | None) -> float | None:
    """GB of the card in question: as given, of a card by name, or of this machine's; None where there is none."""
    if vram is not None:
        return vram
    from rtdmd_cli.engine.planning.gpus import find_gpu

    return this_card("auto") if gpu is None else float(find_gpu(gpu).memory)


def answer(resolved: Resolved, made: "Plan", memory: float | None) -> dict[str, Any]:
    """As one JSON object."""
    figures = made.figures()
    fits = None if memory is None else figures["card_peak_gib"] <= memory
    return {"preset": resolved.preset.name, "vram_gb": memory, "fits": fits, **figures}


def show(resolved: Resolved, made: "Plan", memory: float | None) -> None:
    """For people: the totals, then a line for each phase."""
    figures = answer(resolved, made, memory)
    console.show(summary(figures), False)
    typer.echo("")
    kinds = ("weights", "adapters", "gradients", "optimiser", "activations", "workspace")
    typer.echo(f"{'phase':<36}{'GiB':>8}" + "".join(f"{kind:>13}" for kind in kinds))
    for row in figures["phases"]:
        of = row.get("kinds_gib", {})
        name = f"{row['stage']}: {row['phase']}" + (", host" if row["where"] == "host" else "")
        cells = "".join(f"{of[kind]:>13.2f}" if kind in of else f"{'':>13}" for kind in kinds)
        typer.echo(f"{name:<36}{row['peak_gib']:>8.2f}{cells}".rstrip())
    for line in figures["assumptions"]:
        console.say(line)


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The totals."""
    room = {} if figures.get("fits") is None else {"fits": "yes" if figures["fits"] else "no"}
    return {
        "card_peak_gib": figures["card_peak_gib"],
        "decides": figures["decides"],
        **room,
        "host_peak_gib": figures["host_peak_gib"],
        "disk_gib": figures["disk_gib"],
        "hours": figures["hours"],
    }


def dry_run_figures(resolved: Resolved, stage: "StageName", quiet: bool) -> dict[str, Any]:
    """A stage's totals for its dry run, which does not take the seconds of counting: as `rtdmd plan` found them.

    Says how to have them where they were not counted yet.
    """
    from rtdmd_cli.engine.planning.stored import kept

    found = kept(resolved.sha256, stage)
    if found is None:
        console.say(
            "For memory, disk and hours: rtdmd plan with this --preset and --set; dry runs then have them.",
            quiet,
        )
        return {}
    return found


def refuse_too_large(resolved: Resolved, stage: "StageName", memory: float | None) -> None:
    """UsageError where all boundaries at once, with this micro-batch, can't fit a card of `memory` GB (None: no card)."""
    preset = resolved.preset
    if memory is None or not preset.distill.boundaries_batched:
        return
    from rtdmd_cli.engine.planning.plan import GIB, gib, plan_stage

    planned = plan_stage(preset, stage)
    if planned.card > memory * GIB:
        raise UsageError(
            f"`distill.boundaries_batched` with this micro-batch takes {gib(planned.card)} GiB "
            f"({planned.deciding.name}), and the card has {memory:.1f}.",
            "Let settings be chosen that fit: rtdmd plan --fit",
        )


def this_card(device: str) -> float | None:
    """GiB of the card that a training is about to use; None for another device."""
    import torch

    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory) / 2**30
