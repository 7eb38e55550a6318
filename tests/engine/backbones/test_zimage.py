"""Z-Image's own conventions: what its network is given and what it gives, against the stock pipeline's call."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from rtdmd_cli.engine.algo.flow import cfg
from tests.tiny_flux import TINY, load_tiny, tiny_folder
from tests.tiny_models import PROMPTS


def test_time_and_sign_are_turned_around() -> None:
    """The stock network is told 1 - sigma and predicts clean - noise: what the scheduler gets is the negative."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny_folder("zimage"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    times, predicted, stepped = [], [], []

    def watch(module: torch.nn.Module, given: tuple[Any, ...], made: Any) -> None:
        times.append(given[1].clone())
        predicted.append(torch.stack([each.clone() for each in made[0]]).squeeze(2))

    pipe.transformer.register_forward_hook(watch)
    step = pipe.scheduler.step

    def stepping(v: torch.Tensor, t: torch.Tensor, x: torch.Tensor, **named: Any) -> Any:
        stepped.append((v, x))
        return step(v, t, x, **named)

    pipe.scheduler.step = stepping
    x = torch.randn(2, *TINY["zimage"].shape, generator=torch.Generator().manual_seed(0))
    call = {
        "sigmas": [1.0, 0.5],
        "num_inference_steps": 2,
        "max_sequence_length": 48,
        "output_type": "latent",
    }
    pipe(prompt=list(PROMPTS[:2]), latents=x, height=32, width=32, guidance_scale=0.0, **call)
    backbone = load_tiny("zimage")
    cond, sigmas = backbone.encode(PROMPTS[:2]), backbone.sigmas([1.0, 0.5], TINY["zimage"].shape)
    assert len(stepped) == 2 and sigmas[1] == 6 * 0.5 / (1 + 5 * 0.5)
    for (v, x_sigma), t, raw, sigma in zip(stepped, times, predicted, sigmas[:2], strict=True):
        torch.testing.assert_close(t, (1 - sigma).expand(2))
        assert torch.equal(v, -raw)
        with torch.no_grad():
            ours = backbone.velocity(x_sigma, sigma.expand(2), cond)
        torch.testing.assert_close(ours, v, atol=1e-5, rtol=1e-5)


def test_guidance_counts_from_one() -> None:
    """The pipeline's `pos + s (pos - neg)` is guidance s + 1 here."""
    cond, uncond = (torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    backbone = load_tiny("zimage")
    torch.testing.assert_close(backbone.guide(cond, uncond, 5.0), cond + 4.0 * (cond - uncond))
    assert torch.equal(backbone.guide(cond, uncond, 5.0), cfg(cond, uncond, 5.0))


def test_padding_reaches_nothing() -> None:
    """Not even one that is not zero: the network is given the prompt's own rows."""
    backbone = load_tiny("zimage")
    cond = backbone.encode(PROMPTS[:2])
    assert cond.lengths is not None and cond.lengths.tolist() == [31, 44] and cond.embeds.shape[1] == 44
    x, sigma = torch.ones(2, *TINY["zimage"].shape), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        before = backbone.velocity(x, sigma, cond)
        cond.embeds[0, 31:] = 1e6
        assert torch.equal(backbone.velocity(x, sigma, cond), before)
