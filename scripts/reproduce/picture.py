"""The README's picture: the teacher with guidance above a generator, the same prompt and noise in each column.

python -m scripts.reproduce.picture runs/shapes-4step --out scripts/reproduce/picture.png
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.engine.sampling.pictures import read_picture

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "a photo of a red ring and a blue cross",
    "a photo of two purple circles",
    "a photo of a green triangle left of an orange cross",
    "a photo of three yellow squares",
    "a photo of a white diamond",
    "a photo of a black square below a red circle",
    "a photo of a yellow ring and a purple triangle",
    "a photo of four blue circles",
)


def main(
    generator: Annotated[str, typer.Argument(help="Run, checkpoint or export.")],
    teacher: Annotated[str, typer.Option(help="Preset file.")] = str(ROOT / "presets/shapes-4step.yaml"),
    out: Annotated[Path, typer.Option(help="The PNG.")] = ROOT / "scripts/reproduce/picture.png",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="In place of the README's.")] = None,
) -> None:
    """Draw the teacher and a generator with `rtdmd sample`, one row each, and write one PNG."""
    shown = list(prompts or PROMPTS)
    rows = [
        row(name, reference, shown, seed) for name, reference in (("teacher", teacher), ("ours", generator))
    ]
    save_png(picture_grid(rows, shown), out, {"Software": "rtdmd", "prompts": "\n".join(shown)})


def row(name: str, reference: str, prompts: Sequence[str], seed: int) -> GridRow:
    """One picture of each prompt, and in the title what it cost."""
    with TemporaryDirectory() as folder:
        listed = Path(folder) / "prompts.txt"
        listed.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        command = ["sample", "--prompts", str(listed), "--from", reference, "--seed", str(seed)]
        found = rtdmd([*command, "--out", f"{folder}/pictures", "--json", "--quiet"])
        images = [read_picture(Path(each["path"])) for each in found["pictures"]]
    return GridRow(f"{name}, {found['evaluations']} evaluations", images)


def rtdmd(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that a command prints. CalledProcessError where it fails, after its own message on stderr."""
    done = subprocess.run([sys.executable, "-m", "rtdmd_cli", *arguments], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    typer.run(main)
