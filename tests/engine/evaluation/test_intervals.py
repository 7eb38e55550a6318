"""Bootstrap intervals: coverage on simulated data, strata, and bad input."""

import numpy as np
import pytest

from rtdmd_cli.engine.evaluation.intervals import bootstrap_mean, bootstrap_overall


def test_known_interval() -> None:
    """A balanced 0/1 sample of 400: 0.5 -+ 1.96 * 0.5 / 20."""
    mean, low, high = bootstrap_mean([0, 1] * 200)
    assert mean == 0.5
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)


def test_seed_decides() -> None:
    values = list(np.random.default_rng(5).normal(size=50))
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_coverage_of_the_mean() -> None:
    """95% of the intervals hold the true mean; 400 trials give a standard error of 1.1%."""
    rng = np.random.default_rng(0)
    trials = [bootstrap_mean(list(rng.exponential(size=100)), n=300, seed=i) for i in range(400)]
    covered = np.mean([low <= 1.0 <= high for _, low, high in trials])
    assert 0.915 <= covered <= 0.98


def test_coverage_of_the_overall_score() -> None:
    """The six tasks of GenEval with their sizes and very different accuracies."""
    rng = np.random.default_rng(1)
    sizes, accuracies = (80, 99, 80, 94, 100, 100), (0.98, 0.8, 0.6, 0.85, 0.2, 0.5)
    covered, widths = [], []
    for i in range(250):
        tasks = {
            str(p): list((rng.random(n) < p).astype(float)) for n, p in zip(sizes, accuracies, strict=True)
        }
        _, low, high = bootstrap_overall(tasks, n=300, seed=i)
        covered.append(low <= np.mean(accuracies) <= high)
        widths.append(high - low)
    assert 0.91 <= np.mean(covered) <= 0.985
    error = np.sqrt(sum(p * (1 - p) / n for n, p in zip(sizes, accuracies, strict=True))) / 6
    assert np.mean(widths) == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_overall_weighs_tasks_the_same_and_resamples_within_them() -> None:
    """Tasks without spread have an interval without width, however far apart they are."""
    assert bootstrap_overall({"a": [1.0] * 30, "b": [0.0]}) == (0.5, 0.5, 0.5)
    mean, low, high = bootstrap_overall({"a": [1.0] * 30, "b": [0.0, 1.0] * 20})
    assert mean == 0.75
    assert 0.5 < low < 0.75 < high < 1.0


def test_values_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a block changes nothing, also where it does not divide the number of resamples."""
    values = list(np.random.default_rng(6).normal(size=50))
    whole = bootstrap_mean(values, n=333)
    monkeypatch.setattr("rtdmd_cli.engine.evaluation.intervals.BLOCK", 5000)
    assert bootstrap_mean(values, n=333) == whole


def test_bad_input() -> None:
    for values in ([], [1.0, float("nan")], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="finite values"):
            bootstrap_mean(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one task"):
        bootstrap_overall({})
    with pytest.raises(ValueError, match="one resample"):
        bootstrap_mean([1.0], n=0)
