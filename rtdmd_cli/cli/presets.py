"""`rtdmd presets`: list, show, copy and validate recipes. Data goes to stdout, everything else to stderr."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from rtdmd_cli.cli import completing
from rtdmd_cli.errors import UsageError

app = typer.Typer(
    name="presets",
    help="List, show, copy and check presets (a YAML file is a recipe), and list the keys of --set.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="A shipped preset's name, or a YAML file.",
        autocompletion=completing.presets,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _table(rows: list[tuple[str, ...]]) -> None:
    """Left-aligned columns; one of up to 40 characters sets the width, longer ones stick out."""
    widths = [
        max((len(cell) for cell in column if len(cell) <= 40), default=0)
        for column in zip(*rows, strict=True)
    ]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the shipped presets: name, model family, description, and what a training takes by `rtdmd plan`."""
    from dataclasses import asdict

    from rtdmd_cli.config import list_presets

    found = list_presets()
    if as_json:
        _print_json(
            [
                {
                    "name": info.name,
                    "family": info.family,
                    "description": info.description,
                    "path": str(info.path),
                    "planned": asdict(info.planned) if info.planned else None,
                }
                for info in found
            ]
        )
    else:
        _table(
            [
                (info.name, info.family, info.description + (f"; {info.planned}" if info.planned else ""))
                for info in found
            ]
        )


@app.command()
def show(
    name: Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every value and where it came from.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a value, with --resolved; may be repeated.",
            autocompletion=completing.keys,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a preset's file, or all its values."""
    from rtdmd_cli.config import preset_path, preset_text

    if resolved:
        _show_resolved(name, overrides or [], as_json)
        return
    if overrides:
        raise UsageError("`--set` changes no file.", "Add --resolved to see the values it gives.")
    text = preset_text(name)
    if as_json:
        _print_json({"path": str(preset_path(name)), "text": text})
    else:
        typer.echo(text, nl=not text.endswith("\n"))


def _show_resolved(name: str, overrides: list[str], as_json: bool) -> None:
    from rtdmd_cli.config import allowed, keys, load_preset, preset_values

    resolved = load_preset(name, overrides)
    values, sources = preset_values(resolved.preset), resolved.sources
    fields = {".".join(path): field for path, field in keys().items()}
    if not as_json:
        for key, value in values.items():
            typer.echo(f"{key}  {json.dumps(value, ensure_ascii=False)}  {sources[key]}")
            _indented(fields[key].description or "")
        return
    _print_json(
        {
            "name": resolved.preset.name,
            "sha256": resolved.sha256,
            "values": {
                key: {
                    "value": value,
                    "source": sources[key],
                    "allowed": allowed(fields[key]),
                    "description": fields[key].description,
                }
                for key, value in values.items()
            },
        }
    )


@app.command("keys")
def keys_(
    word: Annotated[
        str | None, typer.Argument(metavar="WORD", help="Only keys with WORD in their name or description.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys of `--set`: name, default, what is allowed, one sentence on each."""
    from rtdmd_cli.config import allowed, keys

    found = []
    for path, field in keys().items():
        name, sentence = ".".join(path), field.description or ""
        if word is None or word.lower() in f"{name} {sentence}".lower():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            found.append(
                {
                    "key": name,
                    "required": field.is_required(),
                    "default": default,
                    "allowed": allowed(field),
                    "description": sentence,
                }
            )
    if not found:
        raise UsageError(f"No key holds `{word}`.", "See them all: rtdmd presets keys")
    if as_json:
        _print_json(found)
        return
    for each in found:
        default = (
            "none, it must be given" if each["required"] else json.dumps(each["default"], ensure_ascii=False)
        )
        typer.echo(f"{each['key']}  (default: {default})")
        _indented(f"{each['description']}. Takes {each['allowed']}.")


def _indented(text: str) -> None:
    """Lines of at most 80 columns, set in by four."""
    for line in textwrap.wrap(text, 76, break_long_words=False, break_on_hyphens=False):
        typer.echo(f"    {line}")


@app.command()
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The new file; an existing one is never overwritten.")],
    as_json: Json = False,
) -> None:
    """Copy a preset to a file of your own, to change it."""
    from rtdmd_cli.config import preset_path, preset_text

    text = preset_text(name)
    if file.is_dir():
        raise UsageError(
            f"{file} is a folder.",
            "Name the new file: "
            + shlex.join(["rtdmd", "presets", "copy", name, str(file / f"{preset_path(name).stem}.yaml")]),
        )
    if file.exists() or file.is_symlink():
        raise UsageError(f"{file} exists already and is never overwritten.", "Choose another file name.")
    if not file.parent.is_dir():
        raise UsageError(
            f"The folder {file.parent} does not exist.",
            f"Make it first: mkdir -p {shlex.quote(str(file.parent))}",
        )
    from rtdmd_cli.engine.storage.files import write_text

    write_text(file, text)
    if as_json:
        _print_json({"path": str(file)})
    else:
        quoted = shlex.quote(str(file))
        typer.echo(f"copied to {quoted}; use it with: rtdmd distill --preset {quoted}", err=True)


@app.command()
def validate(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A YAML file, or a shipped preset's name.", autocompletion=completing.presets
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check a preset file by itself, without the environment: exit code 0 if it is good, 2 if not."""
    from rtdmd_cli.config import load_preset

    resolved = load_preset(file, environ={})
    given = sum(source != "default" for source in resolved.sources.values())
    if as_json:
        _print_json({"file": file, "valid": True, "name": resolved.preset.name, "sha256": resolved.sha256})
    else:
        typer.echo(f"{file}: valid, {given} of {len(resolved.sources)} values set, the others are defaults")
