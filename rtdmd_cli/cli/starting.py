"""What `distill` and `tune-reward` share: their options, and where a training starts, anew or continued."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from rtdmd_cli.cli import completing, console
from rtdmd_cli.config.loader import Resolved, load_preset
from rtdmd_cli.config.places import MOVABLE, is_gone, located, where_to_look, with_whole_paths
from rtdmd_cli.errors import DataError, RtdmdError, UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.prompts.reading import PromptSet
    from rtdmd_cli.engine.storage.checkpoint import Checkpoint
    from rtdmd_cli.engine.storage.run_folder import RunFolder, RunReference
    from rtdmd_cli.engine.training.start import Start


DEFAULT_PRESET = "shapes-4step"
"""Of every command that takes a preset and is given none."""

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a preset value; repeatable.",
        autocompletion=completing.keys,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|PATH",
        help="auto: continue the run, if there is one. PATH: a run or checkpoint.",
    ),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="Continue although KEY (such as hardware.dtype) has changed; the run notes it. Repeatable.",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="Processes that share every batch, one for each GPU; run by accelerate."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, stop.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


Change: TypeAlias = tuple[str, Any, Any]
"""A key of the preset, its value before and now."""


@dataclass(frozen=True)
class Stage:
    """A stage's name, and what may differ when one of its runs is continued: keys, and beginnings of keys."""

    name: str
    free: tuple[str, ...]
    free_sections: tuple[str, ...]

    @property
    def rates(self) -> tuple[str, ...]:
        """Keys that a new run may set anew as it goes on from another's checkpoint, after a loss of nan, say."""
        return tuple(f"{self.name.replace('-', '_')}.{key}" for key in RATES)


RATES = ("generator_lr", "fake_lr", "lr_warmup", "lr_decay", "grad_clip")
_SCHEDULE = ("save_every", "save_minutes", "keep", "log_every", "sample_every")
_FREE_DISTILL = (
    "name",
    "description",
    "distill.iterations",
    "distill.micro_batch",
    "distill.consistency_batched",
    "distill.boundaries_batched",
    *(f"distill.{key}" for key in _SCHEDULE),
)
DISTILL = Stage("distill", _FREE_DISTILL, ("evaluate.", "hardware.", "previews.", "tune_reward."))
TUNE_REWARD = Stage(
    "tune-reward",
    (
        *_FREE_DISTILL,
        "tune_reward.epochs",
        "tune_reward.micro_batch",
        "tune_reward.rewards_in_memory",
        "tune_reward.reward_seconds",
        "tune_reward.max_bad_share",
        "tune_reward.watch.stop",
        *(f"tune_reward.{key}" for key in _SCHEDULE),
        "evaluate.images_per_prompt",
        "evaluate.batch",  # not evaluate.seed: rewards are measured with it before and after
    ),
    ("hardware.", "previews."),
)


AUTO = "auto"
PRECISION = ("hardware.dtype", "hardware.base", "hardware.float32_matmul", "hardware.mixed_precision")
"""Keys that change the numbers of a run; `--allow-change` takes them."""


def is_follower() -> bool:
    """Whether this is one of several processes and not the one that speaks."""
    from rtdmd_cli.engine.compute import processes

    return processes.is_follower()


def in_processes(count: int | None) -> None:
    """Run this very command in `count` processes, and leave with their exit code; nothing for one or inside one."""
    from rtdmd_cli.engine.compute.processes import launched

    if count is None or count == launched():
        return
    if launched() > 1:
        raise UsageError(
            f"`--processes` is {count}, and a launcher has started {launched()} already.",
            "Leave --processes out.",
        )
    from rtdmd_cli.cli.launching import launch

    raise typer.Exit(launch(count, sys.argv[1:]))


def going_on(run: "RunFolder", stage: str | None) -> str:
    """The command that continues a run; of stage 2 its end alone, where it isn't known what it began from.

    stage: "distill", "tune-reward", or None where the folder doesn't tell.
    """
    again = ["--preset", str(run.preset), "--resume", str(run.path)]
    if stage != TUNE_REWARD.name:
        return shlex.join(["rtdmd", "distill", *again])
    begun = run.begun_from
    places = [] if begun is None else [begun, begun.parent.parent]  # its run, where the checkpoint has gone
    stage_1 = next((path for path in places if path.is_dir()), None)
    if stage_1 is None:
        return f"the same command and {shlex.join(['--resume', str(run.path)])}"
    return shlex.join(["rtdmd", "tune-reward", "--from", str(stage_1), *again])


def load_recipe(preset: str, settings: Sequence[str], resume: str, out: Path, run_name: str) -> Resolved:
    """The preset with whole paths, errors of `load_preset`; where its file is gone, the hint names the continued run's own.

    resume: as given; run_name: of the run that `auto` continues.
    """
    try:
        return with_whole_paths(load_preset(preset, settings))
    except UsageError as error:
        own = None if os.path.exists(preset) else own_preset(resume, out, run_name)
        if own is None:
            raise
        raise UsageError(error.message, f"The run has a copy of its own: --preset {own}") from error


def own_preset(resume: str, out: Path, run_name: str) -> Path | None:
    """The preset in the folder of the run that --resume names; None where it names none. DataError if it is gone."""
    from rtdmd_cli.engine.storage.run_folder import resolve_run

    if resume == "never":
        return None
    require_presets(resume, out / run_name, out)
    found = resolve_run(str(out / run_name) if resume == AUTO else resume, out)
    return found.run.preset if found and found.run else None


def find_prompts(source: str, dry_run: bool, key: str) -> "PromptSet | None":
    """The prompts that `key` of a preset names; errors of `read_prompt_set`, and DataError for a file that was moved.

    None in a dry run for what can't be read, which is among what the dry run says at its end.
    """
    from rtdmd_cli.engine.prompts.reading import read_prompt_set

    try:
        if is_gone(source):
            raise DataError(f"There is no prompt file {source}.", where_to_look(key, source))
        return read_prompt_set(source)
    except RtdmdError:
        if not dry_run:
            raise
        return None


def find_start(
    resume: str,
    out: Path,
    name: str | None,
    run_name: str,
    resolved: Resolved,
    prompts: str | None,
    quiet: bool,
    stage: Stage,
    allow: Sequence[str] = (),
) -> "Start":
    """What --resume asks for; nothing is made or loaded but the checkpoint.

    name: as given; run_name: with the default in its place. prompts: `reading.known_by` of the prompts, None
    where a dry run has none. allow: keys of PRECISION that may differ from the run's, which is said.

    Raises:
        UsageError: the run exists and is not to be resumed, or PATH names no run; a name that no run can have.
        DataError: no good checkpoint, or one that was made with other settings or prompts.
    """
    from rtdmd_cli.engine.storage import checkpoint, run_folder
    from rtdmd_cli.engine.training.start import Start

    require_precision(allow)
    if name is not None or resume in (AUTO, "never"):
        run_folder.check_name(run_name)
    if resume == "never":
        run_folder.refuse_existing(out / run_name)
        return Start(None, None)
    reference = reference_of(resume, out / run_name, out)
    if reference is None:
        return Start(None, None)
    run, chosen = reference.run, reference.checkpoint
    path = chosen or (newest(run, quiet) if run else None)
    loaded = checkpoint.load_checkpoint(path, once=True) if path else None
    other = name if name and (run is None or run.path.resolve() != (out / name).resolve()) else None
    free = (*allow, *stage.rates) if other else allow
    changes = require_same_training(run, loaded, resolved, prompts, stage, free)
    for key, before, now in changes:
        console.say(f"{'moved' if key in MOVABLE else 'allowed'}: {key} was {before}, now {now}", quiet)
    if other:
        if loaded is None:
            raise DataError(f"{resume} has no checkpoint yet.", "Start a run of its own: leave --resume out.")
        run_folder.refuse_existing(out / other)
        console.say(f"a new run from {loaded.path}, at iteration {loaded.step}", quiet)
        return Start(None, loaded, frozenset(allow), changes)
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
    return Start(run, loaded, frozenset(allow), changes)


def require_precision(keys: Sequence[str]) -> None:
    """UsageError for a key that `--allow-change` does not take."""
    for key in keys:
        if key not in PRECISION:
            raise UsageError(
                f"--allow-change does not take `{key}`.",
                f"It takes {', '.join(PRECISION)}; for another recipe start another run with --name OTHER.",
            )


def reference_of(resume: str, run: Path, out: Path) -> "RunReference | None":
    """What `--resume auto` or `--resume PATH` names; None where auto finds no run of that path to continue."""
    from rtdmd_cli.engine.storage import run_folder

    require_presets(resume, run, out)
    if resume != AUTO:
        named = run_folder.resolve_run(resume, out)
        if named is None:
            raise UsageError(
                f"`{resume}` is neither auto, never, a run nor a checkpoint.",
                "Look at the folders under runs/.",
            )
        return named
    if run_folder.is_run(run):
        return run_folder.RunReference(run_folder.RunFolder(run), None)
    run_folder.refuse_existing(run)
    return None


def require_presets(resume: str, run: Path, out: Path) -> None:
    """DataError where --resume names a run but for its preset, without which nothing tells what it trained.

    run: which `auto` continues.
    """
    from rtdmd_cli.engine.storage import checkpoint, run_folder, runs

    for folder in (run,) if resume == AUTO else (Path(resume), out / resume):
        if not runs.looks_like_run(folder) or run_folder.is_run(folder):
            continue
        newest, _ = checkpoint.newest_valid(folder / "checkpoints")
        own = f"go on in a run of its own: --resume {newest} --name OTHER" if newest else "leave --resume out"
        raise DataError(
            f"The run {folder} is damaged: {run_folder.PRESET} is missing.",
            f"Restore that file, or {own}",
        )


def require_same_training(
    run: "RunFolder | None",
    loaded: "Checkpoint | None",
    resolved: Resolved,
    prompts: str | None,
    stage: Stage,
    allow: Sequence[str] = (),
) -> "tuple[Change, ...]":
    """Raise DataError if run or checkpoint is of another stage, other prompts or another recipe; allowed changes."""
    if loaded and loaded.state.get("stage") != stage.name:
        raise DataError(
            f"{loaded.path} was not made by rtdmd {stage.name}.",
            f"Choose a checkpoint of rtdmd {stage.name}.",
        )
    if run and run.stage != stage.name:
        raise DataError(
            f"{run.path} is a run of rtdmd {run.stage}, not of rtdmd {stage.name}.",
            "Start another run with --name OTHER.",
        )
    if loaded and prompts is not None and loaded.meta.get("prompts_sha256", prompts) != prompts:
        raise DataError(
            f"{loaded.path} was trained on other prompts than these.",
            "Restore the prompt file, or start a run of its own: --name OTHER, without --resume.",
        )
    return require_same_recipe(run.preset, resolved, stage, allow) if run else ()


def newest(run: "RunFolder", quiet: bool) -> Path | None:
    """The newest good checkpoint of a run, saying which were skipped; None where the run never saved one."""
    from rtdmd_cli.engine.storage import checkpoint

    path, skipped = checkpoint.newest_valid(run.checkpoints)
    for bad, reason in skipped:
        console.say(f"skipped the checkpoint {bad.name}: {reason}", quiet)
    if path is None and skipped:
        raise DataError(
            f"No checkpoint of {run.path} is intact: {skipped[0][1]}", "Start another run with --name OTHER."
        )
    return path


def require_same_recipe(
    own: Path, resolved: Resolved, stage: Stage, allow: Sequence[str] = ()
) -> "tuple[Change, ...]":
    """Raise DataError, naming the keys, if a run's preset differs in what changes the computation.

    allow: keys of PRECISION that may; those that do are returned, with their values before and now. So are new places
    of files and folders that were moved: what they hold is compared by its sha256 later.
    """
    from rtdmd_cli.config.loader import preset_values

    try:
        made_with = located(load_preset(str(own), environ={}).preset)
    except UsageError as error:
        raise DataError(f"The run {own.parent} is damaged: {error.message}", error.hint) from error
    before, now = preset_values(made_with), preset_values(resolved.preset)
    changed = [
        key
        for key in now
        if before[key] != now[key]
        and key not in stage.free
        and (key in PRECISION or not key.startswith(stage.free_sections))
        and not (
            key == "hardware.dtype" and AUTO in (before[key], now[key])
        )  # `restoring.accepted` knows which it is
    ]
    moved = [key for key in changed if key in MOVABLE and is_gone(before[key]) and os.path.exists(now[key])]
    changed = [key for key in changed if key not in moved]
    differing = [key for key in changed if key in PRECISION and key not in allow]
    if changed and changed == differing:
        pairs = ", ".join(f"{key} was {before[key]}, now {now[key]}" for key in differing)
        raise DataError(
            f"{own.parent} was trained with other precision settings: {pairs}.",
            f"Set it as before, or accept that: {' '.join(f'--allow-change {key}' for key in differing)}",
        )
    allowed = tuple(
        (key, before[key], now[key]) for key in [*moved, *changed] if key in allow or key in moved
    )
    changed = [key for key in changed if key not in allow]
    if changed:
        pairs = ", ".join(f"{key} was {before[key]}, now {now[key]}" for key in changed[:3])
        raise DataError(
            f"{own.parent} was made with other settings: {pairs}.", other_recipe(own, changed, stage)
        )
    return allowed


def other_recipe(own: Path, changed: Sequence[str], stage: Stage) -> str:
    """What to do where a run's recipe differs in these keys."""
    from rtdmd_cli.engine.storage.run_folder import RunFolder

    if {*changed} <= {*stage.rates}:
        return "Go on from its checkpoint in a run of its own: add --name OTHER."
    again = going_on(RunFolder(own.parent), stage.name)
    return f"Go on with its own settings: {again}; or start another run: --name OTHER, without --resume."
