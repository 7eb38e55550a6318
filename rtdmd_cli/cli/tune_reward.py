"""`rtdmd tune-reward`: stage 2."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdmd_cli.cli import checking, completing, console
from rtdmd_cli.cli.plan import dry_run_figures, refuse_too_large, this_card
from rtdmd_cli.cli.quiet import attention_left_out
from rtdmd_cli.cli.starting import (
    DEFAULT_PRESET,
    TUNE_REWARD,
    AllowChange,
    Device,
    DryRun,
    Dtype,
    Json,
    Out,
    Overrides,
    Processes,
    Quiet,
    Resume,
    find_prompts,
    find_start,
    going_on,
    in_processes,
    is_follower,
    load_recipe,
)
from rtdmd_cli.config.loader import Resolved, check_overrides, load_preset
from rtdmd_cli.config.places import MOVABLE, is_gone, located
from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rtdmd_cli.engine.prompts.reading import PromptSet
    from rtdmd_cli.engine.storage.checkpoint import Checkpoint
    from rtdmd_cli.engine.storage.run_folder import RunFolder
    from rtdmd_cli.engine.training.session import Outcome
    from rtdmd_cli.engine.training.start import Start

SUFFIX = "-tuned"


RewardNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=WEIGHT]",
        help="Reward to train on, in place of the preset's; repeatable. MODULE:CLASS loads your own.",
        autocompletion=completing.rewards,
    ),
]
Stage1 = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN|CHECKPOINT",
        help="Stage-1 run or checkpoint to start from. Default: the newest finished distill run.",
        autocompletion=completing.runs,
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        help="Preset with the recipe: a name or a file. Default: the stage-1 run's.",
        autocompletion=completing.presets,
    ),
]
RunName = Annotated[
    str | None, typer.Option(help=f"Name of the run. Default: the stage-1 run's, with {SUFFIX}.")
]


def tune_reward(
    reward: RewardNames = None,
    from_: Stage1 = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    name: RunName = None,
    out: Out = Path("runs"),
    resume: Resume = "never",
    allow_change: AllowChange = None,
    device: Device = None,
    dtype: Dtype = None,
    processes: Processes = None,
    dry_run: DryRun = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Raise a generator's rewards (stage 2).

    It starts from a run of rtdmd distill. The fake score goes on learning what the generator draws; with
    tune_reward.tilt it sees more of the pictures that score poorly, and distribution matching then moves the generator
    away from them. While it runs, look at runs/NAME/report.html or rtdmd runs view.

    Example: rtdmd tune-reward --reward shapes-clip --reward shapes-geneval-soft
    """
    if not dry_run:
        in_processes(processes)
    quiet, silent = quiet or is_follower(), is_follower()
    console.quiet_libraries(quiet)
    settings = settings_of(reward, overrides or [], device, dtype)
    check_overrides(settings, preset or DEFAULT_PRESET)  # before a run is looked for
    run, checkpoint = stage_1_of(from_, out, quiet)
    run_name = run.path.resolve().name + SUFFIX if name is None else name
    resolved = load_recipe(preset or str(run.preset), settings, resume, out, run_name)
    require_same_model(run, resolved)
    from rtdmd_cli.engine.prompts.reading import known_by

    config = resolved.preset.tune_reward
    prompts, eval_prompts = prompts_of(resolved, dry_run)
    known = known_by(prompts, eval_prompts) if prompts and eval_prompts else None
    start = find_start(resume, out, name, run_name, resolved, known, quiet, TUNE_REWARD, allow_change or ())
    if dry_run or prompts is None or eval_prompts is None:
        count = len(prompts) if prompts else None
        figures = dry_run_figures(resolved, "tune-reward", quiet)
        shown = plan(resolved, checkpoint, count, out / run_name, start) | figures
        sources = [config.prompts, *([config.eval_prompts] if config.eval_prompts else [])]
        checking.report(shown, checking.findings(resolved, True, sources), json_output)
        return
    checking.require_adapters(resolved.preset)
    if left_out := attention_left_out():
        console.say(left_out, quiet)
    refuse_too_large(resolved, "tune-reward", this_card(resolved.preset.hardware.device))
    from rtdmd_cli.engine.compute.importing import quick_imports

    with console.working(quiet) as say:
        say(console.LOADING)
        with quick_imports():
            from rtdmd_cli.engine.tune_reward.run import run_tune, stage_1_state
        say(f"from {run.path}, {checkpoint.path.name}")
        begin = stage_1_state(checkpoint)
        outcome = run_tune(resolved, prompts, eval_prompts, begin, start, out, run_name, sys.argv, say, quiet)
    if not silent:
        console.show(result(outcome, resolved, json_output), json_output)
    finish(outcome, quiet)


def prompts_of(resolved: Resolved, dry_run: bool) -> tuple["PromptSet | None", "PromptSet | None"]:
    """The prompts of training and of measuring, checked against the rewards; None where a dry run has none at hand."""
    config = resolved.preset.tune_reward
    prompts = find_prompts(config.prompts, dry_run, "tune_reward.prompts")
    eval_prompts = prompts
    if config.eval_prompts:
        eval_prompts = find_prompts(config.eval_prompts, dry_run, "tune_reward.eval_prompts")
    if prompts:
        check_rewards(resolved, prompts, "tune_reward.prompts")
    if eval_prompts and eval_prompts is not prompts:
        check_rewards(resolved, eval_prompts, "tune_reward.eval_prompts")
    return prompts, eval_prompts


def settings_of(
    rewards: list[str] | None, overrides: list[str], device: str | None, dtype: str | None
) -> list[str]:
    """The command line as overrides of preset keys. UsageError for a reward that can't be read."""
    settings = list(overrides)
    if rewards:
        try:
            split_weights(rewards)
        except ValueError as error:
            raise UsageError(
                f"--reward {error}.", "Write it as --reward NAME or --reward NAME=0.5"
            ) from error
        settings.append(f"tune_reward.rewards={json.dumps(rewards)}")
    return [
        *settings,
        *(f"hardware.{key}={text}" for key, text in (("device", device), ("dtype", dtype)) if text),
    ]


def stage_1_of(reference: str | None, out: Path, quiet: bool) -> tuple["RunFolder", "Checkpoint"]:
    """The stage-1 run that `reference` names (None: the newest finished one) and the checkpoint to start from.

    UsageError if there is none; DataError for a run of another stage or without a good checkpoint.
    """
    from rtdmd_cli.engine.storage import checkpoint, run_folder

    if reference is None:
        newest = run_folder.find_newest_finished(out, "distill")
        if newest is None:
            raise UsageError(
                f"There is no finished stage-1 run under {out}/ to start from.",
                "Make one first: rtdmd distill --preset shapes-4step",
            )
        reference = str(newest.path)
    named = run_folder.resolve_run(reference, out)
    if named is None or named.run is None:
        raise UsageError(
            f"`{reference}` is neither a run nor a checkpoint of one.", f"Look at the folders under {out}/."
        )
    if named.run.stage != "distill":
        raise DataError(
            f"{named.run.path} is a run of rtdmd {named.run.stage}, not of rtdmd distill.",
            "To continue it, give --resume and its name.",
        )
    path, skipped = (
        (named.checkpoint, []) if named.checkpoint else checkpoint.newest_valid(named.run.checkpoints)
    )
    for bad, reason in skipped:
        console.say(f"skipped the checkpoint {bad.name}: {reason}", quiet)
    if path is None:
        raise DataError(
            f"{named.run.path} has no good checkpoint.", "Continue it with rtdmd distill --resume."
        )
    return named.run, checkpoint.load_checkpoint(path, once=True)


def require_same_model(run: "RunFolder", resolved: Resolved) -> None:
    """DataError if the recipe is for another model than stage 1's, or other noise levels than it was made for."""
    made_with, now = located(load_preset(str(run.preset), environ={}).preset), resolved.preset
    pairs = {
        "model.family": (made_with.model.family, now.model.family),
        "model.path": (made_with.model.path, now.model.path),
        "distill.train": (made_with.distill.train, now.distill.train),
        "model.generator_init": (made_with.model.generator_init, now.model.generator_init),
        "distill.lora": (made_with.distill.lora, now.distill.lora),
        "sampler.raw_steps": (made_with.sampler.raw_steps, now.sampler.raw_steps),
    }
    for key, (before, after) in pairs.items():
        moved = key in MOVABLE and is_gone(str(before))  # the weights are compared when they are loaded
        if before != after and not moved:
            raise DataError(
                f"{run.path} was distilled with another `{key}` than the preset has.",
                "Leave --preset and that --set out: the run's own recipe is then used.",
            )


def check_rewards(resolved: Resolved, prompts: "PromptSet", key: str) -> None:
    """UsageError for an unknown reward, DataError where the prompts of `key` lack what one needs; nothing is loaded."""
    from rtdmd_cli.engine.rewards.base import require_metadata
    from rtdmd_cli.engine.rewards.registry import find_reward

    config = resolved.preset.tune_reward
    for name in (*split_weights(config.rewards), *config.held_out):
        try:
            require_metadata(find_reward(name), prompts.metadata)
        except DataError as error:
            raise DataError(f"`{key}`: {error.message}", error.hint) from error


def plan(
    resolved: Resolved, checkpoint: "Checkpoint", prompts: int | None, run: Path, start: "Start"
) -> dict[str, object]:
    """What a dry run prints: nothing has been loaded but prompts (None: not fetched yet) and checkpoints."""
    preset, config = resolved.preset, resolved.preset.tune_reward
    return {
        "run": str(start.run.path if start.run else run),
        "from": str(checkpoint.path),
        "preset": preset.name,
        "preset_sha256": resolved.sha256,
        "model": preset.model.path,
        "rewards": ", ".join(config.rewards),
        "held_out": ", ".join(config.held_out),
        "prompts": prompts,
        "start": start.checkpoint.step if start.checkpoint else 0,
        "epochs": config.epochs,
        "images_per_epoch": config.images_per_epoch,
        "images_per_prompt": config.images_per_prompt,
        "micro_batch": config.micro_batch or config.images_per_epoch,
        "device": checking.device_of(preset.hardware.device),
        "to_download": "; ".join(checking.downloads(resolved, True)) or None,
        "dtype": preset.hardware.dtype,
    }


def result(outcome: "Outcome", resolved: Resolved, as_json: bool) -> dict[str, Any]:
    """What the command prints at its end; for people a line for each reward."""
    from rtdmd_cli.engine.rewards.registry import find_reward
    from rtdmd_cli.engine.storage.checkpoint import step_name
    from rtdmd_cli.engine.tune_reward.checks import followed
    from rtdmd_cli.engine.tune_reward.watch import BEST, alarm

    config = resolved.preset.tune_reward
    before, after = outcome.records["rewards_before"], outcome.records["rewards_after"]
    trained = followed(config, [name for name in before if find_reward(name).differentiable])
    rewards: dict[str, Any] = {
        name: {"before": before[name], "after": after[name], "trained_on": name in trained}
        for name in sorted(before, key=lambda name: name in trained)  # those held out first
    }
    if not as_json:
        rewards = {
            name: f"{each['before']:.4f} -> {each['after']:.4f}" + ", trained on" * each["trained_on"]
            for name, each in rewards.items()
        }
    best, warning = outcome.records.get(BEST), alarm(outcome.records)
    kept = None if best is None else str(outcome.run / "checkpoints" / step_name(best))
    watched = {"best_checkpoint": kept, "warning": warning or None}
    return {
        "run": str(outcome.run),
        "epochs": outcome.iterations,
        "seconds": round(outcome.seconds, 1),
        "checkpoint": str(outcome.checkpoint),
        "report": str(outcome.run / "report.html"),
        "finished": outcome.iterations >= config.epochs,
        **(watched if as_json else {key: text for key, text in watched.items() if text}),
        **({"rewards": rewards} if as_json else rewards),
    }


def finish(outcome: "Outcome", quiet: bool) -> None:
    """Say what to do next; leave with the signal's exit code after a signal."""
    from rtdmd_cli.engine.tune_reward.watch import advice

    if outcome.signal_exit_code:
        from rtdmd_cli.engine.storage.run_folder import RunFolder

        again = going_on(RunFolder(outcome.run), TUNE_REWARD.name)
        console.say(f"Stopped and saved. Go on with: {again}", quiet)
        raise typer.Exit(outcome.signal_exit_code)
    advised = advice(outcome.records)
    if advised:
        console.say(advised, quiet)
    console.say(
        f"Look at {outcome.run / 'report.html'}, or draw: rtdmd sample PROMPT --from {outcome.run}", quiet
    )
