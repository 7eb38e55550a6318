"""Every family against the stock pipeline of diffusers, on the same small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from rtdmd_cli.config.schema import SamplerConfig
from rtdmd_cli.engine.backbones.base import Backbone
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.compute.mixed import MixedPrecision
from rtdmd_cli.engine.sampling.sample import euler, guided, sampling_plan
from rtdmd_cli.errors import RtdmdError, UsageError
from tests.tiny_flux import TINY, build_flux1_pipeline, load_tiny, save, tiny_config, tiny_folder
from tests.tiny_models import PROMPTS, RESOLUTION

RAW = [1.0, 0.75, 0.5, 0.25]
SAMPLER = SamplerConfig()
SIZES = {"square": (RESOLUTION, RESOLUTION), "wide": (16, RESOLUTION)}  # height, width

Pair = tuple[str, Backbone, Any]


@pytest.fixture(scope="module", params=["sd35", "flux1", "flux2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Name, our backbone, and the stock pipeline on the same folder."""
    name = request.param
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_folder(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return name, load_tiny(name), pipe


def stock_prompts(name: str, pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the stock pipeline's call takes for encoded prompts."""
    length = {"max_sequence_length": TINY[name].text_length}
    with torch.no_grad():
        if name == "flux1":
            embeds, pooled, _ = pipe.encode_prompt(prompts, None, **length)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if name == "flux2":
            return {"prompt_embeds": pipe.encode_prompt(prompts, **length)[0]}
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def stock_latents(name: str, pipe: Any, x: torch.Tensor) -> torch.Tensor:
    """Our latents as the stock pipeline's `latents=` takes them."""
    return pipe._pack_latents(x, *x.shape) if name == "flux1" else x  # type: ignore[no-any-return]


def stock_call(
    name: str, pipe: Any, x: torch.Tensor, size: tuple[int, int], **arguments: Any
) -> torch.Tensor:
    """Pictures (or latents) of the first prompts."""
    made: torch.Tensor = pipe(
        prompt=PROMPTS[: len(x)],
        latents=stock_latents(name, pipe, x),
        height=size[0],
        width=size[1],
        max_sequence_length=TINY[name].text_length,
        **{"output_type": "pt", **arguments},
    ).images
    return made


def noise(shape: tuple[int, ...], count: int = 2) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def test_the_table_covers_every_family() -> None:
    assert {tiny.family for tiny in TINY.values()} == set(FAMILIES)


def test_prompts_are_encoded_as_in_the_stock_pipeline(pair: Pair) -> None:
    name, backbone, pipe = pair
    cond, expected = backbone.encode(PROMPTS), stock_prompts(name, pipe, PROMPTS)
    assert torch.equal(cond.embeds, expected["prompt_embeds"])
    if "pooled_prompt_embeds" in expected:
        assert cond.pooled is not None and torch.equal(cond.pooled, expected["pooled_prompt_embeds"])
    else:
        assert cond.pooled is None
    assert not torch.allclose(cond.embeds[0], cond.embeds[1], atol=1e-3)
    again = backbone.encode(PROMPTS[1:2])
    torch.testing.assert_close(again.embeds[0], cond.embeds[1])


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
    call = {"num_inference_steps": 4, "sigmas": RAW} if steps is None else {"num_inference_steps": steps}
    expected = stock_call(name, pipe, x, size, guidance_scale=guidance, **call)
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
    expected = stock_call(name, pipe, x, size, guidance_scale=tiny.guidance, output_type="latent", **steps)
    plan = sampling_plan("teacher", backbone, tiny_config(name), SAMPLER, steps=3)
    velocity = guided(backbone, backbone.encode(PROMPTS[:2]), backbone.encode([""]), plan.guidance)
    with torch.no_grad():
        latents = euler(velocity, x, plan.sigmas)
    if name == "flux1":
        latents = stock_latents(name, pipe, latents)
    if name == "flux2":  # the stock pipeline gives the VAE's own latents out
        bn = pipe.vae.bn
        std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        latents = pipe._unpatchify_latents(latents * std + bn.running_mean.view(1, -1, 1, 1))
    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert plan.evaluations == (3 if name == "flux1" else 6)


def test_the_shift_follows_the_size(pair: Pair) -> None:
    name, backbone, _ = pair
    small, large = (backbone.sigmas(RAW, backbone.latent_shape(side, side)) for side in (16, 32))
    assert torch.equal(small, large) == (name == "sd35")
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
