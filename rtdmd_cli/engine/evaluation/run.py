"""An evaluation from its parts: first the pictures, then each judge in its turn, then the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.config.tune_reward import split_paths, split_weights
from rtdmd_cli.engine.compute.device import free_memory
from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.evaluation.benchmarks import Benchmark
from rtdmd_cli.engine.evaluation.folder import SCORES, TIMING
from rtdmd_cli.engine.evaluation.generate_phase import Generation, Timing, generate_phase
from rtdmd_cli.engine.evaluation.metrics import JudgeEntry, check_prompts, find_judge
from rtdmd_cli.engine.evaluation.picture_store import (
    FolderPictures,
    FoundPictures,
    MemoryPictures,
    check_pictures,
)
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, Key
from rtdmd_cli.engine.evaluation.score_phase import Line, ScoreFile, score_phase
from rtdmd_cli.engine.evaluation.sums import PictureSums
from rtdmd_cli.engine.rewards.local import missing
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.storage.scrubbing import scrub_text
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from rtdmd_cli.shapes.render import PICTURE

PUBLISHED_WEIGHTS = "published"
BATCH_PIXELS = 16 * 1024**2
"""Of the pictures that a judge sees at once: 16 of 1024 px."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Ask:
    """What is to be measured, whoever makes the pictures.

    images: of each prompt. paths: judge -> folder or hub id of its weights, where these are not the published ones.
    """

    benchmark: Benchmark
    prompts: EvalPrompts
    images: int
    limit: int | None
    judges: tuple[JudgeEntry, ...]
    paths: Mapping[str, str]

    def weights(self, judge: str) -> str:
        """Where a judge's are from, as it is written down."""
        return scrub_text(self.paths.get(judge, PUBLISHED_WEIGHTS))

    @property
    def keys(self) -> list[Key]:
        return self.prompts.keys(self.images)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes another evaluation, besides how the pictures are made."""
        return {
            "benchmark": self.benchmark.name,
            "prompts_sha256": self.prompts.sha256,
            "limit": self.limit,
            "images_per_prompt": self.images,
        }

    @property
    def departures(self) -> tuple[str, ...]:
        """How it departs from the benchmark's protocol: the stamp of every figure."""
        usual = self.benchmark.images
        fewer = usual is not None and self.images != usual
        return (
            *self.prompts.departures,
            *((f"{self.images} instead of {usual} pictures a prompt",) if fewer else ()),
            *(f"{name} with weights of {self.weights(name)}" for name in self.paths),
        )


@dataclass(frozen=True)
class Evaluation:
    """Pictures and their scores. conditions: how the pictures were made, as JSON. trained_on: judges' names."""

    ask: Ask
    conditions: Mapping[str, Any]
    trained_on: tuple[str, ...]
    pictures: MemoryPictures | FolderPictures | FoundPictures
    folder: Path | None
    timing: Timing
    scores: Mapping[str, Sequence[Line]]


def choose_judges(
    benchmark: Benchmark, rewards: Sequence[str], seconds: float | None = None
) -> tuple[JudgeEntry, ...]:
    """The benchmark's own judge and the rewards asked for, or its usual ones. seconds: as `metrics.find_judge`.

    UsageError for an unknown name, or for nothing at all; EnvironmentFailure for an optional package that is missing.
    """
    names = [*([benchmark.judge] if benchmark.judge else []), *(rewards or benchmark.rewards)]
    if not names:
        raise UsageError(
            f"There is nothing to measure on {benchmark.name}.",
            "Name rewards, as in: --rewards clipscore,hpsv2; list them: rtdmd rewards list",
        )
    entries = tuple(find_judge(name, seconds) for name in dict.fromkeys(names))
    for entry in entries:
        absent = [each for each in missing(entry.reward) if each.get.startswith("pip ")]
        if absent:
            raise EnvironmentFailure(f"`{entry.name}` needs {absent[0].what}.", absent[0].get)
    return entries


def judge_paths(judges: Sequence[JudgeEntry], given: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER` texts by judge. UsageError for one that can't be read, or whose name no judge has."""
    try:
        paths = split_paths(given)
    except ValueError as error:
        raise UsageError(f"--reward-path {error}.") from error
    names = [entry.name for entry in judges]
    for name in paths:
        if name not in names:
            raise UsageError(
                f"--reward-path names {name}, which is not measured.", f"Measured: {', '.join(names)}."
            )
    return paths


def to_fetch(judges: Sequence[JudgeEntry], paths: Mapping[str, str]) -> list[str]:
    """A sentence for each judge whose weights the hub has to send first."""
    lines = []
    for entry in judges:
        absent = [] if entry.name in paths else missing(entry.reward)
        lines += [f"{entry.name}: {each.what}; get it now: {each.get}" for each in absent]
    return lines


def check(judges: Sequence[JudgeEntry], prompts: EvalPrompts) -> None:
    """DataError where a prompt lacks what a judge needs, before anything is made."""
    for entry in judges:
        check_prompts(entry, prompts)


def trained_on(source: Source, judges: Sequence[JudgeEntry]) -> tuple[str, ...]:
    """The judges that the model was trained on: by the rewards of its reward tuning, if it had one."""
    if source.exported is not None:
        used = set(source.exported.trained_on)
    elif source.checkpoint is None or RunFolder(source.checkpoint.parent.parent).stage != "tune-reward":
        return ()
    else:
        used = set(split_weights(source.preset.tune_reward.rewards))
    return tuple(entry.name for entry in judges if used & set(entry.family))


def require_size(ask: Ask, width: int, height: int, label: str) -> None:
    """DataError for pictures that the benchmark's judge can't read: the built-in world's are of one size."""
    if ask.benchmark.built_in and (width, height) != (PICTURE, PICTURE):
        raise DataError(
            f"The benchmark `{ask.benchmark.name}` reads pictures of {PICTURE} px; {label} makes {width} px.",
            "It is for models of the built-in world.",
        )


def open_pictures(ask: Ask, folder: Path | None) -> MemoryPictures | FolderPictures:
    """Where the pictures of an evaluation go; without a folder they are gone with the process."""
    return (
        MemoryPictures()
        if folder is None
        else FolderPictures(folder, ask.prompts, ask.benchmark.built_in, PictureSums.open(folder))
    )


def generate(
    ask: Ask, job: Generation, folder: Path | None, stop: StopRequest, on_pictures: Advance
) -> tuple[MemoryPictures | FolderPictures, Timing] | None:
    """The first phase; None where a stop was asked for before its end. Errors as `generate_phase`."""
    pictures = open_pictures(ask, folder)
    timing = Timing.open(folder / TIMING if folder else None)
    with stop.during("finishing these pictures", _kept(folder)):
        done = generate_phase(job, pictures, timing, stop, on_pictures)
    return (pictures, timing) if done else None


def score(
    ask: Ask,
    pictures: MemoryPictures | FolderPictures | FoundPictures,
    folder: Path | None,
    device: torch.device,
    stop: StopRequest,
    on_pictures: Callable[[str], AbstractContextManager[Advance]],
) -> dict[str, list[Line]] | None:
    """The second phase: the lines of every judge, in the order of the pictures; None where a stop was asked for.

    on_pictures: given a judge's name, opens its progress. DataError for a picture that is missing, damaged or of another
    size than the others, before any judge is loaded. What was scored of other pictures is scored anew.
    """
    sums, most = dict[Key, str](), None
    if not isinstance(pictures, MemoryPictures):
        width, height, sums = check_pictures(pictures, ask.keys)
        most = max(1, BATCH_PIXELS // (width * height))
        require_size(ask, width, height, "the folder")
    found = {}
    for judge in ask.judges:
        entry = judge if most is None else replace(judge, batch=min(judge.batch, most))
        path = folder / SCORES / f"{file_name(entry.name)}.jsonl" if folder else None
        scores = ScoreFile.open(path, entry.name, ask.weights(entry.name))
        source = ask.paths.get(entry.name)
        with on_pictures(entry.name) as advance, stop.during("finishing these pictures", _kept(folder)):
            done = score_phase(
                entry, source, scores, ask.prompts, ask.keys, pictures, sums, device, stop, advance
            )
        free_memory(device)
        if not done:
            return None
        found[entry.name] = [scores.lines[key] for key in ask.keys]
    return found


def _kept(folder: Path | None) -> str:
    """What is left of an evaluation that is stopped at once, half a sentence."""
    return (
        f"{folder} is kept, and --resume goes on" if folder else "nothing is kept: with --out it could go on"
    )


def file_name(judge: str) -> str:
    """A judge's name as a file's: a reward of one's own is called module:Class."""
    return judge.replace(":", "-")
