"""What the page and the text of an evaluation share: tables from its summary, and which pictures are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.report.page import Cell, Table

BEST = 24  # pictures, and as many of the worst
OF_A_GROUP = 8
Summary = Mapping[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A picture of the report: its file and its record in results.json."""

    path: Path
    record: Record

    @property
    def correct(self) -> bool | None:
        """Right or wrong by a strict judge; None where it gave no such verdict."""
        found = self.record.get("correct")
        return found if isinstance(found, bool) else None

    @property
    def scores(self) -> str:
        """The scores of all judges in a line."""
        return ", ".join(f"{name} {number(value)}" for name, value in self.record["scores"].items())

    @property
    def why(self) -> str:
        """What failed, or what was read."""
        if "read" in self.record:
            return f"read: {self.record['read'] or 'nothing'}"
        return "; ".join(self.record.get("reasons", ()))


def tables(summary: Summary) -> list[Table]:
    """Results beside published figures, then comparison, groups and failures, as far as there are any."""
    found = [result_table(summary)]
    if "compare" in summary:
        found += comparison_tables(summary["compare"], side_name(summary))
    if summary.get("clip"):
        found.append(_side_table(summary))
    found += [_group_table(part) for part in summary["breakdowns"]]
    if summary["failures"]:
        rows = [(each["reason"], each["pictures"]) for each in summary["failures"]]
        found.append(Table("What failed most", ("reason", "pictures"), rows))
    return found


def result_table(summary: Summary) -> Table:
    """A row a figure: value, interval, the published values of the same name, and what to bear in mind."""
    published = summary["published"] or {"rows": [], "note": "", "source": ""}
    others = [row["model"] for row in published["rows"]]
    columns = ["figure", "this model", "95% interval", "prompts", *(f"published: {name}" for name in others)]
    rows: list[list[Cell]] = []
    for figure in summary["figures"]:
        theirs = [row["figures"].get(figure["key"]) for row in published["rows"]]
        remarks = ["trained on"] if figure["trained_on"] else []
        remarks += [figure["stamp"]] if figure["stamp"] else []
        if published.get("other_size") and any(value is not None for value in theirs):
            remarks.append(f"published at {published['size']} px, this at {summary['width']} px")
        cells: list[Cell] = [figure["name"], number(figure["value"]), interval(figure["interval"])]
        cells += [figure["prompts"], *("–" if value is None else number(value) for value in theirs)]
        rows.append([*cells, "; ".join(remarks) or "–"])
    note = f"Published figures: {published['source']}. {published['note']}" if others else ""
    if published.get("other_size"):
        size = published["size"]
        note += f" They are of pictures of {size} px, these of {summary['width']} px: measure with --size {size} to compare."
    return Table("Figures, held-out ones first", [*columns, "remark"], rows, note.strip())


def comparison_tables(compare: Mapping[str, Any], model: str) -> list[Table]:
    """Paired differences with intervals and win rates, and how both were made."""
    other = compare["other"]
    rows: list[list[Cell]] = [
        [
            pair["label"],
            number(pair["here"]),
            number(pair["there"]),
            f"{pair['difference']:+.4f}",
            interval(pair["interval"]),
            f"{pair['win_rate']:.1%} ({pair['win_interval'][0]:.1%} to {pair['win_interval'][1]:.1%})",
            f"{pair['wins']} / {pair['ties']} / {pair['losses']}",
        ]
        for pair in compare["pairs"]
    ]
    title = f"{model} against {side_name(other)}"
    columns = (
        "judge",
        "this model",
        "the other",
        "difference",
        "95% interval",
        "win rate",
        "won / equal / lost",
    )
    note = (
        "Pictures of the same prompt and noise are compared; intervals are over prompts; a tie is half a win."
    )
    return [Table(title, columns, rows, f"{note} {compare['stamp']}".strip())]


def side_name(side: Summary) -> str:
    """A model with its steps and guidance, which tell two samplings of one model apart."""
    steps, guidance = side.get("steps"), side.get("guidance")
    parts = [str(side["model"]), *([f"{steps} steps"] if steps else [])]
    return ", ".join([*parts, *([f"guidance {guidance:g}"] if guidance not in (None, 1) else [])])


def _side_table(summary: Summary) -> Table:
    """What the built-in world measures beside the score, of this model and of the one it is compared with."""
    sides = [summary, *([summary["compare"]["other"]] if "compare" in summary else [])]
    clips = [side.get("clip") or {} for side in sides]
    measures = {
        "shapes-clip, independent judge": [clip.get("score") for clip in clips],
        "the same of rendered pictures": [clip.get("score_of_rendered") for clip in clips],
        "Frechet distance to rendered pictures": [clip.get("frechet") for clip in clips],
        "its floor at this number of pictures": [clip.get("frechet_floor") for clip in clips],
        "diversity within a prompt": [clip.get("diversity") for clip in clips],
        "share of pictures with more objects than asked for": [side.get("extra_objects") for side in sides],
        "evaluations a picture": [side.get("evaluations") for side in sides],
        "seconds a picture": [side.get("seconds_per_picture") for side in sides],
    }
    rows: list[list[Cell]] = [
        [name, *("–" if value is None else f"{value:.4g}" for value in values)]
        for name, values in measures.items()
    ]
    return Table("Beside the score", ("measure", *(side_name(side) for side in sides)), rows)


def _group_table(part: Mapping[str, Any]) -> Table:
    rows = [
        [row["label"], number(row["value"]), interval(row["interval"]), row["prompts"], row["stamp"] or "–"]
        for row in part["rows"]
    ]
    return Table(
        f"{part['title']} ({part['judge']})", ("group", "value", "95% interval", "prompts", "remark"), rows
    )


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Names and values of how the pictures were made."""
    size = f"{summary['width']} x {summary['height']} px" if summary["width"] else None
    pace = summary["seconds_per_picture"]
    found = {
        "Model": summary["model"],
        "Model hash": summary["model_hash"],
        "Pictures": f"{summary['images']:,}, {summary['images_per_prompt']} a prompt",
        "Size": size,
        "Steps": summary["steps"],
        "Evaluations a picture": summary["evaluations"],
        "Guidance": summary["guidance"],
        "eta": summary["eta"],
        "Seed": summary["seed"],
        "Seconds a picture": None if pace is None else f"{pace:.3g}",
        "Machine": f"{summary['device']}, {summary['dtype']}" if summary["device"] else None,
        "rtdmd": summary["version"],
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def best_and_worst(pictures: Sequence[Shown]) -> tuple[list[Shown], list[Shown]]:
    """The 24 best and worst by the first judge's score, partial credit settling ties; fewer where there are few.

    None is among the worst that has the best score of all.
    """
    ranked = sorted(pictures, key=_rank)
    count = min(BEST, max(1, len(ranked) // 2))
    top = _rank(ranked[-1])[0] if ranked else 0.0
    return ranked[: -count - 1 : -1], [each for each in ranked[:count] if _rank(each)[0] < top]


def _rank(shown: Shown) -> tuple[float, float]:
    first = next(iter(shown.record["scores"].values()))
    return first, float(shown.record.get("soft", 0.0))


def groups(pictures: Sequence[Shown]) -> dict[str, list[Shown]]:
    """By task, up to 8 evenly spread pictures of each; without tasks 8 of all."""
    by_tag: dict[str, list[Shown]] = {}
    for shown in pictures:
        by_tag.setdefault(str(shown.record.get("tag") or "all prompts"), []).append(shown)
    return {tag: _spread(found, OF_A_GROUP) for tag, found in by_tag.items()}


def _spread(found: Sequence[Shown], count: int) -> list[Shown]:
    rows = dict.fromkeys(n * len(found) // count for n in range(count))
    return [found[row] for row in rows]


def lead(summary: Summary) -> str:
    """The answer in a sentence or two, plain text."""
    first = summary["figures"][0]
    stamp = f" Not the whole protocol: {first['stamp']}." if first["stamp"] else ""
    trained = " The model was trained on this measure." if first["trained_on"] else ""
    return (
        f"{first['name']}: {number(first['value'])} (95% interval {interval(first['interval'])}) "
        f"on {first['prompts']:,} prompts, {summary['images']:,} pictures.{trained}{stamp}"
    )


def number(value: float) -> str:
    """Four digits after the point, fewer for large values."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def interval(ends: Sequence[float]) -> str:
    """Both ends of an interval."""
    return f"{number(ends[0])} to {number(ends[1])}"
