"""What an evaluation says, as one JSON object: figures, groups, failures, conditions, published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation import shapes
from rtdmd_cli.engine.evaluation.benchmarks import PUBLISHED, PUBLISHED_SIZE, SOURCE
from rtdmd_cli.engine.evaluation.figures import Figure, Measured
from rtdmd_cli.engine.evaluation.run import Ask, Evaluation
from rtdmd_cli.engine.judges.features import ClipScorer

Summary = dict[str, Any]
DETAILS = ("correct", "reasons", "soft", "atoms", "exact", "read", "wanted")  # of a judge's line


def summarise(evaluation: Evaluation, clip: ClipScorer | None) -> Summary:
    """The figures of all judges with their intervals, each with the stamp of what departs from the protocol.

    clip: the built-in world's independent judge, where its package is there. Times are not in it: the same pictures and
    scores give the same summary.
    """
    ask = evaluation.ask
    measured = {entry.name: entry.figures(evaluation.scores[entry.name], ask.prompts) for entry in ask.judges}
    summary: Summary = {"benchmark": ask.benchmark.name}
    if ask.benchmark.built_in:
        summary |= _shapes(evaluation, clip)
    else:
        first = measured[ask.judges[0].name]
        summary |= {
            "overall": first.figures[0].value,
            "interval": [first.figures[0].low, first.figures[0].high],
            "prompts": len(ask.prompts),
            "images": len(ask.keys),
            "failures": [{"reason": reason, "pictures": n} for reason, n in first.failures],
        }
    summary |= {**evaluation.conditions, "images_per_prompt": ask.images}
    if ask.limit is not None:
        summary["limit"] = ask.limit
    stamp = "; ".join(ask.departures)
    return summary | {
        "protocol": ask.benchmark.protocol,
        "departures": list(ask.departures),
        "judges": {entry.name: ask.weights(entry.name) for entry in ask.judges},
        "trained_on": list(evaluation.trained_on),
        "figures": _figures(measured, evaluation.trained_on, stamp),
        "breakdowns": [
            {"title": part.title, "judge": name, "rows": [_row(row, stamp) for row in part.rows]}
            for name, found in measured.items()
            for part in found.breakdowns
        ],
        "published": published(ask, evaluation.conditions["width"]),
    }


def records(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One record a picture, as results.json lists them: the first judge's details, and every judge's score."""
    ask, first = evaluation.ask, evaluation.ask.judges[0].name
    found = []
    for row, (prompt, image) in enumerate(ask.keys):
        line = evaluation.scores[first][row]
        found.append(
            {
                "prompt_index": prompt,
                "image_index": image,
                "tag": ask.prompts.metadata[prompt].get("tag"),
                "prompt": ask.prompts.texts[prompt],
                **{key: line[key] for key in DETAILS if key in line},
                "scores": {name: lines[row]["score"] for name, lines in evaluation.scores.items()},
            }
        )
    return found


def published(ask: Ask, width: int | None) -> dict[str, Any] | None:
    """The published figures of what is measured, with their source; None where there are none.

    width: of our pictures, pixels, None where it isn't known. "other_size" says that theirs are of another size.
    """
    wanted = [entry.name for entry in ask.judges if entry.name in ask.benchmark.published]
    rows = [
        {
            "model": row.model,
            "evaluations": row.evaluations,
            "figures": {name: row.figures[name] for name in wanted if name in row.figures},
        }
        for row in PUBLISHED
    ]
    rows = [row for row in rows if row["figures"]]
    if not rows:
        return None
    other = width is not None and width != PUBLISHED_SIZE
    return {
        "source": SOURCE,
        "note": ask.benchmark.note,
        "size": PUBLISHED_SIZE,
        "other_size": other,
        "rows": rows,
    }


def _figures(measured: Mapping[str, Measured], trained: Sequence[str], stamp: str) -> list[dict[str, Any]]:
    """Of all judges; those held out first."""
    rows = [
        _row(figure, stamp) | {"trained_on": name in trained}
        for name, found in measured.items()
        for figure in found.figures
    ]
    return sorted(rows, key=lambda row: bool(row["trained_on"]))


def _row(figure: Figure, stamp: str) -> dict[str, Any]:
    values = asdict(figure)
    low, high = values.pop("low"), values.pop("high")
    own = figure.key == figure.judge or figure.label.lower().startswith(figure.judge)
    name = figure.label if own else f"{figure.judge}, {figure.label}"
    return values | {"name": name, "interval": [low, high], "stamp": stamp}


def shapes_parts(evaluation: Evaluation) -> tuple[list[shapes.Judged], Tensor]:
    """The built-in world's verdicts, and its pictures [N,3,32,32] in 0..1 in the same order."""
    ask = evaluation.ask
    lines = evaluation.scores[ask.benchmark.judge]
    judged = [
        shapes.Judged.of(key, ask.prompts.texts[key[0]], line["correct"], line["reasons"])
        for key, line in zip(ask.keys, lines, strict=True)
    ]
    return judged, torch.stack([evaluation.pictures.read(key) for key in ask.keys])


def _shapes(evaluation: Evaluation, clip: ClipScorer | None) -> Summary:
    """The built-in world's own summary, and the figures of its independent CLIP."""
    judged, pictures = shapes_parts(evaluation)
    found = shapes.scores(judged)
    found["extra_objects"] = shapes.extra_objects(pictures.numpy(), [each.caption for each in judged])
    return found | {"clip": shapes.clip_figures(clip, pictures, judged) if clip else None}
