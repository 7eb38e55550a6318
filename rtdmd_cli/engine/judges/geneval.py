"""The strict GenEval judge (Ghosh et al. 2023, the rule of the authors' `evaluate_images.py`), free of any model.

A requirement is one line of GenEval's metadata:

    {"tag": "position", "include": [{"class": "cow", "count": 1},
                                    {"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "cow", "count": 2}], "prompt": "..."}

`position` names a relation and the index of an earlier `include` clause, the target. Whoever reads requirements from
a file calls `check_requirement` once; `judge` trusts them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rtdmd_cli.errors import DataError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
SIZE_SHARE = 0.1  # share of both boxes' sizes by which their centres must be apart
NO_OFFSET = 1e-3  # a smaller revised offset on both axes is no relation
MIN_COSINE = 0.5  # least component of the direction that names a relation

INCLUDE_KEYS = ("class", "count", "color", "position")
EXCLUDE_KEYS = ("class", "count")


@dataclass(frozen=True)
class Detection:
    """One object a detector found. `box` is (x0, y0, x1, y1) in pixels, y pointing down; `score` its confidence."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a picture meets its requirement, and one sentence for each thing that fails."""

    correct: bool
    reasons: list[str]


@dataclass(frozen=True)
class TaskScores:
    """Strict accuracies in 0..1. A task without records is None and no part of `overall`."""

    overall: float
    tasks: dict[str, float | None]


def judge(detections: Sequence[Detection], requirement: Mapping[str, Any]) -> Verdict:
    """Judges the detections of one picture. Scores only order the objects of a class; thresholds are the detector's."""
    found = _by_label(detections)
    reasons: list[str] = []
    targets: list[list[Detection] | None] = []
    for clause in requirement.get("include", []):
        objects = found.get(clause["class"], [])[: clause["count"]]
        failures = _clause_failures(objects, clause, targets)
        reasons += failures
        targets.append(None if failures else objects)
    for clause in requirement.get("exclude", []):
        label, limit, number = clause["class"], clause["count"], len(found.get(clause["class"], []))
        if number >= limit:
            reasons.append(f"expected fewer than {limit} {label}, found {number}")
    return Verdict(not reasons, reasons)


def relative_position(a: Detection, b: Detection) -> set[str]:
    """The relations of `a` to `b`: none, one, or two on a diagonal.

    Per axis, with centre offset o = a - b and the boxes' sizes s: revised = sign(o) max(|o| - 0.1 (s_a + s_b), 0),
    then revised / ||(o_x, o_y)|| beyond +-0.5.
    """
    offset = [_centre(a, axis) - _centre(b, axis) for axis in (0, 1)]
    gap = [SIZE_SHARE * (_size(a, axis) + _size(b, axis)) for axis in (0, 1)]
    revised = [math.copysign(max(abs(o) - g, 0.0), o) for o, g in zip(offset, gap, strict=True)]
    if all(abs(r) < NO_OFFSET for r in revised):
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)
    holds = (dx < -MIN_COSINE, dx > MIN_COSINE, dy < -MIN_COSINE, dy > MIN_COSINE)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def task_scores(records: Iterable[Mapping[str, Any]]) -> TaskScores:
    """Accuracy per task and their mean, from one record a picture: {"tag": task, "correct": bool, ...}.

    Raises DataError for a record without these keys or with another task, and ValueError without any record.
    """
    verdicts: dict[str, list[bool]] = {task: [] for task in TASKS}
    for number, record in enumerate(records):
        tag, correct = record.get("tag"), record.get("correct")
        if tag not in TASKS:
            raise DataError(f"record {number}: `tag` is {tag!r}, not one of {', '.join(TASKS)}", "")
        if not isinstance(correct, bool):
            raise DataError(f"record {number}: `correct` is {correct!r}, not true or false", "")
        verdicts[tag].append(correct)
    tasks = {task: sum(marks) / len(marks) if marks else None for task, marks in verdicts.items()}
    present = [score for score in tasks.values() if score is not None]
    if not present:
        raise ValueError("no records to score")
    return TaskScores(sum(present) / len(present), tasks)


def check_requirement(requirement: object, where: str = "requirement") -> None:
    """Raises DataError, naming the key and `where` (such as "line 3"), if `judge` could not read the requirement.

    Other top-level keys ("tag", "prompt", ...) are let through, unless they look like a misspelt clause list.
    """
    if not isinstance(requirement, dict):
        raise DataError(f"{where} must be an object, not {type(requirement).__name__}", "")
    for key in requirement:
        near = get_close_matches(str(key), ("include", "exclude"), n=1, cutoff=0.75)
        if near and key != near[0]:
            raise DataError(f"{where} has the unknown key `{key}`", f"Did you mean `{near[0]}`?")
    if not requirement.get("include") and not requirement.get("exclude"):
        raise DataError(f"{where} has neither `include` nor `exclude` clauses", "")
    for part, keys in (("include", INCLUDE_KEYS), ("exclude", EXCLUDE_KEYS)):
        clauses = requirement.get(part, [])
        if not isinstance(clauses, list):
            raise DataError(f"{where}: `{part}` must be a list", "")
        for index, clause in enumerate(clauses):
            _check_clause(clause, keys, f"{where}: `{part}[{index}]", index)


def _by_label(detections: Sequence[Detection]) -> dict[str, list[Detection]]:
    """Objects by class, most confident first; equal scores keep the given order."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        found.setdefault(detection.label, []).append(detection)
    return found


def _clause_failures(
    objects: list[Detection], clause: Mapping[str, Any], targets: list[list[Detection] | None]
) -> list[str]:
    """Why the first `count` objects of the clause's class fail it: nothing or one sentence."""
    label, count = clause["class"], clause["count"]
    if len(objects) < count:
        return [f"expected {count} {label}, found {len(objects)}"]
    if "color" in clause:
        matching = sum(o.color == clause["color"] for o in objects)
        if matching < count:
            seen = ", ".join(o.color or "no colour" for o in objects)
            return [f"expected {count} {clause['color']} {label}, found {matching} ({seen})"]
    if "position" in clause:
        relation, index = clause["position"]
        target = targets[index]
        if target is None:
            return [f"no target for {label} to be {relation}"]
        for a in objects:
            for b in target:
                if relation not in (actual := relative_position(a, b)):
                    is_at = " and ".join(sorted(actual)) or "in no relation to"
                    return [f"expected {label} {relation} {b.label}, found it {is_at} {b.label}"]
    return []


def _centre(d: Detection, axis: int) -> float:
    return (d.box[axis] + d.box[axis + 2]) / 2


def _size(d: Detection, axis: int) -> float:
    return abs(d.box[axis + 2] - d.box[axis])


def _check_clause(clause: object, keys: tuple[str, ...], where: str, index: int) -> None:
    """Checks one clause; `where` ends inside a code span, so that keys can be appended: "`include[0]"."""
    if not isinstance(clause, dict):
        raise DataError(f"{where}` must be an object", "")
    for key in clause:
        if key not in keys:
            near = get_close_matches(str(key), keys, n=1)
            raise DataError(f"{where}.{key}` is unknown", f"Did you mean `{near[0]}`?" if near else "")
    for key in ("class", "color"):
        value = clause.get(key, None if key == "class" else "-")
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}.{key}` must be a name, not {value!r}", "")
    count = clause.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"{where}.count` must be a whole number from 1, not {count!r}", "")
    if "position" in clause:
        _check_position(clause["position"], f"{where}.position`", index)


def _check_position(position: object, where: str, index: int) -> None:
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise DataError(f"{where} must be a relation and a target, not {position!r}", "")
    relation, target = position
    if relation not in RELATIONS:
        raise DataError(f"{where} names {relation!r}, not one of {', '.join(RELATIONS)}", "")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < index:
        raise DataError(f"{where} must point to an earlier clause, not {target!r}", "")
