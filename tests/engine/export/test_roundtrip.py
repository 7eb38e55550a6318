"""The two samplers of the stock scheduler beside ours: Euler is eta 0, stochastic sampling is eta 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rtdmd_cli.engine.export.code import Place, Stock
from rtdmd_cli.engine.export.families import FAMILIES
from rtdmd_cli.engine.export.own import told_as_stock
from rtdmd_cli.engine.export.roundtrip import RoundTrip, compare, initial_noise, open_stock, stock_pictures
from rtdmd_cli.engine.sampling.sample import cps, decode_all, guided
from rtdmd_cli.errors import NumericalError
from tests.tiny_flux import TINY
from tests.tiny_models import PROMPTS, RESOLUTION, TEXT_LENGTH, load_sd3, sd3_folder

CPU = torch.device("cpu")
RAW = [1.0, 0.75, 0.5, 0.25]


def drawn(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """What the stock scheduler takes from torch's global seed, a tensor a step."""
    torch.manual_seed(5)
    return [torch.randn(1, *shape) for _ in range(count)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@torch.no_grad()
def test_the_stock_pipeline_is_our_sampler(eta: float) -> None:
    pipe = open_stock(Stock("StableDiffusion3Pipeline", Place(str(sd3_folder()))), CPU, torch.float32)
    config = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=eta == 1)
    side = str(RESOLUTION)
    call = {"guidance_scale": "1.0", "max_sequence_length": str(TEXT_LENGTH), "sigmas": str(RAW)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        stock = stock_pictures(pipe, PROMPTS[:1], call | {"height": side, "width": side})
        backbone = load_sd3()
        shape = backbone.latent_shape(RESOLUTION, RESOLUTION)
        noises = drawn(len(RAW), shape)
    levels = backbone.sigmas(RAW, shape).tolist()
    velocity = guided(backbone, backbone.encode(PROMPTS[:1]), None, 1.0)
    x0 = cps(velocity, initial_noise(shape, 1, torch.float32), levels, eta, noises[:-1])
    found = compare(decode_all(backbone, x0, 1), stock, torch.float32, True, "test")
    assert found.largest < 1e-5


def test_a_difference_beyond_rounding_is_refused() -> None:
    own, other = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 1e-3)
    with pytest.raises(NumericalError, match="test export doesn't make the run's pictures"):
        compare(own, other, torch.float32, True, "test")
    for dtype, exact in ((torch.bfloat16, True), (torch.float32, False)):
        found = compare(own, other, dtype, exact, "test")
        assert found == RoundTrip(2, found.mean, found.largest, dtype, exact)
        assert found.mean == pytest.approx(1e-3)
    with pytest.raises(NumericalError):
        compare(own, other * float("nan"), torch.float32, False, "test")


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_network_is_told_the_levels_that_the_stock_pipeline_tells_it(name: str) -> None:
    """In bf16 FLUX's and Qwen-Image's pipelines round them, times 1,000; the others don't."""
    tiny, told, seen = TINY[name], list[float](), list[float]()
    pipe = tiny.build().to(torch.bfloat16)

    def hear(module: Any, given: Any, named: Any) -> None:
        level = named["timestep"] if "timestep" in named else given[1]
        told.append(float(level.float()[0]))

    pipe.transformer.register_forward_pre_hook(hear, with_kwargs=True)
    call = {key: float(value) for key, value in FAMILIES[tiny.family].unguided.items()}
    size = {"height": 32, "width": 32, "max_sequence_length": tiny.text_length}
    pipe(prompt="a red ring", num_inference_steps=4, output_type="latent", **call, **size)
    levels = pipe.scheduler.sigmas[:4]
    exact = {"sd3": levels * 1000, "zimage": 1 - levels}.get(tiny.family, levels)
    if not FAMILIES[tiny.family].rounded_levels:
        assert told == pytest.approx(exact.tolist(), rel=1e-6, abs=1e-6)
        return

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return x

    for level in levels:
        told_as_stock(velocity, torch.bfloat16, level, level)
    assert seen == told and told != pytest.approx(exact.tolist(), rel=1e-6, abs=1e-6)
