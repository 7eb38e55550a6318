"""What stage 2's fake score is fitted to where rewards tilt distribution matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.compute.processes import Processes
from rtdmd_cli.engine.training.trainer import Draws
from rtdmd_cli.engine.tune_reward import fake_score as tune_matching
from rtdmd_cli.engine.tune_reward.checks import check_tilt
from rtdmd_cli.engine.tune_reward.fake_score import FAKE, drawn_images, update_fake_score
from rtdmd_cli.engine.tune_reward.recipe import tune
from rtdmd_cli.engine.tune_reward.rollouts import Rollouts, Tuner, roll_out
from rtdmd_cli.errors import UsageError
from tests.engine.distill.test_recipe import SIGMAS, diffuse, evaluate
from tests.tiny_tuning import make_tuner, stir, tune_preset

ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -2.0])


@dataclass(frozen=True)
class Half(Processes):
    """A process that has these images; nothing is exchanged with another."""

    own: range = range(0)

    def part(self, total: int) -> range:
        """See `Processes`."""
        return self.own


def tilted(boundaries: str = "every", **values: Any) -> Tuner:
    tuner = stir(make_tuner(**({"tilt": 1.0, "dmd_weight": 1.0, "consistency_weight": 0.0} | values)))
    tuner.core.config = tuner.core.config.model_copy(update={"boundaries": boundaries})
    return tuner


def test_poor_images_are_drawn_as_often_as_the_tilt_says() -> None:
    tuner = tilted(tilt=0.8, matching="distill", matching_images=3)
    expected, drawn = torch.softmax(-0.8 * ADVANTAGES.double(), 0), torch.zeros(4, dtype=torch.float64)
    for epoch in range(400):
        images = drawn_images(tuner, epoch, ADVANTAGES)
        assert images == sorted(images) and len(images) == 3
        drawn += torch.bincount(torch.tensor(images), minlength=4) / 1200
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.02)
    share = float(1 / (4 * expected.square().sum()))
    assert tuner.core.metrics["tilt_effective"] == pytest.approx(share)
    assert drawn_images(tuner, 7, ADVANTAGES) == drawn_images(tuner, 7, ADVANTAGES)
    assert len({tuple(drawn_images(tuner, epoch, ADVANTAGES)) for epoch in range(20)}) > 1


def test_an_image_without_a_reward_is_not_drawn() -> None:
    tuner, advantages = tilted(), torch.tensor([math.nan, -0.5, math.nan, 0.5])
    for epoch in range(20):
        images = drawn_images(tuner, epoch, advantages)
        assert set(images) <= {1, 3} and len(images) == 4


@pytest.mark.parametrize("matching", ["last", "distill"])
def test_the_fake_score_is_fitted_to_the_drawn_images(matching: str) -> None:
    """Section 3's loss, at every boundary that the recorded paths crossed, or at their ends alone."""
    tuner = tilted(matching=matching)
    core, rollouts = tuner.core, roll_out(tuner, 1)
    images = drawn_images(tuner, 1, ADVANTAGES)
    assert len(set(images)) < len(images)  # some twice
    draws, losses = Draws(core, FAKE, 1, range(4)), []
    cond = core.conditioning(rollouts.prompts[images].tolist())
    with torch.no_grad():
        for number in range(4) if matching == "distill" else [3]:
            s, x_s = SIGMAS[number + 1], rollouts.x[images, number + 1].double()
            t, x_t, sd, u = diffuse(draws, number, x_s, s)
            v = evaluate(core, "fake", x_t, t, cond).double()
            losses.append(((1 / sd**2).clamp(0, 10) * (sd * v - sd * u) ** 2).mean())
    core.metrics = {}
    before = core.roles.state("generator"), core.roles.state("fake")
    update_fake_score(tuner, 1, rollouts, ADVANTAGES)
    assert core.metrics["fake_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    after = core.roles.state("generator"), core.roles.state("fake")
    assert all(torch.equal(v, before[0][name]) for name, v in after[0].items())
    assert any(not torch.equal(v, before[1][name]) for name, v in after[1].items())


def test_one_boundary_where_distill_draws_one() -> None:
    tuner = tilted(boundaries="one", matching="distill")
    rollouts, seen = roll_out(tuner, 1), []
    for epoch in range(12):
        draws = Draws(tuner.core, FAKE, epoch, [0, 1])
        points = tune_matching.recorded_points(tuner, draws, rollouts.x[[2, 3]])
        ((number, boundary),) = points
        assert boundary.s == pytest.approx(SIGMAS[number + 1])
        assert torch.equal(boundary.x_s, rollouts.x[[2, 3], number + 1])
        seen.append(number)
    assert set(seen) == {0, 1, 2, 3}


def test_an_epoch_of_a_reward_without_a_gradient_moves_the_generator_by_it() -> None:
    """Through matching alone: with the tilt another generator comes out, by nothing but what was drawn."""
    found = []
    for tilt in (0.0, 3.0):
        tuner = tilted(tilt=tilt, matching="last", rewards=("rule",), policy_weight=0.0, grad_clip=1e6)
        for epoch in range(2):
            tune(tuner, epoch)
        found.append(tuner.core.roles.state("generator"))
        assert ("tilt_effective" in tuner.core.metrics) == (tilt > 0)
    assert any((v - found[0][name]).abs().max() > 1e-5 for name, v in found[1].items())


def test_a_process_without_a_drawn_image_has_a_gradient_of_zero() -> None:
    """Gradients are summed over the processes, each must have one; that of the whole is the sum of the parts."""
    tuner = tilted(matching="distill", matching_images=2)
    rollouts, advantages = roll_out(tuner, 1), torch.tensor([50.0, 50.0, -50.0, -50.0])
    assert set(drawn_images(tuner, 1, advantages)) <= {2, 3}
    parts = []
    for first in (0, 2):
        half = tilted(matching="distill", matching_images=2)
        own = range(first, first + 2)
        part = Rollouts(
            rollouts.x[first : first + 2], rollouts.logp, rollouts.prompts, (0,), (own,), first, 4
        )
        half.core.processes = Half(own=own)
        half.core.fake_optimizer.zero_grad()
        tune_matching.add_tilted_fake_gradients(half, 1, part, advantages)
        parts.append([p.grad for _, p in half.core.roles.named_parameters("fake")])
    tuner.core.fake_optimizer.zero_grad()
    tune_matching.add_tilted_fake_gradients(tuner, 1, rollouts, advantages)
    for nothing, all_of_it, (name, p) in zip(*parts, tuner.core.roles.named_parameters("fake"), strict=True):
        assert nothing is not None and not nothing.any()
        torch.testing.assert_close(all_of_it, p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_recorded_paths_hold_no_clean_predictions() -> None:
    """The full interval needs them at every boundary, so that it is for matching through the last step alone."""

    def with_interval(interval: str, **values: Any) -> Preset:
        preset = tune_preset(**({"tilt": 1.0, "matching": "distill"} | values))
        return preset.model_copy(update={"distill": preset.distill.model_copy(update={"interval": interval})})

    with pytest.raises(
        UsageError, match=r"tilt` \(1\) with .*distill` can't be with `distill.interval: full`"
    ):
        check_tilt(with_interval("full"))
    check_tilt(with_interval("sub"))
    for off in ({"tilt": 0.0}, {"dmd_weight": 0.0}, {"matching": "last"}):
        check_tilt(with_interval("full", **off))
