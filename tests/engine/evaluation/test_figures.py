"""Figures from scores: averages over prompts and tasks, groups, reasons, and paired comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.evaluation.benchmarks import BENCHMARKS
from rtdmd_cli.engine.evaluation.comparison import compare
from rtdmd_cli.engine.evaluation.figures import (
    geneval2_figures,
    geneval_figures,
    ocr_figures,
    plain_figures,
)
from rtdmd_cli.engine.evaluation.generate_phase import Timing
from rtdmd_cli.engine.evaluation.metrics import find_judge
from rtdmd_cli.engine.evaluation.picture_store import MemoryPictures
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts
from rtdmd_cli.engine.evaluation.run import Ask, Evaluation, choose_judges, trained_on
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.storage.exported import Exported


def prompts(metadata: dict[int, dict[str, Any]]) -> EvalPrompts:
    return EvalPrompts({row: f"prompt {row}" for row in metadata}, metadata, len(metadata), "-")


def line(prompt: int, image: int, score: float, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "image": image, "score": score, **more}


def test_geneval_is_the_mean_of_the_tasks_and_counts_any_of_a_prompt() -> None:
    asked = prompts({0: {"tag": "colors"}, 1: {"tag": "colors"}, 9: {"tag": "position"}})
    lines = [
        line(0, 0, 1.0, reasons=[], soft=1.0),
        line(0, 1, 0.0, reasons=["too few"], soft=0.5),
        line(1, 0, 0.0, reasons=["too few"], soft=0.5),
        line(1, 1, 0.0, reasons=["no cow"], soft=0.0),
        line(9, 0, 1.0, reasons=[], soft=1.0),
        line(9, 1, 1.0, reasons=[], soft=1.0),
    ]
    found = geneval_figures("geneval", "GenEval", lines, asked)
    values = {figure.key: figure.value for figure in found.figures}
    assert values == pytest.approx(
        {"geneval": (0.25 + 1) / 2, "geneval-any": 2 / 3, "geneval-soft": (0.75 + 0.25 + 1) / 3}
    )
    assert [(row.label, row.value) for row in found.breakdowns[0].rows] == [
        ("colors", 0.25),
        ("position", 1.0),
    ]
    assert found.failures == [("too few", 2), ("no cow", 1)]
    assert (found.figures[0].prompts, found.figures[0].pictures) == (3, 6)


def test_geneval2_by_skill_and_atoms() -> None:
    asked = prompts(
        {
            0: {"atom_count": 3, "skills": ["count", "object"]},
            1: {"atom_count": 4, "skills": ["count", "count"]},
        }
    )
    lines = [line(0, 0, 0.5, atoms=[0.2, 1.0]), line(1, 0, 0.9, atoms=[0.8, 1.0])]
    found = geneval2_figures("geneval2", "GenEval2", lines, asked)
    assert [figure.value for figure in found.figures] == pytest.approx([0.7, (0.6 + 0.9) / 2])
    atoms, skills = found.breakdowns
    assert [(row.label, row.value) for row in atoms.rows] == [("3 atoms", 0.5), ("4 atoms", 0.9)]
    assert [(row.label, row.value) for row in skills.rows] == [
        ("count", pytest.approx((0.2 + 0.9) / 2)),
        ("object", 1.0),
    ]
    bare = geneval2_figures("geneval2", "GenEval2", lines, prompts({0: {}, 1: {}}))
    assert bare.breakdowns == []


def test_plain_and_ocr_figures() -> None:
    asked = prompts({0: {}, 5: {}})
    lines = [line(0, 0, 1.0, exact=True), line(5, 0, 0.5, exact=False)]
    assert [figure.value for figure in ocr_figures("ocr", "OCR", lines, asked).figures] == [0.75, 0.5]
    found = plain_figures("hpsv2", "hpsv2", lines, asked)
    assert found.figures[0].value == 0.75 and found.breakdowns == []
    tagged = plain_figures("hpsv2", "hpsv2", lines, prompts({0: {"tag": "b"}, 5: {"tag": "a"}}))
    assert [row.label for row in tagged.breakdowns[0].rows] == ["a", "b"]


def evaluation(scores: list[float], images: int = 1) -> Evaluation:
    row = BENCHMARKS["pickscore"]
    asked = prompts({index: {} for index in range(len(scores) // images)})
    ask = Ask(row, asked, images, None, choose_judges(row, []), {})
    lines = [line(*key, score) for key, score in zip(ask.keys, scores, strict=True)]
    return Evaluation(ask, {"seed": 0}, (), MemoryPictures(), None, Timing(None, []), {"pickscore": lines})


def test_an_export_says_what_it_was_trained_on() -> None:
    preset = load_preset("shapes-4step", [], {}).preset
    judges = [find_judge(name) for name in ("geneval", "shapes", "hpsv2", "pickscore")]
    for rewards, expected in ((("geneval-soft", "pickscore"), ("geneval", "pickscore")), ((), ())):
        export = Exported(Path("x"), preset, None, "", True, True, "-", rewards)
        assert trained_on(Source("generator", preset, None, "x", exported=export), judges) == expected
    assert trained_on(Source("teacher", preset, None, "x"), judges) == ()


def test_paired_differences_and_wins() -> None:
    mine, other = evaluation([1.0, 2.0, 3.0, 4.0]), evaluation([0.0, 2.0, 4.0, 0.0])
    (pair,) = compare(mine, other.scores)
    assert (pair.wins, pair.ties, pair.losses, pair.prompts) == (2, 1, 1, 4)
    assert (pair.difference, pair.win_rate) == (1.0, 0.625)
    assert (pair.here, pair.there) == (2.5, 1.5) and pair.low <= 1 <= pair.high
    (part,) = compare(mine, {"pickscore": other.scores["pickscore"][3:]})
    assert (part.difference, part.prompts, part.here, part.there) == (4.0, 1, 4.0, 0.0)


def test_paired_intervals_cover_and_are_narrower_than_unpaired_ones() -> None:
    """95% of the intervals hold the true difference; prompts differ far more than models do."""
    random = np.random.default_rng(0)
    covered, widths = [], []
    for _ in range(120):
        base = random.normal(size=60) * 5
        mine = evaluation(list(base + 0.3 + random.normal(size=60)))
        other = evaluation(list(base + random.normal(size=60)))
        (pair,) = compare(mine, other.scores)
        covered.append(pair.low <= 0.3 <= pair.high)
        widths.append(pair.high - pair.low)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(2 / 60), rel=0.1)
