"""The prompts of an evaluation: where they come from, which of them are taken, and how that departs from the protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.evaluation.benchmarks import Benchmark
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by, read_prompt_set, read_stored
from rtdmd_cli.engine.prompts.store import Stored, require
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import UsageError
from rtdmd_cli.shapes.grammar import requirement
from rtdmd_cli.shapes.prompts import benchmark as shapes_captions

Key = tuple[int, int]  # prompt index in the benchmark, picture index


@dataclass(frozen=True)
class EvalPrompts:
    """The prompts to be shown, by their index in the whole set, in rising order.

    texts, metadata: of these alone. total: size of the whole set; sha256: of the whole set, texts and metadata.
    departures: what makes figures on them another thing than the benchmark's, each a few words; foreign: those of them
    that say that the prompts are others than the published ones.
    """

    texts: Mapping[int, str]
    metadata: Mapping[int, Mapping[str, Any]]
    total: int
    sha256: str
    departures: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self, images: int) -> list[Key]:
        """The pictures of the evaluation, in order: `images` of each prompt."""
        return [(prompt, image) for prompt in self.texts for image in range(images)]

    def as_set(self) -> PromptSet:
        """The chosen prompts alone."""
        return PromptSet(list(self.texts.values()), list(self.metadata.values()))

    def line(self, prompt: int) -> dict[str, Any]:
        """A prompt as GenEval's metadata.jsonl has it: what is known of it, and the text."""
        return {**self.metadata[prompt], "prompt": self.texts[prompt]}


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of 0..count-1: all, or `limit` evenly spread ones."""
    if limit is None or limit >= count:
        return list(range(count))
    return [number * count // limit for number in range(limit)]


def choose_prompts(benchmark: Benchmark, file: str | None, limit: int | None) -> EvalPrompts:
    """The prompts of a benchmark, at most `limit` evenly spread ones. file: a prompt file in place of the usual one.

    UsageError for a file where the prompts are built in; EnvironmentFailure where the set has not been fetched; other
    errors as `read_prompt_set`.
    """
    if benchmark.built_in:
        if file is not None:
            raise UsageError(
                f"The prompts of `{benchmark.name}` are built in.",
                "Leave --prompts-file out, or name the file itself as the benchmark.",
            )
        return _chosen(benchmark, _shapes_prompts(), limit, ())
    if file is None:
        data = benchmark.data
        found = read_stored(require(data)) if data else read_prompt_set(benchmark.file)
        return _chosen(benchmark, found, limit, ())
    data, path = benchmark.data, Path(file).expanduser()
    sha256 = _sha256(path) if data and path.is_file() else ""
    if data and sha256 in data.accepted:
        return _chosen(benchmark, read_stored(Stored(data, path, sha256)), limit, ())
    return _chosen(
        benchmark, read_prompt_set(file), limit, ("not the published prompt file",) if data else ()
    )


def shortened(evaluated: int, whole: int) -> tuple[str, ...]:
    """The stamp of an evaluation on a part of the prompts."""
    return () if evaluated == whole else (f"{evaluated:,} of {whole:,} prompts",)


def _chosen(
    benchmark: Benchmark, found: PromptSet, limit: int | None, foreign: tuple[str, ...]
) -> EvalPrompts:
    rows = spread(len(found), limit)
    return EvalPrompts(
        {row: found.texts[row] for row in rows},
        {row: found.metadata[row] for row in rows},
        len(found),
        known_by(found),
        (*shortened(len(rows), benchmark.prompts or len(found)), *foreign),
        foreign,
    )


def _shapes_prompts() -> PromptSet:
    lines = [requirement(caption) for caption in shapes_captions()]
    return PromptSet([str(line.pop("prompt")) for line in lines], lines)


def _sha256(path: Path) -> str:
    with os_errors(path, "read"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
