"""Scoring pictures that are there already: an evaluation's own folder, or one in GenEval's layout made by anyone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdmd_cli import __version__
from rtdmd_cli.engine.evaluation.benchmarks import Benchmark
from rtdmd_cli.engine.evaluation.folder import TIMING, read_about
from rtdmd_cli.engine.evaluation.generate_phase import Timing
from rtdmd_cli.engine.evaluation.picture_store import FoundPictures, scan_folder
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, choose_prompts, shortened
from rtdmd_cli.engine.evaluation.sums import contents_sum
from rtdmd_cli.errors import DataError, EnvironmentFailure

UNKNOWN = ("model_hash", "kind", "steps", "evaluations", "guidance", "eta", "seed", "width", "height")


@dataclass(frozen=True)
class Found:
    """A folder's pictures, and what is known of how they were made. ours: whole, as an evaluation left it.

    limit: of prompts, as asked for now or when the evaluation was made.
    """

    prompts: EvalPrompts
    pictures: FoundPictures
    images: int
    limit: int | None
    ours: bool
    conditions: Mapping[str, Any]
    trained_on: tuple[str, ...]
    timing: Timing
    fingerprint: str


def find_pictures(
    benchmark: Benchmark, root: Path, images: int | None, limit: int | None, file: str | None
) -> Found:
    """What `root` holds; `images` of each prompt and `limit` prompts, or all.

    Prompts are compared with the benchmark's where these are on this machine, or in `file`; the stamp says what they
    are. Errors as `scan_folder`, and DataError for an evaluation whose pictures are not all made yet.
    """
    about = read_about(root)
    mine = about["about"] if about else {}
    made_for = about["identity"] if about else {}
    same = made_for.get("benchmark") == benchmark.name
    per_prompt = made_for.get("images_per_prompt") if same and images is None else images
    prompts, pictures, taken = scan_folder(root, per_prompt, limit)
    if same and limit is None and len(prompts) < mine.get("prompts", 0):
        raise DataError(
            f"{root} holds pictures of {len(prompts)} of its {mine['prompts']} prompts.",
            "Make the rest first: the command that made them, and --resume.",
        )
    whole = same and limit is None and images in (None, made_for.get("images_per_prompt"))
    other = tuple(mine.get("foreign_prompts", ())) if same else _check(benchmark, prompts, file)
    stamps = (*shortened(len(prompts), benchmark.prompts or prompts.total), *other, *prompts.departures)
    if benchmark.built_in and not pictures.exact:
        stamps = (*stamps, "judged from 8-bit pictures")
    unknown = dict.fromkeys(UNKNOWN) | {"model": root.resolve().name, "dtype": None, "device": None}
    return Found(
        replace(prompts, departures=stamps),
        pictures,
        taken,
        made_for.get("limit") if whole else limit,
        whole,
        mine.get("conditions") or unknown | {"version": __version__},
        tuple(mine.get("trained_on", ())),
        Timing.open(root / TIMING) if about else Timing(None, []),
        _fingerprint(pictures),
    )


def _check(benchmark: Benchmark, prompts: EvalPrompts, file: str | None) -> tuple[str, ...]:
    """The stamp of a foreign folder's prompts. DataError where they aren't the prompts of the file that was named."""
    if benchmark.file and file is None:
        file = benchmark.file
    try:
        known = choose_prompts(benchmark, file, None)
    except EnvironmentFailure:
        return ("prompts not checked against the published file",)
    if all(known.texts.get(row) == text for row, text in prompts.texts.items()):
        return known.foreign
    if file is not None:
        raise DataError(
            f"The folder holds other prompts than {file}.", "Leave the file out, or name the right one."
        )
    return (f"other prompts than those of {benchmark.name}",)


def _fingerprint(pictures: FoundPictures) -> str:
    """A hash over the pictures' names and contents."""
    found = [(key, path.name, contents_sum(path)) for key, path in pictures.paths.items()]
    return hashlib.sha256(repr(found).encode()).hexdigest()
