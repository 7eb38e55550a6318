"""Stage 2's recipe on a tiny model, against method section 4 written out once more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.algo.gradients import bound_gradients
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.training.matching import add_fake_gradients, add_matching_gradients
from rtdmd_cli.engine.training.trainer import Draws
from rtdmd_cli.engine.tune_reward import recipe as tune_reward
from rtdmd_cli.engine.tune_reward.fake_score import FAKE, update_fake_score
from rtdmd_cli.engine.tune_reward.pull import take_pull
from rtdmd_cli.engine.tune_reward.recipe import decoded, tune, update_generator
from rtdmd_cli.engine.tune_reward.rollouts import Rollouts, Tuner, chosen_prompts, chosen_steps, roll_out
from rtdmd_cli.engine.tune_reward.run import stage_1_settings
from rtdmd_cli.errors import NumericalError, RewardFailure
from tests.engine.distill.test_recipe import carry, evaluate
from tests.tiny_tuning import CPU, FROZEN, PROMPT_SET, REWARDS, loads, make_tuner, stir, tune_preset

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # of the published schedule at shift 3
COS, SIN = math.cos(0.9 * math.pi / 2), math.sin(0.9 * math.pi / 2)
ROLES = ("generator", "fake")
OFF = {"policy_weight": 0.0, "dmd_weight": 0.0, "backprop_weight": 0.0}


def gradients(tuner: Tuner, role: str = "generator") -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in tuner.core.roles.named_parameters(role)
    }


def weights(tuner: Tuner) -> dict[str, Tensor]:
    state = tuner.core.roles.state
    return {f"{role}/{name}": v for role in ROLES for name, v in state(role).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 2e-3) -> None:
    """Each tensor within `rtol` of its own size; at least one is not 0."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * size + 1e-12, msg=name)
    assert any(tensor.any() for tensor in expected.values())


def epoch_of(tuner: Tuner, epoch: int = 1) -> tuple[Rollouts, Conditioning, Tensor]:
    """Rollouts with their pull, encoded prompts, and advantages that are not symmetric."""
    rollouts = roll_out(tuner, epoch)
    if tuner.backprop_weight:
        rollouts = replace(rollouts, pull=take_pull(tuner, rollouts, decoded(tuner, rollouts)))
    advantages = torch.tensor([1.5, -0.5, 0.25, -2.0])[: len(rollouts.prompts)]
    return rollouts, tuner.core.conditioning(rollouts.prompts.tolist()), advantages


# --- what is drawn


def test_the_subset_of_steps() -> None:
    tuner = make_tuner()
    drawn = [chosen_steps(tuner, epoch) for epoch in range(90)]
    assert set(drawn) == {(0, 1), (0, 2), (1, 2)}
    assert all(20 <= drawn.count(pair) <= 40 for pair in set(drawn))
    other = make_tuner(seed=4)
    assert drawn != [chosen_steps(other, epoch) for epoch in range(90)]
    assert {chosen_steps(make_tuner(subset_steps=3), 0)} == {(0, 1, 2)}


def test_prompts_of_an_epoch_are_distinct() -> None:
    tuner = make_tuner(images_per_epoch=6)
    drawn = [chosen_prompts(tuner, epoch) for epoch in range(30)]
    for prompts in drawn:
        assert prompts[0::2] == prompts[1::2] and len(set(prompts)) == 3
        assert set(prompts) <= set(range(4))
    assert len({tuple(prompts) for prompts in drawn}) > 10


def noises(tuner: Tuner, rollouts: Rollouts, cond: Conditioning) -> list[Tensor]:
    """What was added to the mean of each stochastic step, over its standard deviation: [N,C,H,W] each."""
    found = []
    for k in range(3):
        x, sigma, s = rollouts.x[:, k], SIGMAS[k], SIGMAS[k + 1]
        with torch.no_grad():
            v = evaluate(tuner.core, "generator", x, torch.full((len(x),), sigma), cond)
        mean = carry(x.double(), v.double(), sigma, s, torch.zeros_like(x).double())
        found.append(((rollouts.x[:, k + 1] - mean) / (s * SIN)).float())
    return found


@pytest.mark.parametrize("subset", [1, 2])
def test_noise_of_a_rollout(subset: int) -> None:
    """Fresh at the start and on chosen steps; on the others the same for a prompt's images, not for two prompts."""
    tuner = stir(make_tuner(subset_steps=subset, micro_batch=1))
    drawn: list[Tensor] = []
    for epoch in (0, 1):
        rollouts, cond, _ = epoch_of(tuner, epoch)
        steps = rollouts.steps
        assert steps == chosen_steps(tuner, epoch) and len(steps) == subset
        found = noises(tuner, rollouts, cond)
        for k, noise in enumerate(found):
            assert noise.std() == pytest.approx(1, abs=0.1) and abs(noise.mean()) < 0.1
            if k in steps:
                drawn += list(noise)
            else:
                assert (noise[0] - noise[1]).abs().max() < 1e-4 and (noise[2] - noise[3]).abs().max() < 1e-4
                drawn += [noise[0], noise[2]]
        drawn += list(rollouts.x[:, 0])
    rows = torch.stack(drawn).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.35  # no two share their noise


def test_rollouts_are_seeded_and_do_not_depend_on_the_micro_batch() -> None:
    first, again = roll_out(make_tuner(), 2), roll_out(make_tuner(), 2)
    assert torch.equal(first.x, again.x) and torch.equal(first.logp, again.logp)
    small = roll_out(make_tuner(micro_batch=1), 2)
    assert len(small.parts) == 4 and torch.equal(small.prompts, first.prompts)
    torch.testing.assert_close(small.x, first.x, rtol=0, atol=1e-4)
    other = roll_out(make_tuner(seed=4), 2)
    assert (other.x[:, 0] - first.x[:, 0]).abs().max() > 1


def test_rollouts_are_made_by_the_raw_generator_on_top_of_stage_1() -> None:
    tuner = make_tuner()
    start, stirred = roll_out(tuner, 0), roll_out(stir(make_tuner()), 0)
    assert torch.equal(start.x[:, 0], stirred.x[:, 0])
    assert (start.x[:, -1] - stirred.x[:, -1]).abs().max() > 1e-3
    for epoch_x, role in ((start.x, "start"), (stirred.x, "generator")):
        at = tuner if role == "start" else stir(tuner)
        x = epoch_x[:, 3]
        cond = at.core.conditioning(start.prompts.tolist())
        with torch.no_grad():
            v = evaluate(at.core, role, x, torch.full((4,), 0.5), cond)
        torch.testing.assert_close(epoch_x[:, 4], x - 0.5 * v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["reduced", "gaussian"])
def test_recorded_log_probabilities(form: str) -> None:
    tuner = stir(make_tuner(logprob=form))
    rollouts, cond, _ = epoch_of(tuner)
    assert rollouts.x.shape == (4, 5, 4, 8, 8) and rollouts.logp.shape == (4, 3)
    for k, noise in enumerate(noises(tuner, rollouts, cond)):
        std = SIGMAS[k + 1] * SIN
        if form == "reduced":
            expected = -(std**2) * noise.square().mean(dim=(1, 2, 3))
        else:
            normal = torch.distributions.Normal(0.0, std)
            expected = normal.log_prob(std * noise).sum(dim=(1, 2, 3))
        torch.testing.assert_close(rollouts.logp[:, k], expected, rtol=1e-4, atol=1e-5)


def test_latents_stay_float32_on_a_bf16_base() -> None:
    rollouts = roll_out(stir(make_tuner(dtype=torch.bfloat16)), 0)
    assert rollouts.x.dtype == torch.float32 and rollouts.x.device == CPU
    rounded = rollouts.x.to(torch.bfloat16).float()
    assert (rounded != rollouts.x).float().mean() > 0.9


# --- the generator's gradient, written out: float64 outside the networks, none of the product's formulas


def matching_pull(tuner: Tuner, x0: Tensor, cond: Conditioning, epoch: int) -> Tensor:
    """A scalar with the gradient of the generator loss of section 3 at s = 0; x0 has the graph."""
    draws, core = Draws(tuner.core, "tune/generator", epoch, range(len(x0))), tuner.core
    with torch.no_grad():
        u, noise = draws.uniform("3/time").double(), draws.normal("3/renoise").double()
        t = (0.01 + 0.99 * u).clamp(0.02, 0.98).view(-1, 1, 1, 1)
        x_t = (1 - t) * x0 + t * noise
        base = evaluate(core, "teacher", x_t, t, core.empty.select([0] * len(x0)))
        teacher = base + 4.0 * (evaluate(core, "teacher", x_t, t, cond) - base)
        y_teacher = x_t - t * teacher
        y_fake = x_t - t * evaluate(core, "fake", x_t, t, cond)
        g = (y_fake - y_teacher) / (x0 - y_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (x0 * g).sum() / g.numel()


def mean_of(tuner: Tuner, x: Tensor, k: int, cond: Conditioning) -> Tensor:
    """Of a transition, under the role that is active; x0 for the last."""
    v = tuner.core.backbone.velocity(x.float(), torch.full((len(x),), SIGMAS[k]), cond).double()
    return carry(x, v, SIGMAS[k], SIGMAS[k + 1], torch.zeros_like(v))


def expected_gradient(
    tuner: Tuner, rollouts: Rollouts, cond: Conditioning, advantages: Tensor, epoch: int
) -> dict[str, Tensor]:
    """(sum over chosen steps of L_k + w dmd + w hinge) / (M + 1), section 4 step 6."""
    config, core, x = tuner.config, tuner.core, rollouts.x.double()
    noise = [n.double() for n in noises(tuner, rollouts, cond)]
    total: Any = 0.0
    names, parameters = zip(*core.roles.named_parameters("generator"), strict=True)
    with core.roles.role("generator", train=True):
        for k in rollouts.steps:
            mean, std = mean_of(tuner, x[:, k], k, cond), SIGMAS[k + 1] * SIN
            square = (x[:, k + 1] - mean).square()
            if config.logprob == "reduced":
                logp = -square.mean(dim=(1, 2, 3))
            else:
                logp = -(square / (2 * std**2)).sum(dim=(1, 2, 3))
            total = total - config.policy_weight * (advantages * (logp - logp.detach()).exp()).mean()
            if config.kl_weight:
                with torch.no_grad(), core.roles.role("start"):
                    reference = mean_of(tuner, x[:, k], k, cond)
                total = total + config.kl_weight * ((mean - reference) ** 2 / (2 * std**2)).mean()
        if config.dmd_weight:
            clean = mean_of(tuner, x[:, 3], 3, cond)
            total = total + config.dmd_weight * matching_pull(tuner, clean, cond, epoch)
        pulls = hinge_gradients(tuner, rollouts, cond, noise, parameters)
        if isinstance(total, Tensor):
            pulls = [a + b for a, b in zip(pulls, grads(total, parameters), strict=True)]
    return {name: (pull / (len(rollouts.steps) + 1)).float() for name, pull in zip(names, pulls, strict=True)}


def grads(loss: Tensor, wanted: Sequence[Tensor], of: Tensor | None = None) -> list[Tensor]:
    """Gradient of a loss, or product of `of` with the Jacobian of a tensor; zeros where there is none."""
    parts = torch.autograd.grad(loss, wanted, of, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(w) if part is None else part.double() for w, part in zip(wanted, parts, strict=True)
    ]


def hinge_gradients(
    tuner: Tuner, rollouts: Rollouts, cond: Conditioning, noise: list[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Of w hinge, step by step from the last one: each carries a sample's gradient on, cut to its norm at x0."""
    config, prompts = tuner.config, rollouts.prompts.tolist()
    if not config.backprop_weight:
        return [torch.zeros_like(p).double() for p in parameters]
    at = 4 - config.backprop_steps
    entered = [rollouts.x[:, at].double().requires_grad_()]
    left = []
    for k in range(at, 4):
        mean = mean_of(tuner, entered[-1], k, cond)
        left.append(mean if k == 3 else mean + SIGMAS[k + 1] * SIN * noise[k])
        entered.append(left[-1].detach().requires_grad_())
    images = tuner.core.backbone.decode(entered[-1].float())
    one, two = (
        REWARDS[name][0].score(images, [""] * len(prompts), [{}] * len(prompts)) for name in ("one", "two")
    )
    hinge = config.backprop_weight * (config.backprop_margin - (one + 0.5 * two / 4)).clamp(min=0).mean()
    pull = grads(hinge, [entered[-1]])[0]
    largest = pull.flatten(1).norm(dim=1)
    total = [torch.zeros_like(p).double() for p in parameters]
    for before, after in zip(reversed(entered[:-1]), reversed(left), strict=True):
        back, *parts = grads(after, [before, *parameters], pull)
        total = [a + b for a, b in zip(total, parts, strict=True)]
        size = back.flatten(1).norm(dim=1)
        pull = back * torch.where(size > largest, largest / size, 1.0).view(-1, 1, 1, 1)
    return total


TERMS: dict[str, dict[str, Any]] = {
    "all": {"policy_weight": 1.0, "dmd_weight": 0.5, "backprop_weight": 0.7},
    "all of three steps": {"subset_steps": 3, "dmd_weight": 0.5, "backprop_weight": 0.7, "kl_weight": 2.0},
    "policy": OFF | {"policy_weight": 2.0},
    "exact density": OFF | {"policy_weight": 2.0, "logprob": "gaussian"},
    "matching": OFF | {"dmd_weight": 1.0},
    "back-propagation": OFF | {"backprop_weight": 1.0},
    "through two steps": OFF | {"backprop_weight": 1.0, "backprop_steps": 2},
    "through all steps": OFF | {"backprop_weight": 1.0, "backprop_steps": 4},
    "matching through one step": {"dmd_weight": 1.0, "backprop_weight": 1.0, "backprop_steps": 2},
    "without policy": {"policy_weight": 0.0, "dmd_weight": 0.5, "backprop_weight": 0.7},
    "without matching": {"dmd_weight": 0.0, "backprop_weight": 0.7},
    "without back-propagation": {"backprop_weight": 0.0, "dmd_weight": 0.5},
    "KL": {"dmd_weight": 0.0, "backprop_weight": 0.0, "kl_weight": 3.0},
}


@pytest.mark.parametrize("terms", TERMS)
def test_the_generator_gradient_is_that_of_the_method(terms: str) -> None:
    tuner = stir(make_tuner(grad_clip=1e6, **TERMS[terms]))
    rollouts, cond, advantages = epoch_of(tuner)
    expected = expected_gradient(tuner, rollouts, cond, advantages, 1)
    tuner.core.metrics = {}
    update_generator(tuner, 1, rollouts, advantages)
    assert_close(gradients(tuner), expected)
    metrics, config = tuner.core.metrics, tuner.config
    assert ("dmd_loss" in metrics) == (config.dmd_weight > 0)
    assert ("hinge_loss" in metrics) == (config.backprop_weight > 0)
    assert ("kl" in metrics) == (config.kl_weight > 0)
    assert metrics.get("drift", 0) < 1e-4
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert metrics["generator_grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_gradient_does_not_grow_on_its_way_back() -> None:
    """Each sample by itself: one that grows is cut to its norm at x0, its direction kept; one that shrinks is not."""
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors, seen = torch.tensor([100.0, 0.5, 0.0]).view(3, 1, 1, 1), []
    middle = 1.0 * x
    middle.register_hook(seen.append)
    x0 = factors * middle + 0 * middle
    bound_gradients(x0, [middle])
    (x0 * torch.arange(12.0).view(3, 1, 2, 2)).sum().backward()
    pull = torch.arange(12.0).view(3, 1, 2, 2)
    assert torch.equal(seen[0], factors * pull)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.cat([pull[:1], 0.5 * pull[1:2], torch.zeros(1, 1, 2, 2)]))


@pytest.mark.parametrize(("images", "backprop"), [(None, 0.7), (2, 0.7), (None, 0.0)])
def test_matching_as_in_distill(images: int | None, backprop: float) -> None:
    """Stage 1's generator turn on fresh rollouts of the epoch's prompts, beside the reward's own term."""
    values: dict[str, Any] = {"policy_weight": 0.0, "grad_clip": 1e6, "matching": "distill"}
    other, weight = stir(make_tuner(**values | {"dmd_weight": 0.0, "backprop_weight": 0.7})), 0.5
    rollouts, _, advantages = epoch_of(other)
    if backprop:
        update_generator(other, 1, rollouts, advantages)
    expected = gradients(other)
    other = stir(make_tuner(**values | {"dmd_weight": weight}))
    other.core.generator_optimizer.zero_grad()
    prompts = rollouts.prompts_of(range(len(rollouts.prompts)) if images is None else [0, 2])
    add_matching_gradients(other.core, tune_reward.GENERATOR, 1, prompts)
    for name, part in gradients(other).items():
        expected[name] = expected[name] + weight * part / (len(rollouts.steps) + 1)

    values |= {"dmd_weight": weight, "backprop_weight": backprop, "matching_images": images}
    tuner = stir(make_tuner(**values))
    tuner.core.metrics = {}
    update_generator(tuner, 1, rollouts, advantages)
    assert_close(gradients(tuner), expected)
    assert tuner.core.metrics["dmd_loss"] == pytest.approx(float(other.core.pending["dmd_loss"]), rel=1e-4)


def matching_gradient(own: int | None, of_stage_1: int) -> dict[str, Tensor]:
    """Of the generator's turn by matching alone, at every boundary."""
    values: dict[str, Any] = OFF | {"dmd_weight": 1.0, "matching": "distill", "grad_clip": 1e6}
    tuner, chosen = stir(make_tuner(**values)), tune_preset(**values, matching_backprop_steps=own)
    joined = {"boundaries": "every", "boundaries_batched": True, "backprop_steps": of_stage_1}
    chosen = chosen.model_copy(update={"distill": chosen.distill.model_copy(update=joined)})
    tuner.core.config = stage_1_settings(chosen)
    rollouts, _, advantages = epoch_of(tuner)
    update_generator(tuner, 1, rollouts, advantages)
    return gradients(tuner)


def test_how_far_back_matching_reaches_is_stage_2s_own_choice() -> None:
    alone, joined = matching_gradient(None, 1), matching_gradient(None, 4)
    assert_close(matching_gradient(1, 4), alone)
    assert_close(matching_gradient(4, 1), joined)
    norm = sum(float(g.square().sum()) for g in alone.values())
    assert sum(float((alone[name] - joined[name]).square().sum()) for name in alone) > 0.01 * norm > 0


def test_the_fake_score_of_matching_as_in_distill() -> None:
    """Stage 1's fake-score turn on fresh rollouts, at the rate of stage 2."""
    values: dict[str, Any] = {"matching": "distill", "matching_images": 2, "grad_clip": 1e6}
    other, tuner = (stir(make_tuner(**values)) for _ in range(2))
    rollouts, _, advantages = epoch_of(tuner)
    other.core.fake_optimizer.zero_grad()
    add_fake_gradients(other.core, FAKE, 1, rollouts.prompts_of([0, 2]))
    tuner.core.metrics, before = {}, tuner.core.roles.state("fake")
    update_fake_score(tuner, 1, rollouts, advantages)
    assert_close(gradients(tuner, "fake"), gradients(other, "fake"))
    assert tuner.core.metrics["consistency_loss"] == pytest.approx(
        float(other.core.pending["consistency_loss"])
    )
    moved = [(v - before[name]).abs().max() for name, v in tuner.core.roles.state("fake").items()]
    assert 0 < max(moved) < 0.011  # AdamW's first step is no longer than the rate of 0.01


def test_an_inactive_hinge_has_no_gradient() -> None:
    tuner = stir(make_tuner(backprop_margin=-1e4, **(OFF | {"backprop_weight": 1.0, "backprop_steps": 3})))
    rollouts, _, advantages = epoch_of(tuner)
    update_generator(tuner, 1, rollouts, advantages)
    assert not any(g.any() for g in gradients(tuner).values())
    assert tuner.core.metrics["hinge_active"] == 0


@pytest.mark.parametrize("matching", [0.0, 0.5])
def test_rewards_without_a_gradient_leave_the_other_terms(matching: float) -> None:
    found = []
    for weight in (0.0, 1.0):
        tuner = stir(make_tuner(rewards=("rule",), dmd_weight=matching, backprop_weight=weight))
        rollouts, _, advantages = epoch_of(tuner)
        update_generator(tuner, 1, rollouts, advantages)
        assert "hinge_loss" not in tuner.core.metrics
        found.append(gradients(tuner))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(g.any() for g in found[0].values())


def test_equal_rewards_in_every_group_move_nothing() -> None:
    tuner = stir(make_tuner(rewards=("prompt",), **(OFF | {"policy_weight": 1.0})))
    tune(tuner, 0)
    assert not any(g.any() for g in gradients(tuner).values())
    other = stir(make_tuner(rewards=("rule",), **(OFF | {"policy_weight": 1.0})))
    tune(other, 0)
    assert any(g.any() for g in gradients(other).values())


@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(steps: int) -> None:
    found = []
    for on in (False, True):
        hardware = {"gradient_checkpointing": on}
        tuner = stir(make_tuner(hardware=hardware, kl_weight=1.0, backprop_steps=steps, backprop_weight=0.5))
        assert tuner.core.backbone.transformer.is_gradient_checkpointing is on
        rollouts, _, advantages = epoch_of(tuner)
        update_generator(tuner, 1, rollouts, advantages)
        update_fake_score(tuner, 1, rollouts, advantages)
        found.append(gradients(tuner) | {f"fake/{n}": g for n, g in gradients(tuner, "fake").items()})
    assert_close(found[1], found[0], rtol=1e-5)


def test_the_kl_is_zero_at_the_start_and_pulls_back() -> None:
    tuner = make_tuner(kl_weight=1.0, **(OFF | {"policy_weight": 1.0}))
    rollouts, _, advantages = epoch_of(tuner)
    nothing, kl = torch.zeros(4), []
    for epoch, a in enumerate([advantages, nothing, nothing]):
        tuner.core.metrics = {}
        tuner.core.generator_optimizer.state.clear()  # no momentum: each step has its own direction
        update_generator(tuner, epoch, rollouts, a)
        kl.append(tuner.core.metrics["kl"])
    assert kl[0] == 0 and kl[1] > 1e-6
    assert kl[2] < 0.8 * kl[1]


# --- the fake score's turn


def test_the_fake_score_is_fitted_to_the_rollouts_clean_ends() -> None:
    tuner = stir(make_tuner())
    rollouts, cond, advantages = epoch_of(tuner)
    draws, core = Draws(tuner.core, "tune/fake", 1, range(4)), tuner.core
    x0, noise = rollouts.x[:, -1].double(), draws.normal("3/renoise").double()
    with torch.no_grad():
        t = (0.01 + 0.99 * draws.uniform("3/time").double()).clamp(0.02, 0.98).view(-1, 1, 1, 1)
        x_t = (1 - t) * x0 + t * noise
        v = evaluate(core, "fake", x_t, t, cond).double()
        loss = ((1 / t**2).clamp(0, 10) * (t * v - t * (noise - x0)) ** 2).mean()
        later = (t - draws.integers("3/consistency step", 1, 201).view(-1, 1, 1, 1) / 1000).clamp(min=0)
        gaps = []
        for pick in (1, 2):
            x = carry(x_t, v, t, later, draws.normal(f"3/consistency {pick}").double())
            gaps.append(x - later * evaluate(core, "fake", x, later, cond) - (x_t - t * v))
    core.metrics = {}
    before = weights(tuner)
    update_fake_score(tuner, 1, rollouts, advantages)
    assert core.metrics["fake_loss"] == pytest.approx(float(loss), rel=1e-4)
    expected = float((gaps[0] * gaps[1]).mean())
    assert core.metrics["consistency_loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    moved = {name.partition("/")[0] for name, v in weights(tuner).items() if not torch.equal(v, before[name])}
    assert moved == {"fake"}


# --- an epoch


def test_turns_average_and_what_stays() -> None:
    """Once each, fake score first; the average counts optimiser steps; base and stage 1's adapters stay."""
    tuner = make_tuner(micro_batch=1, ema_decay=0.75, lr_warmup=2)
    core, order = tuner.core, list[str]()
    core.fake_optimizer.register_step_pre_hook(lambda *_: order.append("fake"))
    core.generator_optimizer.register_step_pre_hook(lambda *_: order.append("generator"))
    average = core.roles.state("generator")
    base = {k: v.clone() for k, v in core.backbone.transformer.state_dict().items() if "lora" not in k}
    frozen = {adapter: core.roles.state(adapter) for adapter in FROZEN}
    for epoch in range(2):
        tune(tuner, epoch)
        raw = core.roles.state("generator")
        average = {name: 0.75 * average[name] + 0.25 * raw[name] for name in raw}
        for optimizer in (core.fake_optimizer, core.generator_optimizer):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005 * (epoch + 1))
    assert order == ["fake", "generator"] * 2 and core.generator_updates == 2
    for name, tensor in average.items():
        torch.testing.assert_close(core.ema[name], tensor, rtol=1e-5, atol=1e-7)
        assert not torch.equal(core.ema[name], core.roles.state("generator")[name]) or not tensor.any()
    state = core.backbone.transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    for adapter, before in frozen.items():
        assert all(torch.equal(core.roles.state(adapter)[name], tensor) for name, tensor in before.items())
    decay = [o.param_groups[0]["weight_decay"] for o in (core.fake_optimizer, core.generator_optimizer)]
    assert decay == [0.0, 1e-4]


def test_the_generator_meets_a_fake_score_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, seen = stir(make_tuner()), list[bool]()
    start = tuner.core.roles.state("fake")

    def spy(tuner: Tuner, epoch: int, rollouts: Rollouts, advantages: Tensor) -> None:
        seen.append(any(not torch.equal(v, start[k]) for k, v in tuner.core.roles.state("fake").items()))

    monkeypatch.setattr(tune_reward, "update_generator", spy)
    tune(tuner, 0)
    assert seen == [True]


def test_advantages_and_figures_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 5 written out: undivided rewards, against their group, over the epoch's std, weighted, whitened."""
    tuner, seen = stir(make_tuner(rewards=("one", "two=0.5", "rule=2"))), list[Tensor]()
    rollouts = roll_out(tuner, 0)
    monkeypatch.setattr(tune_reward, "update_generator", lambda t, e, r, a: seen.append(a))
    monkeypatch.setattr(tune_reward, "update_fake_score", lambda t, e, r, a: None)
    tune(tuner, 0)
    with torch.no_grad():
        images = tuner.core.backbone.decode(rollouts.x[:, -1])
    total = torch.zeros(4, dtype=torch.float64)
    texts = [PROMPT_SET.texts[i] for i in rollouts.prompts]
    for name, weight in (("one", 1.0), ("two", 0.5), ("rule", 2.0)):
        r = REWARDS[name][0].score(images, texts, [{}] * 4).double()
        group = r.view(2, 2).mean(dim=1).repeat_interleave(2)
        total += weight * (r - group) / (r.std(correction=0) + 1e-4)
        assert tuner.core.metrics[f"reward/{name}"] == pytest.approx(float(r.mean()), abs=1e-4)
    expected = ((total - total.mean()) / (total.std(correction=0) + 1e-4)).clamp(-5, 5).float()
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tilt", [0.0, 1.0])
@pytest.mark.parametrize("matching", ["last", "distill"])
def test_one_times_eight_is_eight_times_one(matching: str, tilt: float) -> None:
    results = []
    for size in (8, 1):
        values = {"dmd_weight": 0.5, "backprop_weight": 0.5, "kl_weight": 1.0, "grad_clip": 1e6}
        values |= {"matching": matching, "tilt": tilt}
        tuner = stir(make_tuner(images_per_epoch=8, images_per_prompt=4, micro_batch=size, **values))
        tune(tuner, 0)
        results.append((tuner.core.metrics, gradients(tuner), gradients(tuner, "fake"), weights(tuner)))
    whole, small = results
    drift = {"drift"}
    assert small[0].keys() == whole[0].keys()
    for name in whole[0].keys() - drift:
        assert small[0][name] == pytest.approx(whole[0][name], rel=2e-3, abs=1e-5), name
    assert small[0]["drift"] < 1e-5
    assert_close(small[1], whole[1], rtol=5e-3)
    assert_close(small[2], whole[2], rtol=5e-3)
    for name, tensor in whole[3].items():
        torch.testing.assert_close(small[3][name], tensor, rtol=0, atol=1e-4)


def test_a_reward_that_is_not_finite_stops_before_anything_moves() -> None:
    tuner = make_tuner(rewards=("one", "broken"))
    before = weights(tuner)
    with pytest.raises(RewardFailure, match=r"4 of 4 pictures got no reward in epoch 5.*the reward broken"):
        tune(tuner, 4)
    assert all(torch.equal(v, before[name]) for name, v in weights(tuner).items())
    assert not tuner.core.fake_optimizer.state and not tuner.core.generator_optimizer.state
    assert tuner.core.generator_updates == 0


def test_a_loss_that_is_not_finite_leaves_the_generator() -> None:
    tuner = stir(make_tuner())
    tuner.core.empty.embeds[0, 0, 0] = math.nan  # reaches nothing but the teacher's guidance
    generator, ema = tuner.core.roles.state("generator"), dict(tuner.core.ema)
    with pytest.raises(NumericalError, match="The loss of the last step is nan at iteration 1"):
        tune(tuner, 0)
    assert all(torch.equal(v, generator[name]) for name, v in tuner.core.roles.state("generator").items())
    assert all(torch.equal(v, ema[name]) for name, v in tuner.core.ema.items())


def test_a_sampler_of_one_step_has_no_policy_term() -> None:
    tuner = make_tuner(sampler={"raw_steps": (1000,)}, policy_weight=0.0)
    before = weights(tuner)
    tune(tuner, 0)
    assert any(not torch.equal(v, before[name]) for name, v in weights(tuner).items())
    assert "dmd_loss" in tuner.core.metrics and "drift" not in tuner.core.metrics


def test_rewards_that_are_not_kept_are_loaded_once_a_turn() -> None:
    for where, expected in (("one", ["one", "two", "one", "two"]), ("all", ["one", "two"])):
        tuner = make_tuner(rewards_in_memory=where, micro_batch=1)
        loads.clear()
        tune(tuner, 0)
        assert loads == expected
