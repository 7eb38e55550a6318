"""Rehearse the user's own commands at real size; see `scripts/rehearse --help`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rtdmd_cli.cli.quiet import quiet_libraries
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.planning.plan import GIB, STAGES, StageName, plan_stage
from rtdmd_cli.engine.storage.files import write_json
from rtdmd_cli.engine.storage.run_folder import describe_environment
from rtdmd_cli.errors import RtdmdError
from scripts.rehearsal.models import REHEARSALS, Rehearsal
from scripts.rehearsal.report import table
from scripts.rehearsal.writing import write_model, write_pickscore, write_second_base

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts/bench_results"
PROMPTS = ("a photo of two red circles", "a photo of a blue ring left of a white cross")
COMMANDS = ("distill", "tune-reward", "sample", "export")
IMAGES = 4
"""Pictures of the epoch of stage 2."""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(REHEARSALS)}.")],
    folder: Annotated[
        Path, typer.Option(help="Where model, runs and caches lie: 15 to 45 GB on disk.")
    ] = Path("rehearsal"),
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures, px. Default: the model's first.")
    ] = None,
    commands: Annotated[
        str, typer.Option(help="Which to run, in this order, with commas between.")
    ] = ",".join(COMMANDS),
    out: Annotated[Path, typer.Option(help="Folder of the JSON record.")] = OUT,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder for another rehearsal.")] = False,
    limit: Annotated[int, typer.Option(help="Seconds after which a command is ended.")] = 7200,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, KEY=VALUE, over those of the rehearsal. Repeatable."),
    ] = None,
) -> None:
    """Write a pipeline of published shapes with random bf16 weights, and run the user's own commands on it:
    distill (one generator update), tune-reward (one epoch of 4 pictures, PickScore at its real size), sample, export.

    Records seconds, FLOPs and the peak of the host's memory of each phase, also of a command that is ended by --limit.
    Needs no GPU and no network. Exit code 1 where a command fails.
    """
    quiet_libraries()
    if name not in REHEARSALS:
        raise typer.BadParameter(f"choose one of {', '.join(REHEARSALS)}")
    made = changed(REHEARSALS[name], overrides or [])
    began = time.monotonic()
    write(made, folder)
    written = time.monotonic() - began
    side = size or made.sizes[0]
    done = []
    for command in commands.split(","):
        say(f"{time.monotonic() - began:.0f} s: {command}")
        given = arguments(command, made, folder.resolve(), side)
        expected: dict[str, Any] = {}
        if command in STAGES:  # before the hours that a run takes
            expected["planned_gib"] = planned(made, settings(made, folder.resolve(), side)[1::2], command)
        done.append(run(command, given, folder.resolve(), limit) | expected)
        if done[-1]["exit_code"]:
            break
    record = {
        "name": name,
        "size": side,
        "seconds_writing": written,
        "disk_gib": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30,
        "environment": describe_environment(["scripts/rehearse", name], torch.device("cpu")),
        "load": os.getloadavg(),
        "commands": done,
    }
    print(table(record))
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-rehearse-{name}-{side}.json"
    write_json(path, record)
    say(f"written to {path}")
    if not keep:
        shutil.rmtree(folder)
    if any(each["exit_code"] for each in done):
        raise typer.Exit(1)


def changed(made: Rehearsal, values: list[str]) -> Rehearsal:
    """The rehearsal with further settings, checked before anything is written."""
    wanted = replace(made, changes=(*made.changes, *values))
    try:
        load_preset(made.preset, settings(wanted, Path(), made.sizes[0])[1::2], {})
    except RtdmdError as error:
        raise typer.BadParameter(f"{error.message} {error.hint}", param_hint="--set") from error
    return wanted


def planned(made: Rehearsal, values: list[str], stage: StageName) -> dict[str, float]:
    """GiB of tensors by phase, as `rtdmd plan` counts them for this processor."""
    preset = load_preset(made.preset, values, {}).preset
    return {phase.name: phase.peak / GIB for phase in plan_stage(preset, stage).phases}


def write(made: Rehearsal, folder: Path) -> None:
    """Model, reward and prompts; what is there already stays."""
    write_model(made, folder / "model")
    if made.second_base:
        write_second_base(made, folder / "second")
    write_pickscore(made, folder / "pickscore")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def arguments(command: str, made: Rehearsal, folder: Path, side: int) -> list[str]:
    """A command's arguments: the preset with batch 1 and few pictures. The paths are absolute."""
    runs = ["--out", str(folder / "runs")]
    match command:
        case "distill":
            return [
                command,
                "--preset",
                made.preset,
                "--name",
                "rehearsal",
                *runs,
                *settings(made, folder, side),
            ]
        case "tune-reward":
            named = ["--from", str(folder / "runs/rehearsal"), "--name", "tuned"]
            return [command, *named, *runs, *settings(made, folder, side)]
        case "sample":
            pictures = ["--out", str(folder / "samples"), "-n", "1"]
            return [command, PROMPTS[0], "--from", str(last_run(folder)), *pictures]
        case "export":
            named = [str(last_run(folder)), "--out", str(folder / "export")]
            return [command, *named, "--format", "all", "--pictures", "1"]
    raise typer.BadParameter(f"no such command: {command}")


def last_run(folder: Path) -> Path:
    """The run of stage 2 where there is one, otherwise stage 1's."""
    tuned = folder / "runs/tuned"
    return tuned if tuned.is_dir() else folder / "runs/rehearsal"


def settings(made: Rehearsal, folder: Path, side: int) -> list[str]:
    """What of the preset is changed, as `--set`."""
    values = [
        f"model.path={folder / 'model'}",
        "hardware.device=cpu",
        f"model.resolution={side}",
        "model.teacher_steps=2",
        f"distill.prompts={folder / 'prompts.txt'}",
        "distill.iterations=1",
        "distill.batch=1",
        "distill.micro_batch=1",
        "distill.fake_per_generator=1",
        "distill.sample_every=0",
        f"previews.prompts=[{PROMPTS[0]}]",
        "previews.baseline=false",
        "tune_reward.rewards=[pickscore]",
        f"tune_reward.reward_paths=[pickscore={folder / 'pickscore'}]",
        "tune_reward.held_out=[]",
        f"tune_reward.prompts={folder / 'prompts.txt'}",
        "tune_reward.eval_prompts=null",
        "tune_reward.eval_images=0",
        "tune_reward.eval_every=0",
        "tune_reward.watch.features=null",
        "tune_reward.epochs=1",
        f"tune_reward.images_per_epoch={IMAGES}",
        f"tune_reward.images_per_prompt={IMAGES // 2}",
        "tune_reward.micro_batch=1",
        "tune_reward.sample_every=0",
        *([f"model.generator_init={folder / 'second'}"] if made.second_base else []),
        *made.changes,
    ]
    return [word for value in values for word in ("--set", value)]


def run(command: str, given: list[str], folder: Path, limit: int) -> dict[str, Any]:
    """A command in a process of its own, with caches in `folder` and no network; what it took, and how it ended."""
    record = folder / f"{command}.json"
    own = {"RTDMD_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "scripts.rehearsal.measured", str(record), *given]
    began = time.monotonic()
    process = subprocess.Popen(words, env=os.environ | own | {"PYTHONPATH": str(ROOT)}, cwd=folder)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # a training saves where it is
        code = process.wait()
    found: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"phases": []}
    hidden = [word.replace(str(folder), "FOLDER") for word in given]
    return found | {
        "command": command,
        "arguments": hidden,
        "exit_code": code,
        "seconds": time.monotonic() - began,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
