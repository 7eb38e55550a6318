"""Sampling: the short samplers by themselves, the plans, and whole pictures against the stock pipeline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from rtdmd_cli.config.schema import SamplerConfig
from rtdmd_cli.config.section import ATTENTION, LoraConfig
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.backbones.sd3 import SD3Backbone
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.sampling.sample import (
    SamplingPlan,
    cps,
    decode_all,
    euler,
    generate,
    guided,
    initial_noise,
    sampling_plan,
    step_noise,
)
from rtdmd_cli.errors import UsageError
from tests.tiny_models import PROMPTS, RESOLUTION, TEXT_LENGTH, load_sd3, sd3_config, sd3_folder

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
SHAPE = (4, 8, 8)
SAMPLER = SamplerConfig(raw_steps=(1000, 750, 500, 250), eta=0.9)
KEYS = [(0, 0), (1, 0), (2, 0), (0, 1), (3, 5)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    return load_sd3()


@pytest.fixture(scope="module")
def conditionings(backbone: SD3Backbone) -> tuple[Conditioning, Conditioning]:
    return backbone.encode(PROMPTS), backbone.encode([""])


def plan(backbone: SD3Backbone, kind: Any, steps: int | None = None, guidance: float | None = None) -> Any:
    return sampling_plan(kind, backbone, sd3_config(guidance=4.0), SAMPLER, steps, guidance)


# --- the samplers


def test_euler_follows_a_straight_path_exactly() -> None:
    x0, noise = draw(2, 1, 3, 3), draw(2, 1, 3, 3, seed=1)
    seen = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return (x - x0) / sigma.view(-1, 1, 1, 1)

    torch.testing.assert_close(euler(velocity, noise, SIGMAS), x0, atol=1e-6, rtol=0)
    assert [sigma.shape for sigma in seen] == [(2,)] * 4
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.tensor(SIGMAS[:-1]))


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(x) + sigma.view(-1, 1, 1, 1) * x


def test_cps_without_stochasticity_is_euler() -> None:
    x = draw(2, 1, 3, 3)
    noises = [draw(2, 1, 3, 3, seed=i) for i in range(3)]
    torch.testing.assert_close(cps(curved, x, SIGMAS, 0.0, noises), euler(curved, x, SIGMAS))


def test_cps_with_full_stochasticity_is_the_schedulers_stochastic_sampling() -> None:
    """diffusers' own implementation of eta = 1 as the oracle."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    source = torch.Generator().manual_seed(3)
    noises = [torch.randn(2, 1, 3, 3, generator=source) for _ in range(3)]
    source.manual_seed(3)
    x = start = draw(2, 1, 3, 3)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(curved(x, sigma.expand(2)), t, x, generator=source).prev_sample
    torch.testing.assert_close(cps(curved, start, scheduler.sigmas.tolist(), 1.0, noises), x)


def test_cps_by_hand() -> None:
    """One transition from 1 to 0.5 and one to 0, written out for a velocity that is 2 everywhere."""
    x, noise, eta = draw(1, 1, 2, 2), draw(1, 1, 2, 2, seed=1), 0.9
    x0, eps = x - 2, x
    middle = 0.5 * x0 + 0.5 * (math.cos(eta * math.pi / 2) * eps + math.sin(eta * math.pi / 2) * noise)
    found = cps(lambda x, sigma: torch.full_like(x, 2.0), x, (1.0, 0.5, 0.0), eta, [noise])
    torch.testing.assert_close(found, middle - 0.5 * 2)


def test_a_rollout_can_stop_early_and_go_on() -> None:
    x, noises = draw(2, 1, 3, 3), [draw(2, 1, 3, 3, seed=i + 1) for i in range(3)]
    whole = cps(curved, x, SIGMAS, 0.9, noises)
    for k in range(1, 4):
        middle = cps(curved, x, SIGMAS[: k + 1], 0.9, noises[:k])
        assert torch.equal(cps(curved, middle, SIGMAS[k:], 0.9, noises[k:]), whole)


def test_the_gradient_reaches_the_start() -> None:
    x = draw(1, 1, 3, 3).requires_grad_()
    noises = [draw(1, 1, 3, 3, seed=i + 1) for i in range(3)]
    (gradient,) = torch.autograd.grad(cps(curved, x, SIGMAS, 0.9, noises).sum(), x)
    assert gradient.abs().min() > 0


# --- plans


def test_teacher_plans(backbone: SD3Backbone) -> None:
    full = plan(backbone, "teacher")
    assert full.sigmas == tuple(backbone.stock_sigmas(6, SHAPE).tolist()) and full.guidance == 4.0
    assert (full.steps, full.evaluations) == (6, 12)
    few = plan(backbone, "teacher", steps=4)
    assert few.sigmas == pytest.approx(SIGMAS) and few.evaluations == 8
    assert few.sigmas != pytest.approx(backbone.stock_sigmas(4, SHAPE).tolist())
    equal_cost = plan(backbone, "teacher", steps=2)
    assert (
        equal_cost.sigmas == tuple(backbone.stock_sigmas(2, SHAPE).tolist()) and equal_cost.evaluations == 4
    )
    assert plan(backbone, "teacher", steps=4, guidance=1.0).evaluations == 4


def test_generator_plans(backbone: SD3Backbone) -> None:
    own = plan(backbone, "generator")
    assert own == SamplingPlan("generator", own.sigmas, guidance=1.0, eta=0.9)
    assert own.sigmas == pytest.approx(SIGMAS) and own.evaluations == own.steps == 4
    assert plan(backbone, "generator", steps=4, guidance=1.0) == own
    raw = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    five = plan(backbone, "generator", steps=5)
    assert five.sigmas == pytest.approx([3 * u / (1 + 2 * u) for u in raw]) and five.evaluations == 5


def test_the_presets_own_schedule_is_used(backbone: SD3Backbone) -> None:
    sampler = SamplerConfig(raw_steps=(1000, 400), eta=0.5)
    config = sd3_config()
    own = sampling_plan("generator", backbone, config, sampler)
    assert own.sigmas == pytest.approx([1, 3 * 0.4 / 1.8, 0]) and own.eta == 0.5
    assert sampling_plan("teacher", backbone, config, sampler, steps=2).sigmas == own.sigmas
    assert sampling_plan("generator", backbone, config, sampler, steps=4).sigmas == pytest.approx(SIGMAS)


@pytest.mark.parametrize(
    ("kind", "steps", "guidance", "message"),
    [
        ("generator", None, 3.0, "without guidance"),
        ("teacher", 0, None, "--steps"),
        ("generator", 1001, None, "--steps"),
        ("teacher", None, 0.5, "--guidance"),
        ("teacher", None, math.nan, "--guidance"),
    ],
)
def test_impossible_plans(
    backbone: SD3Backbone, kind: str, steps: int | None, guidance: float | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(backbone, kind, steps, guidance)


# --- noise


def test_noise_depends_on_its_key_alone() -> None:
    state = torch.get_rng_state()
    rows = initial_noise(SHAPE, 5, KEYS)
    assert rows.shape == (5, *SHAPE) and rows.dtype == torch.float32
    for row, key in zip(rows, KEYS, strict=True):
        assert torch.equal(initial_noise(SHAPE, 5, [key])[0], row)
    others = [
        initial_noise(SHAPE, 6, KEYS),
        step_noise(SHAPE, 5, KEYS, 0),
        step_noise(SHAPE, 5, KEYS, 1),
    ]
    seen = torch.cat([rows, *others]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == 4 * len(KEYS)
    assert abs(float(seen.mean())) < 0.05 and abs(float(seen.std()) - 1) < 0.05
    assert torch.equal(torch.get_rng_state(), state)


# --- pictures


def test_teacher_pictures_equal_the_stock_pipeline(
    backbone: SD3Backbone, conditionings: tuple[Conditioning, Conditioning]
) -> None:
    stock: Any = StableDiffusion3Pipeline.from_pretrained(sd3_folder(), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    keys = [(i, 0) for i in range(len(PROMPTS))]
    expected = stock(
        PROMPTS,
        num_inference_steps=6,
        guidance_scale=4.0,
        latents=initial_noise(SHAPE, 11, keys),
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=TEXT_LENGTH,
        output_type="np",
    ).images
    teacher = plan(backbone, "teacher")
    latents = generate(backbone, None, teacher, *conditionings, keys, shape=SHAPE, seed=11, batch=3)
    pictures = decode_all(backbone, latents, batch=3)
    assert expected.std() > 0.05
    torch.testing.assert_close(pictures, torch.from_numpy(expected).permute(0, 3, 1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["teacher", "generator"])
def test_a_picture_depends_on_its_key_and_not_on_the_batch(
    backbone: SD3Backbone, conditionings: tuple[Conditioning, Conditioning], kind: str
) -> None:
    made = plan(backbone, kind)
    arguments: Any = {"shape": SHAPE, "seed": 1}
    told: list[int] = []
    whole = generate(backbone, None, made, *conditionings, KEYS, batch=2, on_batch=told.append, **arguments)
    assert whole.shape == (5, *SHAPE) and whole.dtype == torch.float32 and told == [2, 2, 1]
    for batch in (1, 5):
        other = generate(backbone, None, made, *conditionings, KEYS, batch=batch, **arguments)
        torch.testing.assert_close(other, whole, atol=1e-5, rtol=0)
    turned = generate(backbone, None, made, *conditionings, KEYS[::-1], batch=2, **arguments)
    torch.testing.assert_close(turned.flip(0), whole, atol=1e-5, rtol=0)
    assert (whole[0] - whole[3]).abs().max() > 0.1  # one prompt, two images
    reseeded = generate(backbone, None, made, *conditionings, KEYS, shape=SHAPE, seed=2, batch=5)
    assert (reseeded - whole).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_each_key_gets_its_own_prompt(
    backbone: SD3Backbone, conditionings: tuple[Conditioning, Conditioning]
) -> None:
    prompts, uncond = conditionings
    made = plan(backbone, "teacher")
    arguments: Any = {"shape": SHAPE, "seed": 1, "batch": 4}
    found = generate(backbone, None, made, prompts, uncond, [(2, 0)], **arguments)
    only = Conditioning(prompts.embeds.clone(), prompts.pooled.clone())
    for row in (0, 1, 3):
        only.embeds[row], only.pooled[row] = 0, 0
    assert torch.equal(generate(backbone, None, made, only, uncond, [(2, 0)], **arguments), found)
    only.embeds[2] = 0
    changed = generate(backbone, None, made, only, uncond, [(2, 0)], **arguments)
    assert (changed - found).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "guidance"), [("teacher", 4.0), ("teacher", 1.0), ("generator", None)])
def test_evaluations_are_counted_as_they_happen(
    conditionings: tuple[Conditioning, Conditioning], kind: str, guidance: float | None
) -> None:
    backbone = load_sd3()
    rows = 0
    velocity = backbone.velocity

    def counting(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        nonlocal rows
        rows += len(x)
        return velocity(x, sigma, cond)

    backbone.velocity = counting  # type: ignore[method-assign]
    made = plan(backbone, kind, guidance=guidance)
    generate(backbone, None, made, *conditionings, KEYS, shape=SHAPE, seed=0, batch=2)
    assert rows == made.evaluations * len(KEYS)


def test_guidance_that_falls_with_the_noise(
    backbone: SD3Backbone, conditionings: tuple[Conditioning, Conditioning]
) -> None:
    prompts, empty = conditionings
    cond, x, sigma = prompts.select([0, 1]), draw(2, 4, 8, 8), torch.tensor([0.3, 0.98])
    with torch.no_grad():
        falling = guided(backbone, cond, empty, (4.0, 1.5))(x, sigma)
        low, high = (guided(backbone, cond, empty, scale)(x, sigma) for scale in (4.0, 1.5))
        none = guided(backbone, cond, None, (1.0, 1.0))(x, sigma)
    torch.testing.assert_close(falling, torch.stack([low[0], high[1]]))
    assert not torch.allclose(falling, low) and torch.equal(none, backbone.velocity(x, sigma, cond))


def test_each_plan_runs_its_role(conditionings: tuple[Conditioning, Conditioning]) -> None:
    base, backbone = load_sd3(), load_sd3()
    roles = Roles(backbone.transformer, LoraConfig(rank=4, alpha=8, targets=ATTENTION), seed=0)
    arguments: Any = {"shape": SHAPE, "seed": 0, "batch": 5}
    teacher, generator = plan(base, "teacher", steps=4, guidance=1.0), plan(base, "generator")
    plain = [generate(base, None, made, *conditionings, KEYS, **arguments) for made in (teacher, generator)]
    moved = {name: tensor + 0.1 for name, tensor in roles.state("generator").items()}
    roles.load("generator", moved)
    assert torch.equal(generate(backbone, roles, teacher, *conditionings, KEYS, **arguments), plain[0])
    trained = generate(backbone, roles, generator, *conditionings, KEYS, **arguments)
    assert (trained - plain[1]).abs().max() > 1e-3
    assert not trained.requires_grad


def test_generators_need_no_empty_prompt(
    backbone: SD3Backbone, conditionings: tuple[Conditioning, Conditioning]
) -> None:
    made = plan(backbone, "generator")
    arguments: Any = {"shape": SHAPE, "seed": 0, "batch": 5}
    without = generate(backbone, None, made, conditionings[0], None, KEYS, **arguments)
    assert torch.equal(generate(backbone, None, made, *conditionings, KEYS, **arguments), without)
