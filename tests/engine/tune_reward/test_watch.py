"""When a run is taken to exploit its rewards: numbers alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rtdmd_cli.config.watch import WatchConfig
from rtdmd_cli.engine.tune_reward.measure import Measured
from rtdmd_cli.engine.tune_reward.watch import (
    START,
    Standing,
    advice,
    alarm,
    begin_watch,
    passed_limits,
    share_of_diversity,
    standing,
    watch,
)

CONFIG = WatchConfig(max_held_out_fall=0.5, min_diversity=0.8)
WEIGHTS = {"mine": 1.0, "other": 3.0}


def measured(
    judge: float, mine: float, other: float = 1.0, diversity: float = 0.2, std: float = 0.5
) -> Measured:
    means = {"judge": judge, "mine": mine, "other": other}
    features, each = {"diversity": diversity, "frechet": 1.0}, (0.5 * diversity, 1.5 * diversity)
    return Measured(means, dict.fromkeys(means, std), features, prompts=2, diversities=each)


def begun(**start: Any) -> dict[str, Any]:
    records: dict[str, Any] = {}
    begin_watch(records, measured(**({"judge": 2.0, "mine": 1.0} | start)))
    return records


def test_a_standing_is_in_the_starts_standard_deviations() -> None:
    found = standing(7, measured(1.9, 1.5, 0.9, diversity=0.15, std=99.0), begun(), WEIGHTS)
    assert found.step == 7
    assert found.held_out == pytest.approx(-0.2, rel=1e-3)
    assert found.trained == pytest.approx((1.0 - 3 * 0.2) / 4, rel=1e-2)
    assert found.diversity == pytest.approx(0.75)
    again = standing(0, measured(2.0, 1.0), begun(), WEIGHTS)
    assert (again.held_out, again.trained, again.diversity) == (0, 0, 1)


def test_what_was_not_measured_has_no_standing() -> None:
    records: dict[str, Any] = {}
    begin_watch(records, Measured({"mine": 1.0}, {"mine": 0.0}, {}))
    found = standing(1, Measured({"mine": 2.0}, {"mine": 0.0}, {}), records, {"mine": 1.0})
    assert found.held_out is None and found.diversity is None
    assert found.trained == pytest.approx(1e4)  # the floor, for a reward that was the same for every picture
    nothing = begun()
    begin_watch(nothing, Measured({}, {}, {}))
    none = standing(1, Measured({}, {}, {}), nothing, WEIGHTS)
    assert none == Standing(1, None, None, None) and passed_limits(none, START, CONFIG) == []
    assert watch(nothing, none, CONFIG) == "" and advice(nothing) == "" and "best" not in nothing


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Standing(5, -0.4, 2.0, 0.9), []),  # within both limits
        (Standing(5, -0.6, 2.0, 0.9), ["held-out"]),
        (Standing(5, -0.6, -0.1, 0.9), []),  # the trained ones fell as well: bad, but no exploit
        (Standing(5, 0.6, 2.0, 0.7), ["diversity"]),
        (Standing(5, 0.6, -0.1, 0.7), []),
        (Standing(5, -0.6, 2.0, 0.7), ["held-out", "diversity"]),
        (Standing(5, None, 2.0, 0.7), ["diversity"]),
        (Standing(5, -0.6, 2.0, None), ["held-out"]),
        (Standing(5, -0.6, None, 0.7), []),
        (Standing(5, 0.6, 2.0, 0.7, 0.04), ["diversity"]),
        (Standing(5, 0.6, 2.0, 0.7, 0.06), []),  # too few pictures to tell
    ],
)
def test_limits(now: Standing, expected: list[str]) -> None:
    found = passed_limits(now, START, CONFIG)
    assert len(found) == len(expected)
    assert all(word in text for word, text in zip(expected, found, strict=True))
    if "held-out" in expected:
        assert "0.6 standard deviations since the start (limit 0.5)" in found[0]
    if "diversity" in expected:
        error = 2 * now.diversity_error
        assert f"fell to 70% of the start's, give or take {error:.0%} (limit 80%)" in found[-1]


def test_the_share_of_diversity_and_its_standard_error() -> None:
    """Against the spread of the share over many draws of the prompts."""
    random = np.random.default_rng(0)
    start = random.gamma(4.0, 0.05, 4000)
    now = 0.5 * random.gamma(4.0, 0.04, 4000) + 0.4 * start
    share, _ = share_of_diversity(now.tolist(), start.tolist())
    assert share == pytest.approx(now.mean() / start.mean())
    found = [
        share_of_diversity(now[i : i + 40].tolist(), start[i : i + 40].tolist()) for i in range(0, 4000, 40)
    ]
    errors, shares = [error for _, error in found], [share for share, _ in found if share is not None]
    assert np.mean(errors) == pytest.approx(np.std(shares, ddof=1), rel=0.2)
    assert share_of_diversity([0.2], [0.4]) == (0.5, 0.0)
    assert share_of_diversity([], []) == (None, 0.0)


def test_the_held_out_rewards_are_compared_with_their_best() -> None:
    """They are still above the start, and the trained ones above where they were at the best."""
    best = Standing(10, 1.0, 1.0, 1.0)
    (text,) = passed_limits(Standing(20, 0.3, 1.2, 1.0), best, CONFIG)
    assert "fell by 0.7 standard deviations since epoch 10" in text
    assert passed_limits(Standing(20, 0.3, 0.9, 1.0), best, CONFIG) == []


def followed(course: list[tuple[float, float]]) -> tuple[dict[str, Any], list[str]]:
    """The records after measurements (judge, mine), one an epoch from epoch 1 on, and what was said."""
    records, said = begun(), []
    for epoch, (judge, mine) in enumerate(course, 1):
        records = json.loads(json.dumps(records))  # as a checkpoint keeps them
        said.append(watch(records, standing(epoch, measured(judge, mine), records, WEIGHTS), CONFIG))
    return records, said


def test_the_best_measurement_is_remembered_and_its_checkpoint_named() -> None:
    records, said = followed([(2.1, 1.1), (2.4, 1.2), (2.4, 1.3), (2.2, 1.4), (2.1, 1.5), (2.0, 1.6)])
    assert records["best"] == 2  # not the later one that is as good
    assert [bool(text) for text in said] == [False] * 4 + [True, True]
    assert "since epoch 2 (limit 0.5)" in said[4]
    assert advice(records) == "The best checkpoint by the held-out rewards is step-000002, which is kept."
    assert alarm(records).startswith("From epoch 5 on, in 2 measurements: the rewards trained on rose while")


def test_a_run_that_never_beats_stage_1_says_so() -> None:
    records, said = followed([(1.9, 1.1), (1.7, 1.2)])
    assert records["best"] == 1 and "since the start" in said[1]
    assert "step-000001, which is kept; the generator of stage 1 was no worse" in advice(records)
    assert alarm(records).startswith("From epoch 2 on: ")


def test_a_run_that_is_well_is_not_warned_of() -> None:
    records, said = followed([(2.1, 1.1), (2.3, 1.3), (2.6, 1.5)])
    assert said == ["", "", ""] and alarm(records) == "" and records["best"] == 3
