"""The benchmark: every row is a real step, and the bare evaluations are those of the step."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmark import __main__ as bench
from scripts.benchmark.bare import recorded, replay
from scripts.benchmark.baseline import Baseline
from scripts.benchmark.cases import CASES, preset_of, step_of, trainer_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_is_a_preset_that_differs_in_what_it_says(case: bench.Case) -> None:
    first, made = preset_of(CASES[0], 2), preset_of(case, 2)
    assert made.distill.batch == 2 and made.distill.fake_per_generator == 1
    assert (made == first) is (case is CASES[0])
    assert case.against in {each.name for each in CASES}


def test_the_bare_evaluations_are_those_of_the_step() -> None:
    """Two turns with a rollout of k steps each: k + 1 + 2 for the fake score, k + 2 or 3 for the generator."""
    trainer = trainer_of(CASES[0], CPU, 2)
    before = {role: trainer.roles.state(role) for role in ("fake", "generator")}
    found = recorded(trainer, step_of(trainer), 3)
    roles = [each.role for each in found]
    assert roles.count("fake") == 4 and roles.count("teacher") == 1
    assert 2 <= roles.count("generator") <= 8
    trained = [each for each in found if each.gradient]
    assert [each.role for each in trained] == ["fake"] * 3 + ["generator"]
    moved = {role: trainer.roles.state(role) for role in before}
    assert not all(torch.equal(before["fake"][k], moved["fake"][k]) for k in moved["fake"])
    replay(trainer, found)
    for role, state in moved.items():
        assert all(torch.equal(state[key], tensor) for key, tensor in trainer.roles.state(role).items())


def test_the_baseline_has_three_networks_and_moves_two() -> None:
    baseline = Baseline(trainer_of(CASES[0], CPU, 2))
    before = {
        name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in baseline.networks.items()
    }
    baseline.step(0)
    after = {name: net.state_dict() for name, net in baseline.networks.items()}
    changed = {
        name for name in after if any(not torch.equal(after[name][k], v) for k, v in before[name].items())
    }
    assert changed == {"fake", "generator"}
    places = {p.data_ptr() for net in baseline.networks.values() for p in net.parameters()}
    assert len(places) == sum(len(list(net.parameters())) for net in baseline.networks.values())


def test_rounds_are_interleaved_and_the_first_is_thrown_away() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    steps = {
        name: bench.Step(
            lambda number, n=name: order.append(f"{n}{number}"), lambda number: order.append("-")
        )
        for name in ("a", "b")
    }
    seconds = bench.interleaved(steps, 2, lambda: float(next(ticks)))
    assert order == ["-", "a0", "-", "b0", "-", "a1", "-", "b1", "-", "a2", "-", "b2"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_table_has_ratios_of_rounds() -> None:
    name = CASES[0].name
    record = {
        "environment": {"device": "cpu", "cpus": 2, "threads": 1, "packages": {"torch": "2.13.0"}},
        "load_before": (0.5, 0, 0),
        "load_after": (1.0, 0, 0),
        "batch": 8,
        "rounds": 3,
        "left_out": {"base in nf4": "no"},
        "seconds": {name: [1.0, 2.0, 4.0], bench.BARE: [0.9, 1.8, 3.8], bench.BASELINE: [2.0, 4.0, 8.0]},
    }
    text = bench.table(record, [CASES[0]])
    assert f"| {bench.BASELINE} | 4.0000 | 2.000 | {name} |" in text
    assert "Outside the network's own evaluations: 10.0%." in text and "| base in nf4 | no |" in text
