"""Every family against the stock pipeline of diffusers, on the same small model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from rtdmd_cli.config.schema import HardwareConfig, SamplerConfig
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning, concatenate
from rtdmd_cli.engine.backbones.families import FAMILIES, load_backbone
from rtdmd_cli.engine.compute.mixed import MixedPrecision
from rtdmd_cli.engine.compute.quantise import QUANTISED, Quantised
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, TEACHER
from rtdmd_cli.engine.sampling.sample import euler, guided, sampling_plan
from rtdmd_cli.errors import RtdmdError, UsageError
from tests.tiny_flux import (
    FAMILIES as SMALL,
)
from tests.tiny_flux import (
    TINY,
    build_flux1_pipeline,
    load_tiny,
    save,
    tiny_config,
    tiny_folder,
)
from tests.tiny_models import PROMPTS, RESOLUTION

RAW = [1.0, 0.75, 0.5, 0.25]
SAMPLER = SamplerConfig()
SIZES = {"square": (RESOLUTION, RESOLUTION), "wide": (16, RESOLUTION)}  # height, width

Pair = tuple[str, Backbone, Any]


@pytest.fixture(scope="module", params=SMALL)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Name, our backbone, and the stock pipeline on the same folder."""
    name = request.param
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_folder(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return name, load_tiny(name), pipe


def stock_call(
    name: str, pipe: Any, x: torch.Tensor, size: tuple[int, int], guidance: float, **arguments: Any
) -> torch.Tensor:
    """Pictures (or latents) of the first prompts."""
    tiny = TINY[name]
    made: torch.Tensor = pipe(
        prompt=PROMPTS[: len(x)],
        latents=tiny.given(pipe, x),
        height=size[0],
        width=size[1],
        max_sequence_length=tiny.text_length,
        **{"output_type": "pt", **tiny.call(guidance), **arguments},
    ).images
    return made


def for_few_steps(name: str, pipe: Any) -> Any:
    """The stock pipeline as a card's code sets it up."""
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **TINY[name].few)
    return made


def noise(shape: tuple[int, ...], count: int = 2) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def test_the_table_covers_every_family() -> None:
    assert {tiny.family for tiny in TINY.values()} == set(FAMILIES)


def test_prompts_are_encoded_as_in_the_stock_pipeline(pair: Pair) -> None:
    name, backbone, pipe = pair
    with torch.no_grad():
        expected = TINY[name].encoded(pipe, PROMPTS, TINY[name].text_length)
    cond = backbone.encode(PROMPTS)
    assert len({len(embeds) for embeds, _ in expected}) == (1 if cond.lengths is None else len(PROMPTS))
    for row, (embeds, pooled) in enumerate(expected):
        assert torch.equal(rows(cond, row), embeds)
        assert (cond.pooled is None) == (pooled is None)
        assert pooled is None or torch.equal(cond.select([row]).pooled[0], pooled)  # type: ignore[index]
        again = backbone.encode([PROMPTS[row]])
        torch.testing.assert_close(rows(again, 0), embeds)
    first, second = rows(cond, 0), rows(cond, 1)
    assert not torch.allclose(first, second[: len(first)], atol=1e-3)


def rows(cond: Conditioning, index: int) -> torch.Tensor:
    """A prompt's embeddings [L, D] without padding."""
    return concatenate([cond.select([index])]).embeds[0]


def test_a_batch_equals_each_alone(pair: Pair) -> None:
    """Whatever the others' lengths are."""
    name, backbone, _ = pair
    cond, x = backbone.encode([PROMPTS[3], "", PROMPTS[1]]), noise(TINY[name].shape, 3)
    sigma = torch.tensor([0.3, 0.7, 0.95])
    with torch.no_grad():
        together = backbone.velocity(x, sigma, cond)
        for i in range(3):
            alone = backbone.velocity(x[i : i + 1], sigma[i : i + 1], concatenate([cond.select([i])]))
            torch.testing.assert_close(alone[0], together[i], atol=2e-6, rtol=1e-4)
    moved = backbone.velocity(x[:1], sigma[:1], cond.select([1]))
    assert (moved[0] - together[0]).abs().max() > 1e-3  # the prompt counts


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("steps", [None, 3], ids=["few", "stock"])
@pytest.mark.parametrize("guided_", [False, True], ids=["plain", "guided"])
def test_pictures_equal_the_stock_pipeline(
    pair: Pair, size: tuple[int, int], steps: int | None, guided_: bool
) -> None:
    name, backbone, pipe = pair
    guidance = TINY[name].guidance if guided_ else 1.0
    shape = backbone.latent_shape(*size)
    x = noise(shape)
    if steps is None:
        pipe = for_few_steps(name, pipe)
    call = {"num_inference_steps": 4, "sigmas": RAW} if steps is None else {"num_inference_steps": steps}
    expected = stock_call(name, pipe, x, size, guidance, **call)
    sigmas = backbone.sigmas(RAW, shape) if steps is None else backbone.stock_sigmas(steps, shape)
    assert torch.equal(sigmas, pipe.scheduler.sigmas) and sigmas.dtype == torch.float32
    velocity = guided(backbone, backbone.encode(PROMPTS[:2]), backbone.encode([""]), guidance)
    with torch.no_grad():
        pictures = backbone.decode(euler(velocity, x, sigmas.tolist()))
    assert pictures.shape == expected.shape == (2, 3, *size) and expected.std() > 0.02
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


def test_a_sampled_latent_equals_the_stock_pipelines(pair: Pair) -> None:
    """Before the VAE, which on random weights forgives much."""
    name, backbone, pipe = pair
    tiny, size = TINY[name], SIZES["square"]
    x = noise(tiny.shape)
    steps = {"num_inference_steps": 3}
    expected = stock_call(name, pipe, x, size, tiny.guidance, output_type="latent", **steps)
    plan = sampling_plan("teacher", backbone, tiny_config(name), SAMPLER, steps=3)
    velocity = guided(backbone, backbone.encode(PROMPTS[:2]), backbone.encode([""]), plan.guidance)
    with torch.no_grad():
        latents = euler(velocity, x, plan.sigmas)
    assert expected.std() > 0.1
    torch.testing.assert_close(tiny.returned(pipe, latents), expected, atol=1e-4, rtol=1e-4)
    assert plan.evaluations == (3 if backbone.embedded_guidance else 6)


def test_the_shift_follows_the_size(pair: Pair) -> None:
    name, backbone, _ = pair
    small, large = (backbone.sigmas(RAW, backbone.latent_shape(side, side)) for side in (16, 32))
    assert torch.equal(small, large) != TINY[name].shifts
    assert (large[1:-1] >= small[1:-1]).all()  # more tokens, more noise


def test_velocity_reads_prompt_and_noise_level_and_has_a_gradient(pair: Pair) -> None:
    name, backbone, _ = pair
    cond, x = backbone.encode(PROMPTS[:2]), noise(TINY[name].shape, 1).expand(2, -1, -1, -1)
    leaf = x.clone().requires_grad_()
    v = backbone.velocity(leaf, torch.full((2,), 0.5), cond)
    (gradient,) = torch.autograd.grad(v.square().sum(), leaf)
    assert gradient.abs().min() > 0
    with torch.no_grad():
        other = backbone.velocity(x, torch.full((2,), 0.9), cond)
    assert (v[0] - v[1]).abs().max() > 1e-3 and (v - other).abs().max() > 1e-3
    pictures = backbone.decode(leaf)
    (gradient,) = torch.autograd.grad(pictures.sum(), leaf)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_bf16_takes_and_returns_float32(pair: Pair) -> None:
    name, exact, _ = pair
    backbone = load_tiny(name, torch.bfloat16)
    cond, x, sigma = backbone.encode(PROMPTS[:2]), noise(TINY[name].shape), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        v, pictures = backbone.velocity(x, sigma, cond), backbone.decode(x)
        expected = exact.velocity(x, sigma, cond.to(dtype=torch.float32))
    assert {parameter.dtype for parameter in backbone.transformer.parameters()} == {torch.bfloat16}
    assert (cond.embeds.dtype, v.dtype, pictures.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(v, expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(pictures, exact.decode(x), atol=0.05, rtol=0)


def test_dropped_text_encoders_are_gone(pair: Pair) -> None:
    name, _, _ = pair
    backbone = load_tiny(name)
    cond, x = backbone.encode(PROMPTS[:2]), noise(TINY[name].shape)
    with torch.no_grad():
        before = backbone.velocity(x, torch.full((2,), 0.5), cond)
        backbone.drop_text_encoders()
        assert torch.equal(backbone.velocity(x, torch.full((2,), 0.5), cond), before)
    with pytest.raises(RtdmdError, match="text encoders have been freed"):
        backbone.encode(["a ring"])


def test_sizes(pair: Pair) -> None:
    name, backbone, _ = pair
    assert backbone.latent_shape(RESOLUTION, RESOLUTION) == TINY[name].shape
    for height, width in ((36, 32), (32, 12), (8192, 32), (0, 32)):
        with pytest.raises(UsageError, match=f"{width} x {height}") as caught:
            backbone.latent_shape(height, width)
        assert "multiples of 8 px" in caught.value.hint


def test_checkpointing_leaves_the_gradients_as_they_are(pair: Pair) -> None:
    """Those of the generator's adapters in every list of blocks, with other roles called before the backward pass."""
    name, _, _ = pair

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        backbone = load_tiny(name)
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        lora = LoraConfig(rank=2, alpha=4, targets=tuple(TINY[name].targets.split(", ")))
        roles, source = Roles(backbone.transformer, lora, 0), torch.Generator().manual_seed(0)
        state = roles.state(GENERATOR)
        roles.load(GENERATOR, {k: 0.2 * torch.randn(t.shape, generator=source) for k, t in state.items()})
        cond, x, sigma = backbone.encode(PROMPTS[:2]), noise(TINY[name].shape), torch.tensor([0.5, 0.9])
        named = roles.named_parameters(GENERATOR)
        with roles.role(GENERATOR, train=True):
            loss = backbone.velocity(x, sigma, cond).square().mean()
            for other in (TEACHER, FAKE):
                with torch.no_grad(), roles.role(other):
                    backbone.velocity(x, sigma, cond)
            found = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
        return {key: t for (key, _), t in zip(named, found, strict=True) if t is not None}

    plain, checkpointed = gradients(False), gradients(True)
    moved = {key.partition(".")[0] for key, gradient in plain.items() if gradient.abs().max() > 0}
    assert moved == set(TINY[name].blocks) and plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-8, rtol=1e-5)


QUANTISED_ERRORS = {"int8": 0.03, "nf4": 0.3}
"""Stated: largest relative error of a small model's velocity, whose few weights a row forgive less than a real one's."""


@pytest.mark.parametrize("base", QUANTISED)
def test_a_quantised_base_is_close_to_the_plain_one(pair: Pair, base: Quantised) -> None:
    name, plain, _ = pair
    hardware = HardwareConfig(base=base)
    backbone = load_backbone(tiny_config(name), torch.device("cpu"), torch.float32, hardware)
    swapped = {
        key.partition(".")[0]
        for key, module in backbone.transformer.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear
    }
    assert swapped == set(TINY[name].blocks)
    cond, x, sigma = plain.encode(PROMPTS[:2]), noise(TINY[name].shape), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        exact, near = (each.velocity(x, sigma, cond) for each in (plain, backbone))
    assert 1e-5 < float((near - exact).norm() / exact.norm()) < QUANTISED_ERRORS[base]


# --- embedded guidance


def test_embedded_guidance_is_an_input_of_the_network() -> None:
    backbone, flux2 = load_tiny("flux1"), load_tiny("flux2")
    assert backbone.embedded_guidance and not flux2.embedded_guidance
    cond, x, sigma = backbone.encode(PROMPTS[:2]), noise(TINY["flux1"].shape), torch.tensor([0.5, 0.7])
    with torch.no_grad():
        plain = backbone.velocity(x, sigma, cond)
        strong = guided(backbone, cond, None, 3.5)(x, sigma)  # without the empty prompt
        each = backbone.velocity(x, sigma, cond, torch.tensor([1.0, 3.5]))
        low_high = guided(backbone, cond, None, (3.5, 1.0))(x, torch.tensor([0.5, 0.95]))
        low = backbone.velocity(x, torch.tensor([0.5, 0.95]), cond, torch.tensor([3.5, 1.0]))
    assert (plain - strong).abs().max() > 1e-3
    torch.testing.assert_close(each, torch.stack([plain[0], strong[1]]))
    torch.testing.assert_close(low_high, low)


def test_a_network_without_that_input_has_classifier_free_guidance(tmp_path: Path) -> None:
    folder = save(build_flux1_pipeline(guidance_embeds=False), tmp_path / "model")
    backbone = load_tiny("flux1", path=folder)
    assert not backbone.embedded_guidance
    plan = sampling_plan("teacher", backbone, tiny_config("flux1", path=folder), SAMPLER)
    assert plan.needs_empty_prompt and plan.evaluations == 12


def test_mixed_precision_reaches_network_and_decoder(pair: Pair) -> None:
    """Near in bf16, while it is entered; float32 comes out of both, and nothing else changes."""
    name, backbone, _ = pair
    x, cond = noise(TINY[name].shape), backbone.encode(PROMPTS[:2])
    mixed = MixedPrecision((backbone.transformer, backbone.decoder), torch.bfloat16)

    def computed() -> list[torch.Tensor]:
        with torch.no_grad():
            return [backbone.velocity(x, torch.full((2,), 0.7), cond), backbone.decode(x)]

    before = computed()
    with mixed.active():
        inside = computed()
    for found, exact, after in zip(inside, before, computed(), strict=True):
        assert found.dtype == torch.float32
        assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.03
        assert torch.equal(after, exact)
