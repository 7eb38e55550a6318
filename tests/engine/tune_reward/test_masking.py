"""Pictures that a reward can't judge: left out of an epoch, as if they had not been drawn; counted; and a run's end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.rewards import registry
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, checkpoint_steps, load_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.tune_reward import recipe as tune_reward
from rtdmd_cli.engine.tune_reward.pull import take_pull
from rtdmd_cli.engine.tune_reward.recipe import advantages_of, decoded, tune, update_generator
from rtdmd_cli.engine.tune_reward.rollouts import Rollouts, Tuner, roll_out
from rtdmd_cli.errors import RewardFailure
from tests.engine.tune_reward.test_recipe import assert_close, expected_gradient, gradients, weights
from tests.engine.tune_reward.test_run import run, same
from tests.tiny_models import PROMPTS
from tests.tiny_runs import make_run
from tests.tiny_tuning import Pattern, make_tuner, stir

BAD = 1  # in the middle of the first of two groups of three
TERMS = {"dmd_weight": 0.5, "backprop_weight": 0.7, "kl_weight": 2.0, "grad_clip": 1e6, "max_bad_share": 0.2}


def six(**values: Any) -> Tuner:
    return stir(make_tuner(images_per_epoch=6, images_per_prompt=3, **(TERMS | values)))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every latent of row BAD is nan, and so is its picture, and what the rewards say of it."""

    def roll_out_and_poison(tuner: Tuner, epoch: int) -> Rollouts:
        rollouts = roll_out(tuner, epoch)
        rollouts.x[BAD], rollouts.logp[BAD] = math.nan, math.nan
        return rollouts

    monkeypatch.setattr(tune_reward, "roll_out", roll_out_and_poison)


def written_out(rewards: dict[str, Tensor], groups: list[list[int]]) -> Tensor:
    """Step 5 of the method over some rows: per reward against the group, over the std of all, weighted, whitened."""
    rows = [row for group in groups for row in group]
    total = torch.zeros(len(rows), dtype=torch.float64)
    for name, weight in (("one", 1.0), ("two", 0.5)):
        r = rewards[name].double()
        centred = torch.cat([r[group] - r[group].mean() for group in groups])
        total += weight * centred / (r[rows].std(correction=0) + 1e-4)
    return ((total - total.mean()) / (total.std(correction=0) + 1e-4)).clamp(-5, 5).float()


def test_the_advantages_of_the_others_are_those_without_it(
    poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    tuner = six()
    clean = roll_out(tuner, 0)
    rewards = tuner.rewards.score(tuner.core.backbone.decode(clean.x[:, -1]), clean.prompts.tolist()).rewards
    monkeypatch.setattr(tune_reward, "update_generator", lambda t, e, r, a: seen.append(a))
    tune(tuner, 0)
    expected = written_out(rewards, [[0, 2], [3, 4, 5]])
    torch.testing.assert_close(seen[0][[0, 2, 3, 4, 5]], expected, rtol=1e-3, atol=1e-3)
    assert seen[0][BAD].isnan()
    everyone = written_out(rewards, [[0, 1, 2], [3, 4, 5]])
    assert (everyone[[0, 2]] - expected[:2]).abs().max() > 0.05  # it would have made a difference


@pytest.mark.parametrize(("size", "tilt"), [(None, 0.0), (1, 0.0), (2, 0.0), (2, 1.0)])
def test_nothing_of_it_reaches_a_weight_or_a_figure(
    size: int | None, tilt: float, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is nan here; the run beside it has the same picture whole, and leaves it out for another reason."""
    lines: list[str] = []
    bad, whole = six(micro_batch=size, tilt=tilt), six(tilt=tilt)
    bad.tell = lines.append
    tune(bad, 0)
    prompt = int(roll_out(bad, 0).prompts[BAD]) + 1
    assert [f"for prompt {prompt} " in line and "epoch 1: " in line for line in lines] == [True, True]
    monkeypatch.setattr(tune_reward, "roll_out", roll_out)
    scores = whole.rewards.score

    def refuse(images: Tensor, prompts: Sequence[int]) -> Any:
        found = scores(images, prompts)
        found.rewards["two"][BAD] = math.nan
        return found

    monkeypatch.setattr(whole.rewards, "score", refuse)
    tune(whole, 0)
    for role in ("generator", "fake"):
        assert_close(gradients(bad, role), gradients(whole, role), rtol=5e-3)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(bad)[name], tensor, rtol=0, atol=1e-4)
    assert bad.core.metrics["left_out"] == 1
    for name in whole.core.metrics.keys() - {"drift"}:
        assert bad.core.metrics[name] == pytest.approx(whole.core.metrics[name], rel=2e-3, abs=1e-5), name


def test_the_gradient_is_that_of_the_others_alone() -> None:
    """The last picture is left out, so that the noise of the formula's rows 0 to 4 is theirs."""
    tuner = six(rewards=("one", "two=0.5"))
    rollouts, rows = roll_out(tuner, 1), torch.arange(5)
    advantages = advantages_of(tuner, {"one": torch.rand(5), "two": torch.rand(5)}, rows, 6)
    others = Rollouts(
        rollouts.x[:5], rollouts.logp[:5], rollouts.prompts[:5], rollouts.steps, (list(range(5)),), 0, 5
    )
    cond = tuner.core.conditioning(others.prompts.tolist())
    expected = expected_gradient(tuner, others, cond, advantages[:5], 1)
    tuner.core.metrics = {}
    chosen = rollouts.only(rows)
    pull = take_pull(tuner, chosen, decoded(tuner, rollouts))
    assert not pull.gradient[5].any() and pull.gradient[:5].flatten(1).any(dim=1).all()
    update_generator(tuner, 1, replace(chosen, pull=pull), advantages)
    assert_close(gradients(tuner), expected)


def test_without_a_bad_picture_nothing_is_different() -> None:
    rollouts = roll_out(six(micro_batch=2), 0)
    assert rollouts.only(torch.arange(6)) is rollouts
    assert rollouts.only(torch.tensor([2, 3, 5])).parts == ([2, 3], [5])  # the first part is gone
    tuner = six()
    tune(tuner, 0)
    assert "left_out" not in tuner.core.metrics


def test_too_many_end_the_epoch_before_anything_moves(poisoned: None) -> None:
    tuner = six(max_bad_share=0.16)
    before = weights(tuner)
    with pytest.raises(RewardFailure, match="1 of 6 pictures got no reward in epoch 8"):
        tune(tuner, 7)
    assert all(torch.equal(v, before[name]) for name, v in weights(tuner).items())


# --- a run

PICKY = "picky"


@dataclass(frozen=True)
class Picky:
    """A pattern's agreement; nan for a prompt, while `broken` is set."""

    broken: set[str]
    differentiable: bool = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        bad = torch.tensor([prompt in self.broken for prompt in prompts], device=images.device)
        return Pattern(1).score(images, prompts, metadata).masked_fill(bad, math.nan)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The prompts for which the reward PICKY has no answer."""
    prompts: set[str] = set()

    def load(device: torch.device, path: str | None) -> Reward:
        return Picky(prompts)

    entry = RewardEntry(PICKY, "A test.", -1, 1, True, (), load)
    monkeypatch.setitem(registry.REWARDS, PICKY, entry)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    return prompts


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    stage_1 = make_run(tmp_path_factory.mktemp("stage1"), "first")
    yield load_checkpoint(stage_1.checkpoints / "step-000010")


def test_a_run_names_and_counts_them(begin: Checkpoint, broken: set[str], tmp_path: Path) -> None:
    """4 prompts, 2 in an epoch: the third comes in some epochs and not in others."""
    broken.add(PROMPTS[2])
    outcome = run(tmp_path, "some", begin, rewards=(PICKY,), epochs=4, max_bad_share=0.5, held_out=())
    folder = RunFolder(outcome.run)
    found = {row["iteration"]: row.get("left_out", 0) for row in folder.metrics.read()}
    assert set(found.values()) == {0, 2}
    assert outcome.records["left_out"] == sum(found.values())
    log = (folder.path / "log.txt").read_text(encoding="utf-8")
    first = min(epoch for epoch, count in found.items() if count)
    line = f"epoch {first}: the reward {PICKY} answered nan for prompt 3 ({PROMPTS[2]!r}); the picture is left out"
    assert log.count(line) == 2
    assert log.count(f"epoch {first}: 2 pictures that a reward can't judge are left out") == 1
    assert f"{sum(found.values()):.0f} pictures without a reward" in folder.report.read_text(encoding="utf-8")


def test_a_run_that_has_too_many_is_saved_and_goes_on_as_if_nothing_had_been(
    begin: Checkpoint, broken: set[str], tmp_path: Path
) -> None:
    values: dict[str, Any] = {"rewards": (PICKY,), "epochs": 4, "held_out": (), "save_every": 100}
    straight = run(tmp_path, "straight", begin, **values)
    broken.add(PROMPTS[2])
    with pytest.raises(RewardFailure, match="2 of 4 pictures got no reward in epoch"):
        run(tmp_path, "failed", begin, **values)
    folder = RunFolder(tmp_path / "failed")
    status = folder.status()
    assert status["state"] == "failed" and "more than `tune_reward.max_bad_share` (0.1)" in status["reason"]
    (saved,) = checkpoint_steps(folder.checkpoints)
    assert saved == status["iteration"] and f"got no reward in epoch {saved + 1}," in status["reason"]
    broken.clear()
    start = Start(folder, load_checkpoint(folder.checkpoints / f"step-{saved:06d}"))
    resumed = run(tmp_path, "failed", begin, start, **values)
    one, other = (load_checkpoint(outcome.checkpoint) for outcome in (straight, resumed))
    assert all(same(one.tensors[group], other.tensors[group]) for group in one.tensors)


def test_a_measurement_leaves_them_out_of_its_means(
    begin: Checkpoint, broken: set[str], tmp_path: Path
) -> None:
    broken.add("a star")
    values: dict[str, Any] = {"rewards": (PICKY,), "epochs": 1, "held_out": ()}
    outcome = run(tmp_path, "some", begin, max_bad_share=0.4, **values)
    assert math.isfinite(outcome.records["rewards_before"][PICKY])
    log = (outcome.run / "log.txt").read_text(encoding="utf-8")
    assert f"the first measurement: the reward {PICKY} answered nan for prompt 1 ('a star')" in log
    with pytest.raises(RewardFailure, match="1 of 3 pictures got no reward in the first measurement"):
        run(tmp_path, "failed", begin, **values)
    assert checkpoint_steps(tmp_path / "failed" / "checkpoints") == [0]
    assert json.loads((tmp_path / "failed/status.json").read_text())["state"] == "failed"
