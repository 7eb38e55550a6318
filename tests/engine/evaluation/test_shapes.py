"""The benchmark `shapes`: which prompts, how pictures are judged, and what the summary says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rtdmd_cli.engine.evaluation.benchmarks import BENCHMARKS
from rtdmd_cli.engine.evaluation.metrics import find_judge
from rtdmd_cli.engine.evaluation.prompts import choose_prompts
from rtdmd_cli.engine.evaluation.shapes import (
    Judged,
    clip_figures,
    extra_objects,
    judge_pictures,
    open_judge,
    rendered,
    scores,
)
from rtdmd_cli.engine.evaluation.shapes_grid import save_verdict_grid
from rtdmd_cli.engine.judges.geneval import Verdict
from rtdmd_cli.shapes.grammar import TASKS, Caption, Thing
from rtdmd_cli.shapes.prompts import benchmark

CPU = torch.device("cpu")


def chosen_prompts(limit: int | None) -> list[int]:
    return list(choose_prompts(BENCHMARKS["shapes"], None, limit).texts)


def unjudged(rows: list[int]) -> list[Judged]:
    return [Judged((row, 0), benchmark()[row], Verdict(True, [])) for row in rows]


class ColourClip:
    """Stands in for a CLIP: a picture's feature is its mean colour, a prompt's a fixed direction."""

    def image_features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(prompts), 1)


def test_a_limit_spreads_over_all_tasks() -> None:
    assert chosen_prompts(None) == chosen_prompts(9999) == list(range(553))
    assert chosen_prompts(1) == [0]
    for limit in (6, 7, 12, 60, 552):
        rows = chosen_prompts(limit)
        assert len(set(rows)) == limit
        counts = Counter(benchmark()[row].task for row in rows)
        assert set(counts) == set(TASKS)
        assert max(counts.values()) - min(counts.values()) <= limit * 0.05 + 1


def test_rendered_pictures_pass_and_those_of_other_captions_do_not() -> None:
    rows = chosen_prompts(60)
    pictures, captions = rendered(unjudged(rows), 0).numpy(), [benchmark()[row] for row in rows]
    assert [verdict.correct for verdict in judge_pictures(pictures, captions)] == [True] * 60
    shifted = judge_pictures(pictures, captions[1:] + captions[:1])
    assert sum(verdict.correct for verdict in shifted) < 20
    assert all(verdict.reasons for verdict in shifted if not verdict.correct)


def test_pictures_with_more_objects_than_asked_for_are_counted() -> None:
    """Whatever the strict rule says of them: a second shape beside the one asked for passes it."""
    two, one = Thing("ring", "red"), Thing("circle", "blue")
    both, alone = Caption("color_attr", (two, one)), Caption("colors", (two,))
    judged = [Judged((row, 0), both, Verdict(True, [])) for row in range(300)]  # more than a batch
    pictures = rendered(judged, 0).numpy()
    assert extra_objects(pictures, [both] * 300) == 0
    assert extra_objects(pictures, [alone] * 3 + [both] * 297) == pytest.approx(0.01)
    assert judge_pictures(pictures[:1], [alone])[0].correct
    three = Caption("counting", (Thing("ring", count=3),))
    assert extra_objects(pictures, [three] * 300) == 0  # too few are not too many


def test_counting_is_judged_at_its_own_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[float, int] = {}

    def detect(pictures: Any, threshold: float) -> list[list[Any]]:
        asked[threshold] = asked.get(threshold, 0) + len(pictures)
        return [[] for _ in pictures]

    monkeypatch.setattr("rtdmd_cli.engine.evaluation.shapes.detect", detect)
    captions = [
        Caption("counting", (Thing("circle", "red", 2),)),
        Caption("colors", (Thing("ring", "red"),)),
    ] * 3
    verdicts = judge_pictures(torch.zeros(6, 3, 32, 32).numpy(), captions)
    assert asked == {0.3: 3, 0.9: 3}
    assert ["circle" in verdict.reasons[0] for verdict in verdicts] == [True, False] * 3


def test_scores_average_tasks_and_count_failures() -> None:
    red, ring = Caption("colors", (Thing("circle", "red"),)), Caption("single_object", (Thing("ring"),))
    missing = Verdict(False, ["expected 1 circle, found 0"])
    judged = [
        Judged((200, 0), red, Verdict(True, [])),
        Judged((200, 1), red, missing),
        Judged((201, 0), red, missing),
        Judged((201, 1), red, missing),
        Judged((0, 0), ring, Verdict(True, [])),
        Judged((0, 1), ring, Verdict(True, [])),
    ]
    found = scores(judged)
    assert found["overall"] == pytest.approx((0.25 + 1) / 2)
    assert found["tasks"] == dict.fromkeys(TASKS) | {"colors": 0.25, "single_object": 1.0}
    assert found["images"] == 6 and found["prompts"]["colors"]["evaluated"] == 2
    assert found["failures"] == [{"reason": "expected 1 circle, found 0", "pictures": 3}]
    low, high = found["interval"]
    assert 0.5 <= low <= found["overall"] <= high <= 0.75


def test_clip_figures_against_rendered_pictures() -> None:
    judged: Any = unjudged(chosen_prompts(60))
    clip: Any = ColourClip()
    same = clip_figures(clip, rendered(judged, 0), judged)
    assert same["frechet"] == pytest.approx(0, abs=1e-6) and same["score"] == same["score_of_rendered"]
    assert same["frechet_pictures"] == [60, 60] and 0 < same["frechet_floor"] < 0.01
    red = torch.zeros(60, 3, 32, 32)
    red[:, 0] = torch.rand(60, 1, 1)
    other = clip_figures(clip, red, judged)
    assert other["frechet"] > 10 * same["frechet_floor"] and other["score"] == pytest.approx(0)
    one = clip_figures(clip, red[:1], judged[:1])
    assert one["frechet"] is None and one["frechet_pictures"] == [1, 1]


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    keys = [(0, 0), (0, 1), (0, 2), (7, 0), (7, 1), (9, 0)]
    judged: Any = [Judged(key, benchmark()[key[0]], Verdict(True, [])) for key in keys]
    clip: Any = ColourClip()
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures *= torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])[
        :, :, None, None
    ]
    vectors = clip.image_features(pictures)

    def apart(a: int, b: int) -> float:
        return 1 - float((vectors[a] * vectors[b]).sum() / (vectors[a].norm() * vectors[b].norm()))

    expected = ((apart(0, 1) + apart(0, 2) + apart(1, 2)) / 3 + apart(3, 4)) / 2
    assert 0.01 < expected == pytest.approx(clip_figures(clip, pictures, judged)["diversity"], rel=1e-5)
    alone = clip_figures(clip, pictures[2:4], judged[2:4])
    assert alone["diversity"] is None and alone["frechet"] is not None


def test_rendered_pictures_are_fixed_by_seed_and_key() -> None:
    judged = unjudged([0, 100, 300])
    assert torch.equal(rendered(judged, 0)[1:], rendered(judged[1:], 0))
    assert not torch.equal(rendered(judged, 0), rendered(judged, 1))


def test_the_benchmarks_judge_says_what_the_detector_says() -> None:
    prompts = choose_prompts(BENCHMARKS["shapes"], None, 60)
    rows = list(prompts.texts)
    pictures = rendered(unjudged(rows), 0).roll(1, 0)
    judge = find_judge("shapes").open(CPU, None)
    found = judge.judge(pictures, list(prompts.texts.values()), list(prompts.metadata.values()))
    expected = judge_pictures(pictures.numpy(), [benchmark()[row] for row in rows])
    assert [each["reasons"] for each in found] == [verdict.reasons for verdict in expected]
    assert [each["score"] for each in found] == [float(verdict.correct) for verdict in expected]
    assert {0.0, 1.0} == {each["score"] for each in found}


def test_a_caption_is_the_benchmarks_or_is_read() -> None:
    row = chosen_prompts(60)[-1]
    text = benchmark()[row].text
    assert Judged.of((row, 0), text, True, []).caption == benchmark()[row]
    assert Judged.of((0, 0), text, True, []).caption.text == text


def test_a_tick_for_a_right_picture_and_a_cross_for_a_wrong_one(tmp_path: Path) -> None:
    judged = [
        Judged((0, 0), benchmark()[0], Verdict(True, [])),
        Judged((1, 0), benchmark()[1], Verdict(False, ["x"])),
    ]
    conditions = dict.fromkeys(("model", "model_hash", "steps", "guidance", "eta", "seed", "version"), "-")
    save_verdict_grid(scores(judged) | conditions, judged, torch.zeros(2, 3, 32, 32), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        pixels = image.convert("RGB")
        sides = [pixels.crop((left, 0, left + 160, pixels.height)) for left in (20, 188)]
    marks = [{c for _, c in side.getcolors(1 << 20)} & {(31, 138, 76), (200, 48, 44)} for side in sides]  # type: ignore[misc,union-attr]
    assert marks == [{(31, 138, 76)}, {(200, 48, 44)}]


def test_the_independent_judge_of_the_package() -> None:
    clip = open_judge(CPU)
    if clip is None:
        pytest.skip("the package has no trained models yet")
    judged = unjudged(chosen_prompts(60))
    figures = clip_figures(clip, rendered(judged, 0), judged)
    shuffled = clip_figures(clip, rendered(judged, 0).flip(0), judged)
    assert figures["score"] > shuffled["score"] + 0.05
