"""From the scores of pictures to figures: a value with its 95% interval over prompts, whole and by group.

Pictures of one prompt are averaged first. Where prompts come in tasks (GenEval's `tag`), the whole is the mean of the
tasks' means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rtdmd_cli.engine.evaluation.intervals import Interval, bootstrap_overall
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts
from rtdmd_cli.engine.judges.geneval import TASKS

TAG = "tag"  # of a prompt's metadata: its task
COMMON_FAILURES = 10
Lines = Sequence[Mapping[str, Any]]
"""Scores of one judge, one a picture: prompt, image, score."""


@dataclass(frozen=True)
class Figure:
    """A mean with the ends of its 95% interval. judge: whose it is; key: unlike every other of an evaluation."""

    key: str
    label: str
    judge: str
    value: float
    low: float
    high: float
    prompts: int
    pictures: int


@dataclass(frozen=True)
class Breakdown:
    """The same measure by group."""

    title: str
    rows: Sequence[Figure]


@dataclass(frozen=True)
class Measured:
    """What one judge found: its figures, the headline first."""

    figures: Sequence[Figure]
    breakdowns: Sequence[Breakdown] = ()
    failures: Sequence[tuple[str, int]] = field(default=())


def plain_figures(judge: str, label: str, lines: Lines, prompts: EvalPrompts) -> Measured:
    """The mean score over prompts, and by task where all prompts have one."""
    headline = _figure(judge, label, judge, lines, _score, {})
    return Measured([headline], _by_tag(judge, lines, prompts, "By task"))


def geneval_figures(judge: str, label: str, lines: Lines, prompts: EvalPrompts) -> Measured:
    """Strict accuracies: the mean of the tasks', all pictures, prompts with any right picture; reasons of failures."""
    tasks = _tasks(prompts)
    figures = [_figure(judge, label, judge, lines, _score, tasks)]
    several = len({line["image"] for line in lines}) > 1
    if several:
        figures.append(_any_of(judge, lines))
    if all("soft" in line for line in lines):
        soft = _figure(f"{judge}-soft", "with partial credit", judge, lines, lambda line: line["soft"], {})
        figures.append(soft)
    counts = Counter(reason for line in lines for reason in line.get("reasons", ()))
    return Measured(figures, _by_tag(judge, lines, prompts, "By task"), counts.most_common(COMMON_FAILURES))


def geneval2_figures(judge: str, label: str, lines: Lines, prompts: EvalPrompts) -> Measured:
    """The mean over prompts of the geometric mean; all questions alike; by number of atoms, and questions by skill."""
    figures = [
        _figure(judge, label, judge, lines, _score, {}),
        _figure(f"{judge}-atoms", "mean over questions", judge, lines, _mean_atom, {}),
    ]
    breakdowns = []
    counts = {row: known.get("atom_count") for row, known in prompts.metadata.items()}
    if all(isinstance(count, int) for count in counts.values()):
        groups = _grouped(lines, lambda line: counts[line["prompt"]])
        rows = [
            _figure(f"{judge}-atoms-{n}", f"{n} atoms", judge, groups[n], _score, {}) for n in sorted(groups)
        ]
        breakdowns.append(Breakdown("By number of atoms in the prompt", rows))
    skills = _skill_lines(lines, prompts)
    if skills:
        rows = [
            _figure(f"{judge}-{skill}", skill, judge, skills[skill], _score, {}) for skill in sorted(skills)
        ]
        breakdowns.append(Breakdown("Questions by skill", rows))
    return Measured(figures, breakdowns)


def ocr_figures(judge: str, label: str, lines: Lines, prompts: EvalPrompts) -> Measured:
    """The mean score, and the share of pictures whose text was read in full and nothing else."""
    exact = _figure(f"{judge}-exact", "exact match", judge, lines, lambda line: float(line["exact"]), {})
    return Measured([_figure(judge, label, judge, lines, _score, {}), exact])


def prompt_means(lines: Lines, value: Callable[[Mapping[str, Any]], float] | None = None) -> dict[int, float]:
    """The mean over each prompt's pictures, of the score where no `value` is given."""
    take = value or _score
    groups = _grouped(lines, lambda line: line["prompt"])
    return {prompt: sum(map(take, found)) / len(found) for prompt, found in groups.items()}


def interval_over_prompts(means: Mapping[int, float], tasks: Mapping[int, str]) -> Interval:
    """Mean and interval of one value a prompt: of the tasks' means where `tasks` names each prompt's, else of all."""
    groups: dict[str, list[float]] = {}
    for prompt, value in means.items():
        groups.setdefault(tasks.get(prompt, ""), []).append(value)
    return bootstrap_overall(groups)


def tasks_of(prompts: EvalPrompts) -> dict[int, str]:
    """Each prompt's task, GenEval's where all prompts name one of these; empty otherwise."""
    return _tasks(prompts)


def _tasks(prompts: EvalPrompts) -> dict[int, str]:
    found = {row: known.get(TAG) for row, known in prompts.metadata.items()}
    return {row: str(tag) for row, tag in found.items()} if set(found.values()) <= set(TASKS) else {}


def _score(line: Mapping[str, Any]) -> float:
    return float(line["score"])


def _mean_atom(line: Mapping[str, Any]) -> float:
    return float(sum(line["atoms"]) / len(line["atoms"]))


def _figure(
    key: str,
    label: str,
    judge: str,
    lines: Lines,
    value: Callable[[Mapping[str, Any]], float],
    tasks: Mapping[int, str],
) -> Figure:
    means = prompt_means(lines, value)
    found = interval_over_prompts(means, tasks)
    return Figure(key, label, judge, *found, prompts=len(means), pictures=len(lines))


def _any_of(judge: str, lines: Lines) -> Figure:
    """The share of prompts with at least one right picture."""
    groups = _grouped(lines, lambda line: line["prompt"])
    best = {prompt: max(map(_score, found)) for prompt, found in groups.items()}
    most = max(len(found) for found in groups.values())
    found = interval_over_prompts(best, {})
    label = f"prompts with any of {most} right"
    return Figure(f"{judge}-any", label, judge, *found, prompts=len(best), pictures=len(lines))


def _by_tag(judge: str, lines: Lines, prompts: EvalPrompts, title: str) -> list[Breakdown]:
    tags = {row: known.get(TAG) for row, known in prompts.metadata.items()}
    if not tags or not all(isinstance(tag, str) for tag in tags.values()):
        return []
    groups = _grouped(lines, lambda line: tags[line["prompt"]])
    order = [tag for tag in TASKS if tag in groups] + sorted(set(groups) - set(TASKS))
    rows = [_figure(f"{judge}-{tag}", tag, judge, groups[tag], _score, {}) for tag in order]
    return [Breakdown(title, rows)]


def _skill_lines(lines: Lines, prompts: EvalPrompts) -> dict[str, list[dict[str, Any]]]:
    """For each skill a line a picture with the mean of its questions of that skill; empty where skills aren't known."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        skills = prompts.metadata[line["prompt"]].get("skills")
        if not isinstance(skills, list) or len(skills) != len(line["atoms"]):
            return {}
        for skill in sorted(set(skills)):
            atoms = [atom for name, atom in zip(skills, line["atoms"], strict=True) if name == skill]
            found.setdefault(str(skill), []).append(
                {"prompt": line["prompt"], "image": line["image"], "score": sum(atoms) / len(atoms)}
            )
    return found


def _grouped(
    lines: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Hashable]
) -> dict[Any, Any]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups
