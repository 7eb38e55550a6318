"""A base in 8 and 4 bits: how far it is from the plain one, what is swapped, and what adapters and gradients make of it."""

from __future__ import annotations

import functools
from copy import copy
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import HardwareConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute import float32_products
from rtdmd_cli.engine.compute.quantise import Base, place
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.errors import EnvironmentFailure
from tests.tiny_models import build_transformer

CPU = torch.device("cpu")
PROMPTS = ["a photo of two red circles", "a photo of a blue ring left of a white cross"]
ERRORS: dict[Base, float] = {"int8": 0.015, "nf4": 0.12}
"""Stated: relative error of the trained built-in teacher's velocity against the plain base, in bf16 and in fp32."""
GRADIENT_ERRORS: dict[Base, float] = {"int8": 0.05, "nf4": 0.5}
"""The same for the gradient of a squared velocity in the noisy latent, in fp32; nf4's is large."""
QUANTISED: tuple[Base, ...] = ("int8", "nf4")


def shapes() -> Preset:
    return load_preset("shapes-4step", environ={}).preset


@functools.cache
def loaded(base: Base, dtype: torch.dtype) -> Backbone:
    return load_backbone(shapes().model, CPU, dtype, HardwareConfig(base=base))


@functools.cache
def encoded() -> Conditioning:
    return loaded("plain", torch.float32).encode(PROMPTS)


def point() -> Tensor:
    shape = loaded("plain", torch.float32).latent_shape(32, 32)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def velocity(backbone: Backbone, sigma: float, x: Tensor | None = None) -> Tensor:
    cond = encoded().to(dtype=backbone.dtype)
    return backbone.velocity(point() if x is None else x, torch.full((2,), sigma), cond)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", QUANTISED)
def test_the_velocity_is_within_the_stated_error(base: Base, dtype: torch.dtype) -> None:
    plain, quantised = loaded("plain", dtype), loaded(base, dtype)
    with torch.no_grad():
        errors = [relative(velocity(quantised, s), velocity(plain, s)) for s in (1.0, 0.75, 0.5)]
    assert 0.001 < max(errors) < ERRORS[base], errors


@pytest.mark.parametrize("base", QUANTISED)
def test_the_gradient_reaches_the_input(base: Base) -> None:
    found = []
    for name in ("plain", base):
        x = point().requires_grad_()
        velocity(loaded(name, torch.float32), 0.75, x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert 0 < relative(found[1], found[0]) < GRADIENT_ERRORS[base]


@pytest.mark.parametrize("base", QUANTISED)
def test_a_layer_alone_has_the_gradient_of_its_own_weights(base: Base) -> None:
    """Exactly: both passes use the same dequantised matrix."""
    block = nn.Sequential(nn.Linear(64, 48))
    holder = nn.Module()
    holder.transformer_blocks = nn.ModuleList([block])
    place(holder, base, CPU)
    layer = block[0]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    zero = layer(torch.zeros(1, 64))
    matrix = (layer(torch.eye(64)) - zero).t()  # [48, 64]
    upstream = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(gradient, upstream @ matrix.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(zero[0], layer.bias)


def weights(layer: Any) -> torch.Tensor:
    """The layer's weights [out, in] as they are meant, float32."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        state = copy(layer.weight.quant_state)
        state.dtype = torch.float32
        return dequantize_4bit(layer.weight.data, state)
    return layer.state.CB.float() * layer.state.SCB.unsqueeze(1) / 127


@pytest.mark.parametrize("base", QUANTISED)
def test_emulated_bf16_is_multiplied_in_float32(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU has no products in bf16: rounded once, the same weights in both passes, nothing wide kept."""
    holder = nn.Module()
    block = nn.Sequential(nn.Linear(128, 48, bias=False)).to(torch.bfloat16)
    holder.transformer_blocks = nn.ModuleList([block])
    place(holder, base, CPU)
    layer = block[0]
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = {}
    for emulated in (False, True):
        monkeypatch.setattr(float32_products, "multiplies_bf16", lambda device, own=not emulated: own)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        assert y.dtype == gradient.dtype == torch.bfloat16
        found[emulated] = y.detach().float(), gradient.float()
    for narrow, wide in zip(*found.values(), strict=True):
        assert relative(wide, narrow) < 0.004  # bf16's last bit
    exact = (x.detach().float() @ weights(layer).t()).to(torch.bfloat16)
    if base == "nf4":
        assert torch.equal(found[True][0], exact.float())
    assert (
        found[True][0] != exact.float()
    ).float().mean() < 0.01  # 8 bits: float32's last bit can decide a rounding


@pytest.mark.parametrize("base", QUANTISED)
def test_only_the_blocks_linear_layers_are_swapped(base: Base) -> None:
    plain, quantised = build_transformer(), build_transformer()
    place(quantised, base, CPU)
    kind: Any = bitsandbytes.nn.Linear4bit if base == "nf4" else bitsandbytes.nn.Linear8bitLt
    swapped = {name for name, module in quantised.named_modules() if isinstance(module, kind)}
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert swapped == {name for name in linear if name.startswith("transformer_blocks.")}
    assert any(name.endswith("norm1.linear") for name in swapped) and "proj_out" in linear
    stay = {name: p for name, p in plain.named_parameters() if name.removesuffix(".weight") not in swapped}
    after = dict(quantised.named_parameters())
    assert stay.keys() <= after.keys() and all(torch.equal(after[name], p) for name, p in stay.items())
    sizes = {
        name: after[f"{name}.weight"].numel() / plain.get_parameter(f"{name}.weight").numel()
        for name in swapped
    }
    assert set(sizes.values()) == {0.5 if base == "nf4" else 1.0}
    assert {after[f"{name}.weight"].element_size() for name in swapped} == {1}
    assert not any(
        parameter.requires_grad for parameter in quantised.parameters() if parameter.element_size() == 1
    )


LORA = LoraConfig(rank=4, alpha=8)


def inputs() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=source),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 20, 40, generator=source),
        "pooled_projections": torch.randn(2, 20, generator=source),
    }


def on_quantised(base: Base) -> Roles:
    transformer = build_transformer()
    place(transformer, base, CPU)
    roles = Roles(transformer, LORA, seed=0)
    source = torch.Generator().manual_seed(3)
    for role in ("generator", "fake"):
        state = roles.state(role)
        roles.load(role, {k: v + 0.1 * torch.randn(v.shape, generator=source) for k, v in state.items()})
    return roles


@pytest.mark.parametrize("base", QUANTISED)
def test_adapters_sit_on_the_quantised_layers(base: Base) -> None:
    """peft's own classes for them, and LoRA's formula on top of the quantised layer."""
    kind = peft.tuners.lora.Linear4bit if base == "nf4" else peft.tuners.lora.Linear8bitLt
    roles = on_quantised(base)
    layer: Any = roles.transformer.get_submodule("transformer_blocks.1.attn.to_q")
    assert isinstance(layer, kind)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["fake"].weight, layer.lora_B["fake"].weight
    with torch.no_grad(), roles.role("fake"):
        expected = layer.base_layer(x) + (LORA.alpha / LORA.rank) * x @ a.t() @ b.t()
        torch.testing.assert_close(layer(x), expected)
    with torch.no_grad(), roles.role("teacher"):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("base", QUANTISED)
def test_the_gradient_of_an_adapter_is_the_finite_difference(base: Base) -> None:
    """Through all quantised layers above the first block, with and without checkpointing, other roles in between."""
    roles = on_quantised(base)

    def loss() -> Tensor:
        return roles.transformer(**inputs()).sample.square().mean()

    name = "transformer_blocks.0.attn.to_v.lora_B.weight"
    parameter = dict(roles.named_parameters("generator"))[name]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            roles.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        with roles.role("generator", train=True):
            value = loss()
            with torch.no_grad(), roles.role("teacher"):
                loss()
            value.backward()
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
        parameter.grad = None
    assert torch.equal(*gradients)
    direction = gradients[0] / gradients[0].norm()
    values = []
    with torch.no_grad(), roles.role("generator"):
        for step in (0.02, -0.02):
            parameter.add_(direction, alpha=step)
            values.append(float(loss()))
            parameter.sub_(direction, alpha=step)
    assert (values[0] - values[1]) / 0.04 == pytest.approx(float(gradients[0].norm()), rel=0.02)


def test_another_device_is_refused() -> None:
    with pytest.raises(EnvironmentFailure, match="int8 is for cpu and cuda alone"):
        place(build_transformer(), "int8", torch.device("meta"))
