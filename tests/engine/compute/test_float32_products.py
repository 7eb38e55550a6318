"""bf16 layers that multiply in float32: the same names and dtypes, nearly the same results and gradients."""

import pytest
import torch
from torch import nn

from rtdmd_cli.engine.compute import float32_products
from rtdmd_cli.engine.compute.float32_products import emulates_bf16, multiply_in_float32

CPU = torch.device("cpu")


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8, bias=False))
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, stride=2), nn.Flatten(), inner).to(dtype)


def picture(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_results_and_gradients_are_those_of_exact_products() -> None:
    wide = network(torch.bfloat16)
    exact = network(torch.bfloat16).float()
    multiply_in_float32(wide)
    found = {}
    for name, model in (("wide", wide), ("exact", exact)):
        dtype = next(model.parameters()).dtype
        x = picture(torch.bfloat16).to(dtype).requires_grad_()
        y = model(x)
        assert y.dtype == dtype
        y.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        found[name] = torch.cat([y.detach().float().flatten(), *(g.float().flatten() for g in gradients)])  # type: ignore[union-attr]
    distance = (found["wide"] - found["exact"]).norm() / found["exact"].norm()
    assert 0 < distance < 0.01  # bf16 rounds by up to 0.004 between the layers


def test_names_parameters_and_other_dtypes_stay() -> None:
    model = network(torch.bfloat16)
    before = dict(model.named_parameters())
    multiply_in_float32(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert type(model[2][0]) is float32_products.Float32Linear  # type: ignore[index]
    exact = network(torch.float32)
    multiply_in_float32(exact)
    assert type(exact[0]) is nn.Conv2d


def test_a_frozen_weight_keeps_no_input() -> None:
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
    multiply_in_float32(layer)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True))
    assert {tuple(t.shape) for t in kept} == {(8, 8)} and kept[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("able", "expected"), [(True, False), (False, True)])
def test_where_bf16_is_emulated(able: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "multiplies_bf16", lambda device: able)
    assert emulates_bf16(CPU, torch.bfloat16) is expected
    assert not emulates_bf16(CPU, torch.float32) and not emulates_bf16(torch.device("cuda"), torch.bfloat16)
