"""`geneval-soft`: GenEval with partial credit, a training reward. The benchmark's strict rule is `geneval.judge`.

The rule comes from Flow-GRPO's reward server (Liu et al. 2025), which RTDMD trains with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rtdmd_cli.engine.judges.geneval import Detection, relative_position


def soft_score(detections: Sequence[Detection], requirement: Mapping[str, Any]) -> float:
    """The mean of the terms of all `include` clauses: at most 1, negative where far too many objects were found.

    A clause that wants n objects of a class gives, over all detections of that class (`found` of them):

        1 - |n - found| / n                 always
        0                                   if found != n and the clause names a colour or a position; else
        1 - |n - matching| / n              if it names a colour: `matching` objects have it
        0                                   if it names a position, the colour matched, and the target clause failed
        0 for each object with a violated relation, then 1      as the line above, where the target clause held

    A clause holds if found = n and its colour and position do. `exclude` clauses are ignored; without an `include`
    clause the score is 0. requirement: as for `geneval.judge`; thresholds are the detector's.
    """
    terms: list[float] = []
    targets: list[list[Detection] | None] = []
    for clause in requirement.get("include", []):
        objects = [d for d in detections if d.label == clause["class"]]
        credit, holds = _clause(objects, clause, targets)
        terms += credit
        targets.append(objects if holds else None)
    return sum(terms) / len(terms) if terms else 0.0


def _clause(
    objects: list[Detection], clause: Mapping[str, Any], targets: list[list[Detection] | None]
) -> tuple[list[float], bool]:
    """The terms of one clause, and whether it holds."""
    count = clause["count"]
    terms = [_share(count, len(objects))]
    if len(objects) != count:
        return terms + [0.0] * ("color" in clause or "position" in clause), False
    if "color" in clause:
        matching = sum(o.color == clause["color"] for o in objects)
        terms.append(_share(count, matching))
        if matching != count:
            return terms, False
    if "position" in clause:
        relation, index = clause["position"]
        target = targets[index]
        if target is None:
            return [*terms, 0.0], False
        wrong = sum(any(relation not in relative_position(a, b) for b in target) for a in objects)
        return [*terms, *[0.0] * wrong, 1.0], wrong == 0
    return terms, True


def _share(wanted: int, found: int) -> float:
    return 1 - abs(wanted - found) / wanted
