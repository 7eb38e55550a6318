"""Two evaluations at equal prompts and seeds: paired differences with intervals, and who wins.

The unit is the prompt: a picture is compared with the other model's from the same noise, and the differences of a prompt
are averaged. A win counts 1, a tie 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.evaluation.figures import interval_over_prompts, prompt_means, tasks_of
from rtdmd_cli.engine.evaluation.folder import RESULTS, SCORES, read_about
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, Key
from rtdmd_cli.engine.evaluation.run import Ask, Evaluation, file_name
from rtdmd_cli.engine.evaluation.score_phase import Line, ScoreFile
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.errors import DataError


@dataclass(frozen=True)
class Paired:
    """One judge's comparison. here, there: the two models' figures on the prompts in common.

    difference: of this model to the other, with its 95% interval; positive is better.

    wins, ties, losses: pictures; win_rate: (wins + ties / 2) / all, averaged over prompts.
    """

    judge: str
    label: str
    here: float
    there: float
    difference: float
    low: float
    high: float
    win_rate: float
    win_low: float
    win_high: float
    wins: int
    ties: int
    losses: int
    prompts: int


def compare(mine: Evaluation, other: Mapping[str, Sequence[Line]]) -> list[Paired]:
    """Every judge's comparison. other: the other model's lines by judge, of the same keys as this one's or fewer."""
    prompts = mine.ask.prompts
    return [
        _paired(entry.name, entry.label, mine.scores[entry.name], other[entry.name], prompts)
        for entry in mine.ask.judges
    ]


def as_json(
    mine: Evaluation, other: Mapping[str, Sequence[Line]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """The comparison for the summary. summary: the other's own, or what is known of how its pictures were made."""
    rows = []
    pairs = compare(mine, other)
    all_keys, keys = len(mine.ask.keys), len(other[mine.ask.judges[0].name])
    for pair in pairs:
        values = asdict(pair)
        interval = [values.pop("low"), values.pop("high")]
        win_interval = [values.pop("win_low"), values.pop("win_high")]
        rows.append(values | {"interval": interval, "win_interval": win_interval})
    stamp = "" if keys == all_keys else f"{keys} of {all_keys} pictures in common"
    return {"other": dict(summary), "pairs": rows, "stamp": stamp}


def other_from_folder(folder: Path, ask: Ask, seed: object) -> tuple[dict[str, list[Line]], dict[str, Any]]:
    """The lines of another evaluation's folder, by judge, and its summary or else how its pictures were made.

    DataError where it is of another benchmark, other prompts, another seed or other weights of a judge, where it has no
    scores of one of the judges, or shares no picture.
    """
    found = read_about(folder)
    if found is None:
        raise DataError(f"{folder} is no evaluation.", "Name the folder that `rtdmd eval --out` wrote.")
    identity, conditions = found["identity"], found["about"]["conditions"]
    if seed is None:
        raise DataError("The seed of these pictures is not known.", "Compare evaluations that rtdmd made.")
    wanted = {"benchmark": ask.benchmark.name, "prompts_sha256": ask.prompts.sha256, "seed": seed}
    for key, value in wanted.items():
        if identity.get(key) != value:
            raise DataError(
                f"{folder} can't be compared: its {key.removesuffix('_sha256')} is another one.",
                "Both need the same prompts and the same --seed.",
            )
    lines = {}
    for entry in ask.judges:
        path = folder / SCORES / f"{file_name(entry.name)}.jsonl"
        if not path.is_file():
            raise DataError(
                f"{folder} has no scores of {entry.name}.",
                f"Score it: rtdmd eval {ask.benchmark.file or ask.benchmark.name} --score-only {folder}",
            )
        weights = ask.weights(entry.name)
        lines[entry.name] = _common(ScoreFile.read_only(path, entry.name, weights).lines, ask.keys, folder)
    return lines, dict(conditions) | _results(folder)


def _results(folder: Path) -> dict[str, Any]:
    """The summary in results.json; nothing where there is none."""
    path = folder / RESULTS
    if not path.is_file():
        return {}
    try:
        found = strict_json.read(path, strict_json.MAX_LINES_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged.", "Score that folder again: --score-only.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged.", "Score that folder again: --score-only.")
    return {key: value for key, value in found.items() if key not in ("pictures", "compare")}


def _common(lines: Mapping[Key, Line], keys: Sequence[Key], folder: Path) -> list[Line]:
    found = [lines[key] for key in keys if key in lines]
    if not found:
        raise DataError(f"{folder} has no picture in common with this evaluation.", "Compare equal --limit.")
    return found


def _paired(
    judge: str, label: str, mine: Sequence[Line], other: Sequence[Line], prompts: EvalPrompts
) -> Paired:
    theirs = {(line["prompt"], line["image"]): line["score"] for line in other}
    pairs = [
        (line, line["score"] - theirs[key])
        for line in mine
        if (key := (line["prompt"], line["image"])) in theirs
    ]
    differences = [_line(line, gap) for line, gap in pairs]
    points = [_line(line, 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0) for line, gap in pairs]
    tasks = tasks_of(prompts)
    difference = interval_over_prompts(prompt_means(differences), tasks)
    here = interval_over_prompts(prompt_means([line for line, _ in pairs]), tasks).mean
    rate = interval_over_prompts(prompt_means(points), {})
    counts = [sum(1 for _, gap in pairs if holds(gap)) for holds in (_wins, _ties)]
    return Paired(
        judge,
        label,
        here,
        here - difference.mean,
        *difference,
        *rate,
        wins=counts[0],
        ties=counts[1],
        losses=len(pairs) - sum(counts),
        prompts=len({line["prompt"] for line, _ in pairs}),
    )


def _line(line: Line, score: float) -> Line:
    return {"prompt": line["prompt"], "image": line["image"], "score": score}


def _wins(gap: float) -> bool:
    return gap > 0


def _ties(gap: float) -> bool:
    return gap == 0
