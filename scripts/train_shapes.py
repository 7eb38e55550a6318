"""Train the built-in models of the shapes world from a seed, and package them.

    python scripts/train_shapes.py                    everything; after a break it goes on where it stood
    python scripts/train_shapes.py --stage package    one stage: vae, teacher, clip, clip-judge or package

Minutes on a GPU, about three hours on two CPU cores.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer

from rtdmd_cli.errors import RtdmdError, UsageError
from scripts.shapes_training.stages import PACKAGE_FOLDER, STAGES, Settings, check_settings

app = typer.Typer(add_completion=False)


@app.command()
def main(
    stage: Annotated[str, typer.Option(help=f"all, or one of {', '.join(STAGES)}")] = "all",
    work: Annotated[Path, typer.Option(help="folder of states and latents, made if missing")] = Path(
        "work/shapes"
    ),
    out: Annotated[Path, typer.Option(help="where the package stage writes")] = PACKAGE_FOLDER,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="for the teacher on a CPU")] = 2,
    vae_steps: Annotated[int, typer.Option(min=1)] = Settings.vae_steps,
    teacher_steps: Annotated[int, typer.Option(min=1)] = Settings.teacher_steps,
    clip_steps: Annotated[int, typer.Option(min=1, help="of either CLIP")] = Settings.clip_steps,
) -> None:
    """Train the built-in models of the shapes world from a seed, and package them."""
    try:
        if stage != "all" and stage not in STAGES:
            raise UsageError(f"There is no stage {stage!r}.", f"Choose all, {', '.join(STAGES)}.")
        settings = Settings(
            work=work,
            out=out,
            seed=seed,
            device=_device(device),
            processes=processes,
            vae_steps=vae_steps,
            teacher_steps=teacher_steps,
            clip_steps=clip_steps,
        )
        check_settings(settings)
        for name, run in STAGES.items():
            if stage in ("all", name):
                print(f"stage {name}", flush=True)
                run(settings)
    except RtdmdError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


def _device(name: str) -> torch.device:
    """The device of that name; auto is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"There is no device {name!r}.", "Choose auto, cpu or cuda.")
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


if __name__ == "__main__":
    app()
