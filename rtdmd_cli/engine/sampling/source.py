"""What `--from` names.

A name is looked up in this order: a path (a run folder, a checkpoint folder, an exported folder), the name of a run, a
preset (its untouched base model). Without `--from` it is the newest finished run, or else the built-in model. From a run
it takes the checkpoint that the run names as its best by held-out rewards, or else the newest.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from rtdmd_cli.config.loader import load_preset, preset_names, preset_path
from rtdmd_cli.config.places import PATHS, is_gone
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.sampling.sample import Kind
from rtdmd_cli.engine.storage.checkpoint import checkpoint_steps, newest_valid, step_name, verify_checkpoint
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.exported import Exported, is_exported, read_exported
from rtdmd_cli.engine.storage.hub import REPOSITORY
from rtdmd_cli.engine.storage.run_folder import RunFolder, find_newest_finished, is_run, open_run, resolve_run
from rtdmd_cli.errors import DataError, UsageError

DEFAULT_PRESET = "shapes-4step"
BEST, LAST = "best", "last"
LONGEST_NAME = 255  # characters of a file name


@dataclass(frozen=True)
class Source:
    """A generator (with its checkpoint) or a teacher (the preset's base model).

    preset: a generator's is its run's. label: a name for people and for results, without folders.
    notes: lines for stderr about what was chosen. exported: where the generator is an exported folder.
    """

    kind: Kind
    preset: Preset
    checkpoint: Path | None
    label: str
    notes: tuple[str, ...] = ()
    exported: Exported | None = None


def resolve(reference: str | None, out: Path, checkpoint: str | None = None) -> Source:
    """Find what `reference` names; `out` is the folder of the runs. Loads no model.

    checkpoint: of a run, "best", "last" or a step; None for the best where the run names one.
    UsageError where it names nothing, for an unknown checkpoint, and for a checkpoint of what is no run. DataError for a
    damaged run or checkpoint, or a run without any.
    """
    if checkpoint is not None and checkpoint not in (BEST, LAST) and not checkpoint.isdecimal():
        raise UsageError(f"`{checkpoint}` names no checkpoint.", "Give --checkpoint best, last or a step.")
    if reference is None:
        return _default(out, checkpoint)
    found = _in_folders(reference, out, checkpoint)
    if found is None and checkpoint is not None:
        raise UsageError(
            f"`{reference}` is no run, so that it has no checkpoints.", "Leave --checkpoint out."
        )
    if found is None:
        return _from_preset(reference, out)
    return replace(found, notes=(*_namesake(reference), *found.notes))


def _namesake(reference: str) -> list[str]:
    """A line where a preset bears the name of what was found among the runs."""
    if reference not in preset_names():
        return []
    return [f"`{reference}` is a run here; the base model of the preset is --from {preset_path(reference)}"]


def _in_folders(reference: str, out: Path, checkpoint: str | None) -> Source | None:
    """The run or checkpoint of that path or name; None if there is none."""
    path, there = Path(reference), bool(reference) and os.path.exists(reference)
    if not there and (path.name != reference or len(reference) > LONGEST_NAME):
        return None
    with os_errors(path, "read"):
        found = resolve_run(reference, out)
    if found is not None and found.checkpoint is None and found.run is not None:
        return _from_run(found.run, checkpoint)
    if checkpoint is not None and (found is not None or (there and is_exported(path))):
        raise UsageError(f"{reference} is no run, so that it has no checkpoints.", "Leave --checkpoint out.")
    if found is not None and found.checkpoint is not None:
        return _from_checkpoint(found.checkpoint, found.run)
    if there and is_exported(path):
        exported = read_exported(path)
        label = f"{path.resolve().name} (export)"
        return Source("generator", exported.preset, None, label, exported=exported)
    if there and path.is_dir():
        if path.resolve().parent.name == "checkpoints":
            verify_checkpoint(path)  # says what is missing
        if (path / "checkpoints").is_dir():
            open_run(path)  # likewise
    return None


def _default(out: Path, checkpoint: str | None) -> Source:
    run = find_newest_finished(out)
    if run is None and checkpoint is not None:
        raise UsageError(
            f"There is no finished run under {out}/.", "Name one with --from, or leave --checkpoint out."
        )
    if run is None:
        source = _from_preset(DEFAULT_PRESET, out)
        note = f"no finished run under {out}/: using the built-in model, untrained for few steps"
    else:
        source = _from_run(run, checkpoint)
        note = f"using {source.label}, the newest finished run under {out}/"
    return replace(source, notes=(note, *source.notes))


def _from_run(run: RunFolder, checkpoint: str | None) -> Source:
    """The checkpoint of a run that is asked for; damaged ones that are newer than the newest good one are named."""
    if checkpoint is not None and checkpoint.isdecimal():
        return _from_checkpoint(_at_step(run, int(checkpoint)), run)
    best = None if checkpoint == LAST else run.best_checkpoint
    if checkpoint == BEST and best is None:
        raise UsageError(
            f"{run.path} names no best checkpoint: no held-out reward was measured on the way.",
            "Leave --checkpoint out, or give --checkpoint last.",
        )
    if best is not None:
        verify_checkpoint(best)
        return _generator(best, run, _why(best, run))
    newest, skipped = newest_valid(run.checkpoints)
    if newest is None and skipped:
        raise DataError(
            f"{run.path} has no good checkpoint: {skipped[0][1]}", "Train it again, or take another run."
        )
    if newest is None:
        raise DataError(
            f"{run.path} has no checkpoint yet.",
            "Wait for its first one, or sample its base model by the preset's name.",
        )
    notes = tuple(f"skipped a damaged checkpoint: {reason}" for _, reason in skipped)
    return _generator(newest, run, notes)


def _why(best: Path, run: RunFolder) -> tuple[str, ...]:
    """A line where the best checkpoint is not the newest."""
    if checkpoint_steps(run.checkpoints)[-1:] == [int(best.name.removeprefix("step-"))]:
        return ()
    return (f"taking {best.name}, the best by the held-out rewards; the newest: --checkpoint last",)


def _at_step(run: RunFolder, step: int) -> Path:
    """The checkpoint of that step; UsageError, naming those there are, without it."""
    steps = checkpoint_steps(run.checkpoints)
    if step not in steps:
        there = ", ".join(str(each) for each in steps) or "none"
        raise UsageError(f"{run.path} has no checkpoint of step {step}.", f"There are: {there}.")
    return run.checkpoints / step_name(step)


def _from_checkpoint(path: Path, run: RunFolder | None) -> Source:
    verify_checkpoint(path)
    if run is None:
        raise DataError(
            f"The checkpoint {path} lies outside a run folder, so its preset is unknown.",
            "Put it back under RUN/checkpoints/, beside the run's preset.resolved.yaml.",
        )
    return _generator(path, run, ())


def _generator(checkpoint: Path, run: RunFolder, notes: tuple[str, ...]) -> Source:
    try:
        preset = load_preset(str(run.preset), environ={}).preset
    except UsageError as error:
        raise DataError(f"The run {run.path} is damaged: {error.message}", error.hint) from error
    for key in PATHS["model"]:
        place = preset.model.model_dump()[key]
        if is_gone(place):
            raise DataError(
                f"The run {run.path} was made with model.{key} {place}, where nothing is any more.",
                f"Write its new place into {run.preset}.",
            )
    return Source("generator", preset, checkpoint, f"{run.path.resolve().name}/{checkpoint.name}", notes)


def _from_preset(reference: str, out: Path) -> Source:
    named = _of_hub(reference)
    if named is not None:
        return named
    try:
        path = preset_path(reference)
    except UsageError as error:
        raise _unknown(reference, out) from error
    if not os.path.isfile(path):
        raise _unknown(reference, out)
    preset = load_preset(reference).preset
    return Source("teacher", preset, None, f"{preset.name} (base model)")


def _of_hub(reference: str) -> Source | None:
    """The base model that a hub id names, by the first shipped preset of it; None where there is none."""
    if not _is_hub_id(reference):
        return None
    for name in preset_names():
        preset = load_preset(name, environ={}).preset
        if preset.model.path == reference:
            note = f"{reference} as the preset {name} has it"
            return Source("teacher", preset, None, f"{reference} (base model)", (note,))
    return None


def _is_hub_id(reference: str) -> bool:
    file = reference.endswith((".yaml", ".yml")) or os.path.exists(reference)
    return re.fullmatch(REPOSITORY, reference) is not None and not file


def _unknown(reference: str, out: Path) -> UsageError:
    shown = reference if len(reference) <= 80 else reference[:77] + "..."
    names = preset_names()
    if out.is_dir():
        with os_errors(out, "list"):
            names += [path.name for path in out.iterdir() if is_run(path)]
    if _is_hub_id(reference):
        return UsageError(
            f"`{shown}` is neither a folder nor a model of a shipped preset.",
            f"For another hub model copy a preset of its family: --set model.path={shown} (rtdmd presets list).",
        )
    near = get_close_matches(reference, sorted(names), n=1)
    return UsageError(
        f"`{shown}` is no run or checkpoint folder, no exported folder, no run under {out}/, and no preset.",
        f"Did you mean `{near[0]}`?" if near else "List what there is: rtdmd runs list, rtdmd presets list",
    )


def refuse_guidance(source: Source, guidance: float | None) -> None:
    """UsageError for guidance on a generator, before anything is loaded."""
    if source.kind == "generator" and guidance not in (None, 1):
        raise UsageError("A generator is sampled without guidance.", "Leave --guidance out, or give 1.")
