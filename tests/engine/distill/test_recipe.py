"""Stage 1's recipe on a tiny model, against method section 3 written out once more.

PYTHONPATH=. python -m tests.engine.distill.test_recipe      writes the reference losses anew
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.distill import recipe as distill
from rtdmd_cli.engine.distill.recipe import chosen_prompts, iterate
from rtdmd_cli.engine.distill.run import build_trainer
from rtdmd_cli.engine.training import matching
from rtdmd_cli.engine.training.matching import Boundary, boundaries_in_use, rollout
from rtdmd_cli.engine.training.trainer import Draws, Trainer
from rtdmd_cli.errors import NumericalError
from tests.tiny_models import PROMPTS, load_sd3, sd3_config

REFERENCE = Path(__file__).parents[2] / "data" / "distill_losses.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "own": {"boundaries": "every", "consistency_batched": True, "normaliser": "noise-free"},
}
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # of the published schedule at shift 3
ROLES = ("generator", "fake")


def make(**values: Any) -> Trainer:
    """A trainer on the tiny model. AdamW's epsilon is so large that rounding does not decide a direction."""
    config: dict[str, Any] = {
        "batch": 2,
        "fake_per_generator": 2,
        "generator_lr": 0.01,
        "fake_lr": 0.01,
        "eps": 1e-3,
        "lora": LoraConfig(rank=2, alpha=4),
        "seed": 3,
    }
    preset = Preset(name="tiny", model=sd3_config(), distill=DistillConfig(**(config | values)))
    backbone = load_sd3()
    cond = backbone.encode(PROMPTS)
    return build_trainer(backbone, preset, len(PROMPTS), cond.select, backbone.encode([""]))


def stir(trainer: Trainer, std: float = 0.2) -> Trainer:
    """Move both adapters away from the teacher: with B = 0 all three roles are the same."""
    source = torch.Generator().manual_seed(9)
    for role in ROLES:
        state = trainer.roles.state(role)
        trainer.roles.load(
            role, {k: v + std * torch.randn(v.shape, generator=source) for k, v in state.items()}
        )
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {f"{role}/{name}": v for role in ROLES for name, v in trainer.roles.state(role).items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The roles with a weight that has changed; nan counts as a value."""
    changed = [
        name for name, v in before.items() if not torch.equal(v.nan_to_num(7), after[name].nan_to_num(7))
    ]
    return {name.partition("/")[0] for name in changed}


def gradients(trainer: Trainer, role: str) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.roles.named_parameters(role) if p.grad is not None}


def conditioning(trainer: Trainer, iteration: int) -> tuple[Tensor, Conditioning]:
    prompts = chosen_prompts(trainer, iteration)
    return torch.tensor(prompts), trainer.conditioning(prompts)


@pytest.mark.parametrize(("prompts", "batch"), [(7, 3), (7, 7), (5, 12), (1, 4)])
def test_prompts_come_in_epochs_without_replacement(prompts: int, batch: int) -> None:
    """Every prompt once before any a second time, whatever the batch; another order in each epoch."""
    trainer = make(batch=batch)
    trainer.prompts = prompts
    drawn = [prompt for iteration in range(6 * prompts) for prompt in chosen_prompts(trainer, iteration)]
    epochs = [drawn[start : start + prompts] for start in range(0, len(drawn), prompts)]
    assert all(sorted(epoch) == list(range(prompts)) for epoch in epochs[:6])
    assert prompts == 1 or epochs[0] != epochs[1]
    assert chosen_prompts(trainer, 3) == drawn[3 * batch : 4 * batch]


def evaluate(trainer: Trainer, role: str, x: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
    with trainer.roles.role(role):
        return trainer.backbone.velocity(x.float(), level.float().flatten(), cond)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


# Method section 3, written out: float64 outside the network, none of the product's formulas.


def carry(x: Tensor, v: Tensor, t: Tensor | float, to: Tensor | float, noise: Tensor) -> Tensor:
    """A CPS transition at eta 0.9."""
    angle = 0.9 * math.pi / 2
    x0, eps = x - t * v, x + (1 - t) * v
    return (1 - to) * x0 + to * math.cos(angle) * eps + to * math.sin(angle) * noise


def walk(trainer: Trainer, draws: Draws, cond: Conditioning) -> list[tuple[Tensor, Tensor]]:
    """(x before, x after) of the four transitions from pure noise, raw generator weights."""
    x, pairs = draws.normal("initial").double(), []
    for number, (sigma, s) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
        v = evaluate(trainer, "generator", x, torch.full((len(x),), sigma), cond)
        noise = draws.normal(f"{number}/step") if s > 0 else torch.zeros_like(x)
        pairs.append((x, carry(x, v.double(), sigma, s, noise.double()).detach()))
        x = pairs[-1][1]
    return pairs


def landing(trainer: Trainer, number: int, before: Tensor, x_s: Tensor, cond: Conditioning) -> Tensor:
    """What is diffused: x_s, or with the full interval the clean prediction behind it."""
    if trainer.config.interval == "sub":
        return x_s
    sigma = SIGMAS[number]
    with torch.no_grad():
        v = evaluate(trainer, "generator", before, torch.full((2,), sigma), cond)
    return before - sigma * v.double()


def diffuse(draws: Draws, number: int, x_s: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t [B,1,1,1], x_t, the standard deviation, and the velocity at which x_t passes."""
    noise = draws.normal(f"{number}/renoise").double()
    low = s + 0.01
    t = (low + (1 - low) * draws.uniform(f"{number}/time").double()).clamp(0.02, 0.98).view(-1, 1, 1, 1)
    a = (1 - t) / (1 - s)
    sd = (t**2 - a**2 * s**2).sqrt()
    u = -x_s / (1 - s) + (t + (1 - t) * s**2 / (1 - s) ** 2) / sd * noise
    return t, a * x_s + sd * noise, sd, u


@pytest.mark.parametrize(
    ("weight", "interval", "batched"),
    [("published", "sub", False), ("balanced", "sub", True), ("balanced", "full", False)],
)
def test_the_fake_score_losses_are_those_of_the_method(weight: str, interval: str, batched: bool) -> None:
    settings = {"boundary_weight": weight, "interval": interval, "boundaries_batched": batched}
    trainer = stir(make(boundaries="every", **settings))
    prompts, cond = conditioning(trainer, 0)
    draws = Draws(trainer, "fake", 0, range(2))
    losses, consistencies = [], []
    with torch.no_grad():
        for number, (before, x_s) in enumerate(walk(trainer, draws, cond)):
            s = SIGMAS[number + 1] if interval == "sub" else 0.0
            t, x_t, sd, u = diffuse(draws, number, landing(trainer, number, before, x_s, cond), s)
            v = evaluate(trainer, "fake", x_t, t, cond).double()
            even = (1 - s) ** 2 if weight == "balanced" else 1
            losses.append(even * ((1 / sd**2).clamp(0, 10) * (sd * v - sd * u) ** 2).mean())
            k = draws.integers(f"{number}/consistency step", 1, 201).view(-1, 1, 1, 1)
            later = (t - k / 1000).clamp(min=0)
            h = x_t - t * v
            gaps = []
            for pick in (1, 2):
                x = carry(x_t, v, t, later, draws.normal(f"{number}/consistency {pick}").double())
                gaps.append(x - later * evaluate(trainer, "fake", x, later, cond) - h)
            consistencies.append((gaps[0] * gaps[1]).mean())
    distill.update_fake_score(trainer, 0, prompts)
    assert trainer.metrics["fake_loss"] == pytest.approx(float(sum(losses)) / 4, rel=1e-4)
    assert trainer.metrics["consistency_loss"] == pytest.approx(
        float(sum(consistencies)) / 4, rel=1e-3, abs=1e-5
    )


@torch.no_grad()
def matching_direction(
    trainer: Trainer, draws: Draws, number: int, x_s: Tensor, s: float, cond: Conditioning
) -> Tensor:
    """g of the generator loss, at a boundary."""
    t, x_t, _, _ = diffuse(draws, number, x_s, s)
    base = evaluate(trainer, "teacher", x_t, t, trainer.empty.select([0, 0]))
    v_teacher = base + 4.0 * (evaluate(trainer, "teacher", x_t, t, cond) - base)
    noise = draws.normal(f"{number}/carry back").double()
    y_teacher = carry(x_t, v_teacher, t, s, noise)
    y_fake = carry(x_t, evaluate(trainer, "fake", x_t, t, cond), t, s, noise)
    return (y_fake - y_teacher) / (x_s - y_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize(("interval", "batched"), [("sub", False), ("sub", True), ("full", False)])
def test_the_generator_gradient_is_that_of_the_method_through_the_last_step_alone(
    interval: str, batched: bool
) -> None:
    trainer = stir(make(boundaries="every", grad_clip=1e6, interval=interval, boundaries_batched=batched))
    prompts, cond = conditioning(trainer, 1)
    draws = Draws(trainer, "generator", 1, range(2))
    names, parameters = zip(*trainer.roles.named_parameters("generator"), strict=True)
    total, loss = [torch.zeros_like(p) for p in parameters], 0.0
    for number, (before, x_s) in enumerate(walk(trainer, draws, cond)):
        sigma, s = SIGMAS[number], SIGMAS[number + 1] if interval == "sub" else 0.0
        x_s = landing(trainer, number, before, x_s, cond)
        g = matching_direction(trainer, draws, number, x_s, s, cond)
        loss += float((g**2).mean()) / 2 / 4
        with trainer.roles.role("generator", train=True):
            v = trainer.backbone.velocity(before.float(), torch.full((2,), sigma), cond).double()
            pull = (carry(before, v, sigma, s, torch.zeros_like(g)) * g / g.numel()).sum() / 4
            parts = torch.autograd.grad(pull, parameters)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    distill.update_generator(trainer, 1, prompts)
    found = gradients(trainer, "generator")
    assert trainer.metrics["dmd_loss"] == pytest.approx(loss, rel=1e-4)
    for name, gradient in zip(names, total, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()))
    without = {name.rpartition(".lora")[0] for name, g in zip(names, total, strict=True) if not g.any()}
    assert without == {"transformer_blocks.2.attn.add_q_proj"}  # the last block's text is used no more


@pytest.mark.parametrize("steps", [2, 4])
def test_the_generator_gradient_through_several_steps(steps: int) -> None:
    """Step by step backwards, what comes from later steps being held to its size at the last boundary."""
    trainer = stir(
        make(boundaries="every", grad_clip=1e6, boundaries_batched=True, backprop_steps=steps), std=1.0
    )
    prompts, cond = conditioning(trainer, 1)
    draws = Draws(trainer, "generator", 1, range(2))
    names, parameters = zip(*trainer.roles.named_parameters("generator"), strict=True)
    total, held = [torch.zeros_like(p) for p in parameters], False
    landed = list(walk(trainer, draws, cond))
    size = later = torch.zeros(())
    for number in reversed(range(4)):
        (before, x_s), sigma, s = landed[number], SIGMAS[number], SIGMAS[number + 1]
        own = matching_direction(trainer, draws, number, x_s, s, cond) / x_s.numel() / 4
        if number == 3:
            size = own.flatten(1).norm(dim=1)
        arriving = own + later
        with trainer.roles.role("generator", train=True):
            x = before.float().requires_grad_()
            v = trainer.backbone.velocity(x, torch.full((2,), sigma), cond).double()
            pull = (carry(x.double(), v, sigma, s, torch.zeros_like(arriving)) * arriving).sum()
            parts = torch.autograd.grad(pull, (x, *parameters))
        total = [a + b for a, b in zip(total, parts[1:], strict=True)]
        later = torch.zeros(())
        if number > 4 - steps:
            grown = parts[0].double().flatten(1).norm(dim=1) / size
            held = held or bool((grown > 1).any())
            later = parts[0].double() / grown.clamp(min=1).view(-1, 1, 1, 1)
    assert held  # or the bound is not tested
    distill.update_generator(trainer, 1, prompts)
    found = gradients(trainer, "generator")
    for name, gradient in zip(names, total, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()))


def test_one_boundary_with_gradient_through_earlier_steps() -> None:
    """Only the latents of the last steps carry a gradient, though none of them is a boundary in use."""
    trainer = stir(make(boundaries="one", backprop_steps=2))
    original, seen = trainer.backbone.velocity, []

    def spy(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        seen.append(x.requires_grad)
        return original(x, sigma, cond)

    trainer.backbone.velocity = spy  # type: ignore[method-assign]
    counts = set()
    for iteration in range(8):
        seen.clear()
        draws = Draws(trainer, "generator", iteration, range(2))
        with trainer.roles.role("generator", train=True):
            list(rollout(trainer, draws, conditioning(trainer, iteration)[1]))
        counts.add(len(seen))
        assert seen == [False] * (len(seen) - 1) + [len(seen) > 1]
    assert len(counts) > 1


@pytest.mark.parametrize("boundaries", ["one", "every"])
def test_evaluations_of_a_rollout(boundaries: str) -> None:
    """No evaluation starts from a latent with a graph; only those that land on a used boundary keep one."""
    trainer = stir(make(boundaries=boundaries))
    seen: list[tuple[bool, bool]] = []
    original = trainer.backbone.velocity

    def spy(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        v = original(x, sigma, cond)
        seen.append((x.requires_grad, v.requires_grad))
        return v

    trainer.backbone.velocity = spy  # type: ignore[method-assign]
    for iteration in range(4):
        seen.clear()
        draws = Draws(trainer, "generator", iteration, range(2))
        with trainer.roles.role("generator", train=True):
            landed = list(rollout(trainer, draws, conditioning(trainer, iteration)[1]))
        used = [number + 1 for number, _ in landed]
        assert used == boundaries_in_use(trainer, draws)
        assert seen == [(False, step in used) for step in range(1, max(used) + 1)]
        assert [b.s for _, b in landed] == pytest.approx([SIGMAS[step] for step in used])
        assert all(b.x_s.requires_grad and not b.x0.requires_grad for _, b in landed)
        assert boundaries == "every" or len(used) == 1


def test_boundaries() -> None:
    trainer = make()

    def drawn(turn: str, iteration: int, part: range) -> list[int]:
        return boundaries_in_use(trainer, Draws(trainer, turn, iteration, part))

    draws = [drawn("fake", i, range(1)) for i in range(80)]
    assert draws == [drawn("fake", i, range(1, 2)) for i in range(80)]  # one for the whole batch
    assert draws != [drawn("generator", i, range(1)) for i in range(80)]  # a fresh rollout for each turn
    assert all(10 <= draws.count([k]) <= 30 for k in (1, 2, 3, 4)) and all(len(d) == 1 for d in draws)
    trainer.config = trainer.config.model_copy(update={"boundaries": "every"})
    assert drawn("fake", 0, range(1)) == [1, 2, 3, 4]


def test_training_leaves_the_teacher_alone() -> None:
    trainer = make(fake_per_generator=1)
    x, level = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.9])
    cond = conditioning(trainer, 0)[1]
    base = {k: v.clone() for k, v in trainer.backbone.transformer.state_dict().items() if "lora" not in k}

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [evaluate(trainer, role, x, level, cond) for role in ("teacher", "fake", "generator")]

    before = outputs()
    for iteration in range(2):
        iterate(trainer, iteration)
    after = outputs()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])
    state = trainer.backbone.transformer.state_dict()
    assert_same({k: state[k] for k in base}, base)
    assert all(p.grad is None for n, p in trainer.backbone.transformer.named_parameters() if "lora" not in n)


def test_the_two_consistency_evaluations_may_share_a_batch() -> None:
    found = []
    for batched in (False, True):
        trainer = stir(make(consistency_batched=batched, consistency_weight=10.0, grad_clip=1e6))
        distill.update_fake_score(trainer, 0, conditioning(trainer, 0)[0])
        found.append((trainer.metrics, gradients(trainer, "fake")))
    (metrics, apart), (metrics_batched, together) = found
    assert metrics_batched == pytest.approx(metrics, rel=1e-4)
    for name, gradient in apart.items():
        torch.testing.assert_close(
            together[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
        )
    plain = stir(make(consistency_weight=0.0, grad_clip=1e6))
    distill.update_fake_score(plain, 0, conditioning(plain, 0)[0])
    assert "consistency_loss" not in plain.metrics
    assert plain.metrics["fake_grad_norm"] != pytest.approx(metrics["fake_grad_norm"], rel=1e-3)


def test_the_normalisers_agree_at_zero_noise_alone() -> None:
    trainer = stir(make(boundaries="every"))
    cond = conditioning(trainer, 0)[1]
    draws = Draws(trainer, "generator", 0, range(2))
    losses: dict[str, list[float]] = {}
    for normaliser in ("published", "noise-free"):
        trainer.config = trainer.config.model_copy(update={"normaliser": normaliser})
        with torch.no_grad(), trainer.roles.role("generator"):
            losses[normaliser] = [
                float(matching.matching_loss(trainer, draws, [(number, boundary)], cond, 1.0))
                for number, boundary in rollout(trainer, draws, cond)
            ]
    assert losses["noise-free"][3] == losses["published"][3]
    for number in range(3):  # without the noise the normaliser is smaller
        assert losses["noise-free"][number] > 1.05 * losses["published"][number]


def test_micro_batches_make_the_same_adapters() -> None:
    results = []
    for size in (8, 1):
        trainer = stir(make(batch=8, micro_batch=size, fake_per_generator=1))
        start = weights(trainer)
        for iteration in range(2):
            iterate(trainer, iteration)
        results.append((trainer.metrics, weights(trainer), trainer.ema))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, rtol=0, atol=1e-5)
    for role in ROLES:
        changes = [(v - start[k]).abs().max() for k, v in results[0][1].items() if k.startswith(role)]
        assert max(changes) > 3e-3
    for name, tensor in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], tensor, rtol=0, atol=1e-5)


def test_turns_and_average() -> None:
    """Fake score every iteration, generator every third after it; the average counts generator steps."""
    trainer = make(fake_per_generator=3, ema_decay=0.75)
    order: list[str] = []
    trainer.fake_optimizer.register_step_pre_hook(lambda *_: order.append("fake"))
    trainer.generator_optimizer.register_step_pre_hook(lambda *_: order.append("generator"))
    average = trainer.roles.state("generator")
    for iteration in range(6):
        before = weights(trainer)
        iterate(trainer, iteration)
        assert moved(before, weights(trainer)) == ({"fake", "generator"} if iteration in (2, 5) else {"fake"})
        assert ("dmd_loss" in trainer.metrics) == (iteration in (2, 5))
        if iteration in (2, 5):
            raw = trainer.roles.state("generator")
            average = {name: 0.75 * average[name] + 0.25 * raw[name] for name in raw}
    assert order == ["fake", "fake", "fake", "generator"] * 2
    assert trainer.generator_updates == 2
    for name, tensor in average.items():
        torch.testing.assert_close(trainer.ema[name], tensor, rtol=1e-5, atol=1e-7)


def test_both_turns_use_the_same_prompts() -> None:
    trainer = make(fake_per_generator=1)
    asked: list[list[int]] = []
    original = trainer.conditioning

    def spy(indices: Sequence[int]) -> Conditioning:
        asked.append(list(indices))
        return original(indices)

    trainer.conditioning = spy
    for iteration in range(3):
        iterate(trainer, iteration)
    assert asked[0::2] == asked[1::2] and len({tuple(a) for a in asked}) > 1


def stopped(trainer: Trainer, message: str, unmoved: tuple[str, ...] = ROLES) -> None:
    """Iteration 5 stops with that message, before a weight, an optimiser or the average has changed."""
    before, ema = weights(trainer), {name: v.clone() for name, v in trainer.ema.items()}
    with pytest.raises(NumericalError) as caught:
        iterate(trainer, 4)
    assert caught.value.message == message and "checkpoint is untouched" in caught.value.hint
    assert moved(before, weights(trainer)) == set(ROLES) - set(unmoved)
    assert trainer.generator_updates == 0
    assert_same(trainer.ema, ema)
    states = {"fake": trainer.fake_optimizer.state, "generator": trainer.generator_optimizer.state}
    assert all(not states[role] for role in unmoved)


def test_a_loss_that_is_not_finite() -> None:
    trainer = stir(make(fake_per_generator=1))
    original = trainer.backbone.velocity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.backbone, "velocity", lambda *inputs: original(*inputs) * math.nan)
        stopped(trainer, "The fake-score loss is nan at iteration 5.")
    trainer.empty = trainer.empty.to(dtype=torch.float32)
    trainer.empty.embeds[0, 0, 0] = math.nan  # reaches nothing but the teacher's guidance
    stopped(trainer, "The generator loss is nan at iteration 5.", unmoved=("generator",))


@pytest.mark.parametrize(
    ("role", "value", "kind"), [("fake", math.nan, "nan"), ("generator", math.inf, "infinite")]
)
def test_a_gradient_that_is_not_finite(role: str, value: float, kind: str) -> None:
    trainer = stir(make(fake_per_generator=1))
    name, parameter = trainer.roles.named_parameters(role)[5]
    with trainer.roles.role(role, train=True):
        parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    unmoved = ("generator",) if role == "generator" else ROLES  # the fake score's turn is over by then
    stopped(trainer, f"The gradient of {role}/{name} holds {kind} values at iteration 5.", unmoved)


@pytest.mark.parametrize(
    ("role", "value", "kind"), [("fake", math.nan, "nan"), ("generator", -math.inf, "infinite")]
)
def test_a_weight_that_is_not_finite(role: str, value: float, kind: str) -> None:
    trainer = stir(make(fake_per_generator=1))
    name, parameter = trainer.roles.named_parameters(role)[5]
    with torch.no_grad():
        parameter[0, 0] = value
    stopped(trainer, f"The weight {role}/{name} holds {kind} values at iteration 5.")


def losses(variant: str) -> list[dict[str, float]]:
    """The figures of four iterations."""
    trainer, rows = make(**VARIANTS[variant]), []
    for iteration in range(4):
        iterate(trainer, iteration)
        rows.append(dict(sorted(trainer.metrics.items())))
    return rows


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_are_those_on_record(variant: str) -> None:
    """A change of structure must not change them. A change of the method does, and writes them anew."""
    recorded = json.loads(REFERENCE.read_text(encoding="utf-8"))[variant]
    found = losses(variant)
    assert [row.keys() for row in found] == [row.keys() for row in recorded]
    for row, expected in zip(found, recorded, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_random_numbers_of_a_sample_are_its_own() -> None:
    """Different for every sample, stream, turn and iteration, and the same in any micro-batch."""
    trainer = make(batch=4)
    whole = Draws(trainer, "fake", 0, range(4)).normal("initial")
    assert torch.equal(whole[2:], Draws(trainer, "fake", 0, range(2, 4)).normal("initial"))
    others = [
        Draws(trainer, "generator", 0, range(4)).normal("initial"),
        Draws(trainer, "fake", 1, range(4)).normal("initial"),
        Draws(trainer, "fake", 0, range(4)).normal("0/step"),
        Draws(trainer, "fake", 0, range(4, 8)).normal("initial"),
    ]
    rows = torch.cat([whole, *others]).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.3
    many, zeros = Draws(trainer, "fake", 0, range(64)), torch.zeros(64, *trainer.shape)
    _, times, _ = matching.noise_up(trainer, many, (0, Boundary(0.5, zeros, zeros)))
    assert len(set(times.tolist())) > 60 and times.min() > 0.51 and times.max() <= 0.98


def test_a_boundary_holds_what_it_says() -> None:
    trainer = stir(make(boundaries="every"))
    cond = conditioning(trainer, 0)[1]
    with torch.no_grad(), trainer.roles.role("generator"):
        last: Boundary = list(rollout(trainer, Draws(trainer, "fake", 0, range(2)), cond))[-1][1]
    assert last.s == 0 and torch.equal(last.x_s, last.x0)


@pytest.mark.parametrize("whose", ["generator", "both"])
def test_rates_fall_along_a_cosine(whose: str) -> None:
    trainer = make(iterations=8, lr_decay=whose)
    rates = []
    for iteration in range(8):
        iterate(trainer, iteration)
        optimizers = (trainer.generator_optimizer, trainer.fake_optimizer)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * update / 4)) for update in range(4)]
    assert [rate for rate, _ in rates[1::2]] == pytest.approx(expected)
    falls = [0.01 * 0.5 * (1 + math.cos(math.pi * iteration / 8)) for iteration in range(8)]
    assert [rate for _, rate in rates] == pytest.approx(falls if whose == "both" else [0.01] * 8)


if __name__ == "__main__":
    figures = {variant: losses(variant) for variant in VARIANTS}
    REFERENCE.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
