"""The steps of `rtdmd eval`: make or find pictures, have them judged, write what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdmd_cli.cli import console
from rtdmd_cli.cli.counting import counting
from rtdmd_cli.cli.sample import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rtdmd_cli.engine.compute.signals import StopRequest
    from rtdmd_cli.engine.evaluation.benchmarks import Benchmark
    from rtdmd_cli.engine.evaluation.metrics import JudgeEntry
    from rtdmd_cli.engine.evaluation.prompts import EvalPrompts
    from rtdmd_cli.engine.evaluation.run import Evaluation
    from rtdmd_cli.engine.evaluation.tables import Shown
    from rtdmd_cli.engine.sampling.source import Source


@dataclass(frozen=True)
class Options:
    """What the command line says. keep: write a folder, also where none is named."""

    from_: str | None
    steps: int | None
    guidance: float | None
    images: int | None
    limit: int | None
    seed: int | None
    paths: tuple[str, ...]
    out: Path | None
    keep: bool
    resume: bool
    batch: int | None
    device: str | None
    dtype: str | None
    quiet: bool
    compare: str | None = None
    size: int | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class Made:
    """Pictures that are ready to be judged: an evaluation without scores, and where the judges compute."""

    evaluation: Evaluation
    device: torch.device


class Interrupted(Exception):
    """A signal came; what is done is kept. folder: where, or None for nowhere."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self.folder = folder


def make(
    benchmark: Benchmark,
    judges: tuple[JudgeEntry, ...],
    prompts_file: str | None,
    options: Options,
    stop: StopRequest,
    held: ExitStack,
) -> Made:
    """Make the pictures; the model is gone when this returns. held: takes the lock on the folder."""
    from rtdmd_cli.engine.evaluation.prompts import choose_prompts
    from rtdmd_cli.engine.evaluation.run import check

    prompts = choose_prompts(benchmark, prompts_file, options.limit)
    check(judges, prompts)
    return _make(benchmark, judges, prompts, options, stop, held)


def _make(
    benchmark: Benchmark,
    judges: tuple[JudgeEntry, ...],
    prompts: EvalPrompts,
    options: Options,
    stop: StopRequest,
    held: ExitStack,
) -> Made:
    from rtdmd_cli.engine.compute.device import free_memory

    made = _painted(benchmark, judges, prompts, options, stop, held)
    free_memory(made.device)
    return made


def _painted(
    benchmark: Benchmark,
    judges: tuple[JudgeEntry, ...],
    prompts: EvalPrompts,
    options: Options,
    stop: StopRequest,
    held: ExitStack,
) -> Made:
    from rtdmd_cli.engine.evaluation.generate_phase import Generation
    from rtdmd_cli.engine.evaluation.run import Ask, Evaluation, generate, require_size
    from rtdmd_cli.engine.evaluation.run import trained_on as judges_trained_on
    from rtdmd_cli.engine.sampling.pictures import default_batch

    source, model = load_model(
        options.from_,
        options.guidance,
        options.device,
        options.dtype,
        options.quiet,
        options.checkpoint,
        list(prompts.texts.values()),
        (options.size, options.size),
    )
    settings = source.preset.evaluate
    side = options.size or settings.resolution or source.preset.model.resolution
    images = options.images or benchmark.images or settings.images_per_prompt
    paths = _paths(judges, options, source)
    _require_weights(judges, paths)
    ask = Ask(benchmark, prompts, images, options.limit, judges, paths)
    require_size(ask, side, side, model.label)
    plan = model.plan(options.steps, options.guidance, (side, side))
    seed = settings.seed if options.seed is None else options.seed
    batch = options.batch or default_batch(source.preset, side, side)
    job = Generation(model, plan, prompts, ask.keys, seed, side, side, batch)
    trained = judges_trained_on(source, judges)
    about = {"conditions": job.conditions(), "trained_on": list(trained), "batch": batch}
    folder = _folder(ask.identity | job.conditions(), about, ask, model.label, options, held)
    _say_missing(judges, paths, options.quiet)
    with counting(len(ask.keys), options.quiet) as advance:
        done = generate(ask, job, folder, stop, advance)
    if done is None:
        raise Interrupted(folder)
    pictures, timing = done
    evaluation = Evaluation(ask, job.conditions(), trained, pictures, folder, timing, {})
    return Made(evaluation, model.backbone.device)


def find_made(
    benchmark: Benchmark,
    judges: tuple[JudgeEntry, ...],
    root: Path,
    prompts_file: str | None,
    options: Options,
    held: ExitStack,
) -> Made:
    """The pictures of a folder that is there."""
    from rtdmd_cli.engine.compute.device import resolve_device
    from rtdmd_cli.engine.evaluation.folder import locked
    from rtdmd_cli.engine.evaluation.run import Ask, Evaluation, check, judge_paths
    from rtdmd_cli.engine.evaluation.score_only import find_pictures

    found = find_pictures(benchmark, root, options.images, options.limit, prompts_file)
    check(judges, found.prompts)
    paths = judge_paths(judges, options.paths)
    ask = Ask(benchmark, found.prompts, found.images, found.limit, judges, paths)
    label = str(found.conditions["model"])
    if found.ours and options.out is None:
        folder: Path | None = root
        held.enter_context(locked(root))
    else:
        about = {"conditions": dict(found.conditions), "trained_on": list(found.trained_on)}
        identity = ask.identity | {"pictures": found.fingerprint, "seed": found.conditions["seed"]}
        folder = _folder(identity, about, ask, label, options, held)
    _say_missing(judges, paths, options.quiet)
    evaluation = Evaluation(ask, found.conditions, found.trained_on, found.pictures, folder, found.timing, {})
    return Made(evaluation, resolve_device(options.device or "auto"))


def score_and_write(
    made: Made, options: Options, stop: StopRequest, held: ExitStack, began: float
) -> dict[str, Any]:
    """Have the pictures judged, write the results, and return the summary. began: when, of time.monotonic()."""
    evaluation = _judged(made, options, stop)
    summary = _summary(evaluation, made.device, time.monotonic() - began)
    beside: list[tuple[Shown, Shown]] = []
    if options.compare is not None:
        summary["compare"], beside = _compared(evaluation, options.compare, options, stop, held)
    if evaluation.folder is not None:
        _write(evaluation, summary, evaluation.folder, made.device, options.quiet, beside)
    return summary


def _compared(
    mine: Evaluation, other: str, options: Options, stop: StopRequest, held: ExitStack
) -> tuple[dict[str, Any], list[tuple[Shown, Shown]]]:
    """The comparison with another evaluation's folder, or with a model that is evaluated in the same way first.

    Also the pictures on which the two differ most.
    """
    from rtdmd_cli.engine.evaluation.comparison import as_json, other_from_folder
    from rtdmd_cli.engine.evaluation.folder import is_evaluation
    from rtdmd_cli.engine.evaluation.report import side_by_side

    assert mine.folder is not None, "--compare keeps a folder"
    ask, seed = mine.ask, mine.conditions["seed"]
    folder = Path(other)
    if not is_evaluation(folder):
        folder = _other_evaluation(mine, other, options, stop, held)
    lines, about = other_from_folder(folder, ask, seed)
    return as_json(mine, lines, about), side_by_side(mine, lines, folder)


def _other_evaluation(
    mine: Evaluation, other: str, options: Options, stop: StopRequest, held: ExitStack
) -> Path:
    """Evaluate the other model beside this one's results, as its preset says, at the same prompts and seed."""
    from rtdmd_cli.engine.evaluation.folder import default_folder
    from rtdmd_cli.engine.storage.scrubbing import scrub_text

    began, ask = time.monotonic(), mine.ask
    assert mine.folder is not None
    theirs = replace(
        options,
        from_=other,
        steps=None,
        guidance=None,
        images=ask.images,
        seed=mine.conditions["seed"],
        out=mine.folder / default_folder("compared", scrub_text(other)).name,
        keep=True,
        resume=True,
        compare=None,
        size=mine.conditions["width"] or options.size,
    )
    console.say(f"now {other}, to compare with", options.quiet)
    made = _make(ask.benchmark, ask.judges, ask.prompts, theirs, stop, held)
    score_and_write(made, theirs, stop, held, began)
    assert made.evaluation.folder is not None
    return made.evaluation.folder


def _judged(made: Made, options: Options, stop: StopRequest) -> Evaluation:
    from rtdmd_cli.engine.evaluation.run import score

    bare = made.evaluation

    def progress(name: str) -> AbstractContextManager[Callable[[int], None]]:
        return counting(len(bare.ask.keys), options.quiet or bare.ask.benchmark.built_in, what=name)

    scores = score(bare.ask, bare.pictures, bare.folder, made.device, stop, progress)
    if scores is None:
        raise Interrupted(bare.folder)
    return replace(bare, scores=scores)


def _summary(evaluation: Evaluation, device: torch.device, seconds: float) -> dict[str, Any]:
    from rtdmd_cli.engine.evaluation.shapes import open_judge
    from rtdmd_cli.engine.evaluation.summary import summarise

    clip = open_judge(device) if evaluation.ask.benchmark.built_in else None
    summary = summarise(evaluation, clip)
    times = {"seconds_per_picture": evaluation.timing.seconds_per_picture, "seconds": seconds}
    return summary | times


def _write(
    evaluation: Evaluation,
    summary: dict[str, Any],
    folder: Path,
    device: torch.device,
    quiet: bool,
    beside: Sequence[tuple[Shown, Shown]],
) -> None:
    from rtdmd_cli.engine.evaluation.folder import REPORT, RESULTS
    from rtdmd_cli.engine.evaluation.report import write_reports
    from rtdmd_cli.engine.evaluation.shapes_grid import SAMPLES, save_verdict_grid
    from rtdmd_cli.engine.evaluation.summary import records, shapes_parts
    from rtdmd_cli.engine.storage.files import write_json

    if evaluation.ask.benchmark.built_in:
        save_verdict_grid(summary, *shapes_parts(evaluation), folder / SAMPLES)
    write_json(folder / RESULTS, console.plain(summary) | {"pictures": records(evaluation)})
    write_reports(evaluation, summary, folder, device, beside)
    console.say(f"wrote {folder / RESULTS} and {folder / REPORT}", quiet)


def say_made(made: Made, as_json: bool, quiet: bool) -> None:
    """What --images-only leaves: the folder on stdout, the next command on stderr."""
    ask, folder = made.evaluation.ask, made.evaluation.folder
    console.show({"folder": folder, "pictures": len(ask.keys)}, as_json)
    console.say(
        f"Judge them with: rtdmd eval {ask.benchmark.file or ask.benchmark.name} --score-only {folder}", quiet
    )


def say_stopped(stopped: Interrupted, quiet: bool) -> None:
    """What is left of a command that was stopped."""
    if stopped.folder is None:
        console.say("Stopped; nothing was kept. With --out it could go on.", quiet)
    else:
        console.say(f"Stopped; {stopped.folder} is kept. Go on with the same command and --resume.", quiet)


def _folder(
    identity: dict[str, Any],
    about: dict[str, Any],
    ask: Any,
    label: str,
    options: Options,
    held: ExitStack,
) -> Path | None:
    """The folder to write to, begun and locked; None where nothing is kept."""
    from rtdmd_cli.engine.evaluation import folder as eval_folder
    from rtdmd_cli.engine.storage.scrubbing import scrub

    if not options.keep:
        return None
    wanted = options.out or eval_folder.default_folder(ask.benchmark.name, label)
    folder, goes_on = eval_folder.choose_folder(wanted, identity, options.resume)
    held.enter_context(eval_folder.locked(folder))
    if goes_on:
        console.say(f"going on with {folder}", options.quiet)
        return folder
    if folder != wanted:
        console.say(f"{wanted} holds something already: writing to {folder}", options.quiet)
    command = scrub([Path(part).name if number == 0 else part for number, part in enumerate(sys.argv)])
    more = {
        "command": command,
        "foreign_prompts": list(ask.prompts.foreign),
        "departures": list(ask.departures),
        "prompts": len(ask.prompts),
    }
    eval_folder.write_about(folder, identity, about | more)
    return folder


def _paths(judges: Sequence[JudgeEntry], options: Options, source: Source) -> dict[str, str]:
    """Where judges' weights are: the preset's paths of rewards, the command line's before them."""
    from rtdmd_cli.config.tune_reward import split_paths
    from rtdmd_cli.engine.evaluation.run import judge_paths

    names = {entry.name for entry in judges}
    usual = split_paths(source.preset.tune_reward.reward_paths)
    return {name: path for name, path in usual.items() if name in names} | judge_paths(judges, options.paths)


def _require_weights(judges: Sequence[JudgeEntry], paths: Mapping[str, str]) -> None:
    """EnvironmentFailure, before a picture is made, where a judge's weights are neither here nor to be had."""
    from rtdmd_cli.engine.rewards import needed

    own = {entry.reward.name for entry in judges if entry.name in paths}
    needed.require(needed.rewards([entry.reward.name for entry in judges], own))


def _say_missing(judges: Sequence[JudgeEntry], paths: dict[str, str], quiet: bool) -> None:
    from rtdmd_cli.engine.evaluation.run import to_fetch

    for line in to_fetch(judges, paths):
        console.say(line, quiet)
