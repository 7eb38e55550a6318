"""Qwen-Image's own conventions: its guidance, its few-step schedule, and the mask of its prompts."""

from __future__ import annotations

from typing import Any

import torch

from rtdmd_cli.engine.algo.flow import cfg
from rtdmd_cli.engine.backbones.common import evenly_spaced
from tests.tiny_flux import TINY, load_tiny
from tests.tiny_models import PROMPTS

SHAPE = TINY["qwenimage"].shape


def test_guidance_keeps_the_norm_of_each_token() -> None:
    """Of 2 x 2 latent pixels with all their channels, as the stock pipeline scales it."""
    backbone = load_tiny("qwenimage")
    v_cond, v_uncond = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = backbone.guide(v_cond, v_uncond, torch.tensor([4.0, 1.5]))
    plain = cfg(v_cond, v_uncond, torch.tensor([4.0, 1.5]))

    def norms(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, H/2, W/2, 2, 2]
        return blocks.square().sum((1, 4, 5)).sqrt()

    torch.testing.assert_close(norms(found), norms(v_cond))
    ratio = found / plain
    assert bool((ratio > 0).all()) and (norms(plain) - norms(v_cond)).abs().max() > 1
    torch.testing.assert_close(ratio[:, :1, ::2, ::2].expand(-1, 4, -1, -1), ratio[:, :, 1::2, 1::2])
    torch.testing.assert_close(backbone.guide(v_cond, v_uncond, 1.0), v_cond)


def test_few_steps_leave_the_terminal_level_out() -> None:
    """The scheduler's 0.02 is the last level of the teacher's schedule, and not of four steps."""
    backbone = load_tiny("qwenimage")
    stock = backbone.stock_sigmas(50, SHAPE)
    assert len(stock) == 51 and abs(float(stock[-2]) - 0.02) < 1e-6
    few = backbone.sigmas([1.0, 0.75, 0.5, 0.25], SHAPE)
    assert float(few[-2]) > 0.25 and bool((few[:-1] > few[1:]).all())
    assert abs(float(backbone.stock_sigmas(4, SHAPE)[-2]) - 0.02) < 1e-6  # which would waste the last one
    assert torch.equal(few, backbone.sigmas(evenly_spaced(4), SHAPE))
    assert abs(float(backbone.stock_sigmas(50, SHAPE)[-2]) - 0.02) < 1e-6  # its own scheduler is as it was


def test_padding_reaches_nothing() -> None:
    backbone = load_tiny("qwenimage")
    cond = backbone.encode(PROMPTS[:2])
    assert cond.lengths is not None and cond.lengths.tolist() == [17, 28] and cond.embeds.shape[1] == 28
    x, sigma = torch.ones(2, *SHAPE), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        before = backbone.velocity(x, sigma, cond)
        cond.embeds[0, 17:] = 100.0
        torch.testing.assert_close(backbone.velocity(x, sigma, cond), before)


def test_the_mask_is_there_only_where_lengths_differ() -> None:
    """Without one, attention can use its fused form."""
    backbone = load_tiny("qwenimage")
    cond, masks = backbone.encode(PROMPTS[:2]), list[Any]()
    backbone.transformer.register_forward_pre_hook(
        lambda module, given, named: masks.append(named["encoder_hidden_states_mask"]), with_kwargs=True
    )
    x, sigma = torch.ones(2, *SHAPE), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        for rows in ([0, 1], [0, 0], [1, 1]):
            backbone.velocity(x, sigma, cond.select(rows))
    assert masks[1:] == [None, None] and masks[0].sum(1).tolist() == [17, 28]
