"""`rtdmd export`: what other tools load. The folder or JSON on stdout, everything else on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.cli.failures import nearest
from rtdmd_cli.cli.sample import RUNS, Device, Dtype, Json, Quiet, WhichCheckpoint
from rtdmd_cli.engine.compute.signals import stop_on_signals
from rtdmd_cli.engine.export import PICTURES
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from rtdmd_cli.engine.sampling.source import Source

FORMATS = ("diffusers", "comfyui", "merged")
ALL = "all"
EXPORTS = Path("exports")


Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="Run or checkpoint folder, or name of a run under runs/. Default: the newest finished run.",
        autocompletion=completing.runs_here,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="diffusers|comfyui|merged|all",
        help="diffusers: a LoRA file. comfyui: a LoRA file and workflows. merged: a whole pipeline, with workflows. "
        "Default: diffusers; merged where every weight was trained.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder to make. Default: exports/NAME OF THE RUN.")]
PushToHub = Annotated[
    str | None, typer.Option(metavar="USER/NAME", help="Also upload it to this repository of the hub.")
]
Public = Annotated[bool, typer.Option("--public", help="Make the repository public. Default: private.")]
Rank = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Largest rank of the LoRA. Default: the exact one.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an export of that name.")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Leave out the round trip through the stock pipeline.")
]

Pictures = Annotated[
    int,
    typer.Option(
        min=1,
        max=PICTURES,
        help="Pictures that the round trip compares and the card shows; fewer take less time. Default: 4.",
    ),
]


def export(
    run: Run = None,
    format_: Format = None,
    out: Out = None,
    push_to_hub: PushToHub = None,
    public: Public = False,
    rank: Rank = None,
    force: Force = False,
    no_check: NoCheck = False,
    pictures: Pictures = PICTURES,
    device: Device = None,
    dtype: Dtype = None,
    checkpoint: WhichCheckpoint = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a generator as other tools load it: diffusers, ComfyUI.

    Each export is loaded into the stock pipeline and has to make the run's pictures before the folder gets its name.
    """
    asked = None if format_ is None else _formats(format_)
    if public and push_to_hub is None:
        raise UsageError("--public is about the repository of --push-to-hub.", "Add --push-to-hub USER/NAME.")
    console.quiet_libraries(quiet)
    from rtdmd_cli.engine.compute.importing import quick_imports

    with console.working(quiet) as say:
        say(console.LOADING)
        with quick_imports():
            from rtdmd_cli.engine.compute.device import resolve_device, resolve_dtype
            from rtdmd_cli.engine.export.names import local_name
            from rtdmd_cli.engine.export.run import Request, default_formats, run_export

    source = _source(run, checkpoint, quiet)
    hardware = source.preset.hardware
    where = resolve_device(device or hardware.device)
    assert source.checkpoint is not None
    folder = out if out is not None else EXPORTS / source.label.partition("/")[0]
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    request = Request(
        source=source,
        formats=asked or default_formats(source.preset, rank),
        out=folder,
        where=push_to_hub or local_name(str(folder)),
        rank=rank,
        check=not no_check,
        pictures=pictures,
        force=force,
        device=where,
        dtype=resolve_dtype(dtype or hardware.dtype, where),
    )
    api = _hub(push_to_hub) if push_to_hub is not None else None
    kept = f"{folder} is as before"
    with stop_on_signals() as stop, stop.during("", kept), console.working(quiet) as say:
        described = run_export(request, say)
    result: dict[str, Any] = {"folder": str(folder), "hub": None, **described}
    if api is not None and push_to_hub is not None:
        from rtdmd_cli.engine.export.hub import push

        with stop_on_signals() as stop, stop.during("", f"{folder} is whole, the upload is not"):
            result["hub"] = push(api, folder, push_to_hub, public)
        console.say(f"uploaded to {result['hub']}", quiet)
    _print(result, folder, as_json)


def _formats(text: str) -> tuple[str, ...]:
    if text == ALL:
        return FORMATS
    if text not in FORMATS:
        close = nearest(text, (*FORMATS, ALL))
        raise UsageError(
            f"There is no format `{text}`; the nearest is `{close}`.", f"Write --format {close}."
        )
    return (text,)


def _source(run: str | None, checkpoint: str | None, quiet: bool) -> Source:
    """The generator to export. UsageError for a base model and for what is exported already."""
    from rtdmd_cli.engine.sampling.source import resolve

    source = resolve(run, RUNS, checkpoint)
    if source.exported is not None:
        raise UsageError(f"{run} is an export already.", "Name the run that it was made from.")
    if source.checkpoint is None and run is None:
        raise UsageError(f"There is no finished run under {RUNS}/ to export.", "Make one: rtdmd distill")
    if source.checkpoint is None:
        raise UsageError(
            f"`{run}` is a preset, whose base model needs no export.",
            "Name a run: see the folders under runs/.",
        )
    for note in source.notes:
        console.say(note, quiet)
    return source


def _hub(repo: str) -> HfApi:
    """The hub, logged in. Errors as `hub.check_name` and `hub.check_login`."""
    from huggingface_hub import HfApi

    from rtdmd_cli.engine.export.hub import check_login, check_name

    check_name(repo)
    api = HfApi()
    check_login(api)
    return api


def _print(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        console.show(result, as_json)
    else:
        typer.echo(str(folder))
