"""The two samplers of the stock scheduler beside ours: Euler is eta 0, stochastic sampling is eta 1."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rtdmd_cli.engine.export.code import Place, Stock
from rtdmd_cli.engine.export.roundtrip import RoundTrip, compare, initial_noise, open_stock, stock_pictures
from rtdmd_cli.engine.sampling.sample import cps, decode_all, guided
from rtdmd_cli.errors import NumericalError
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
        assert found == RoundTrip(2, found.mean, found.largest, dtype, exact, 0.0)
        assert found.mean == pytest.approx(1e-3)
    with pytest.raises(NumericalError):
        compare(own, other * float("nan"), torch.float32, False, "test")


def test_a_model_that_makes_much_of_rounding_is_allowed_what_it_makes_of_it() -> None:
    """A large one with random weights, say: the levels of noise alone, rounded otherwise, give other pictures."""
    own, other = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.06)
    found = compare(own, other, torch.bfloat16, True, "test", noise=0.03)
    assert found.tolerance == pytest.approx(0.09) and found.record()["tolerance"] == found.tolerance
    for noise in (0.0, 0.01):  # 0.05, as ever
        with pytest.raises(NumericalError, match=r"mean difference 0.06, allowed 0.05"):
            compare(own, other, torch.bfloat16, True, "test", noise=noise)
