"""What a run folder tells for its report: command, machine, grids, sampler."""

import re
from datetime import UTC, datetime
from pathlib import Path

from rtdmd_cli.config.places import shown_from
from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine.report.html import Live
from rtdmd_cli.engine.report.page import Picture
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.run_folder import ENVIRONMENT, RunFolder

_GRID = re.compile(r"step-(\d{1,12})\.png")


def recorded_environment(run: RunFolder) -> tuple[str, list[tuple[str, str]]]:
    """The command that made a run, and its machine and versions; nothing where their record is damaged."""
    try:
        environment = strict_json.read(run.path / ENVIRONMENT)
        command = " ".join(environment.pop("command"))
        packages = environment.pop("packages")
        return command, [(k, str(v)) for k, v in {**environment, **packages}.items() if v is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"not known: {ENVIRONMENT} is damaged", []


BASELINE = "before training: teacher, teacher in few steps, generator"


def grids(run: RunFolder, rows: str, unit: str) -> list[Picture]:
    """The sample grids of a run, oldest first. rows: what stands above what; unit: what the steps count."""
    found = sorted(grid_steps(run).items())
    return [Picture(path, f"{unit} {step}: {rows if step else BASELINE}") for step, path in found]


def grid_steps(run: RunFolder) -> dict[int, Path]:
    """The sample grids of a run by their step; other files beside them, and what is none (a pipe), are left alone."""
    named = {path: _GRID.fullmatch(path.name) for path in sorted(run.samples.glob("step-*.png"))}
    return {int(found[1]): path for path, found in named.items() if found and path.is_file()}


def trained_weights(config: DistillConfig) -> str:
    """What of each role is trained, for people."""
    if config.train == "full":
        return "all weights"
    return f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha}"


def sampler_facts(preset: Preset, run: RunFolder) -> list[tuple[str, str]]:
    """Model, picture size, and how teacher and generator are sampled. run: whose report it is."""
    return [
        ("Model", shown_from(run.path, preset.model.path)),
        ("Picture", f"{preset.model.resolution} x {preset.model.resolution} px"),
        ("Teacher", f"{preset.model.teacher_steps} steps, guidance {preset.model.guidance:g}"),
        ("Generator", f"{len(preset.sampler.raw_steps)} steps, eta {preset.sampler.eta:g}"),
    ]


def live_now(seconds_left: float | None, seconds_each: float | None) -> Live:
    """What a page that is written now says of a run that goes on."""
    return Live(datetime.now(UTC), seconds_left, seconds_each)
