from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.runtime.device import float32_matmul
from rtdmd_cli.engine.runtime.mixed import (
    MixedPrecision,
    multiplies_bf16,
    products_of,
    resolve_mixed_precision,
)
from rtdmd_cli.errors import EnvironmentFailure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


def able(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = {"avx2": True, "avx512_bf16": False, "amx_bf16": False} | dict.fromkeys(names, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def resolved(device: torch.device = CPU, base: torch.dtype = FP32, **hardware: Any) -> torch.dtype | None:
    return resolve_mixed_precision(HardwareConfig(**hardware), device, base)


def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, expected in ((["avx512_bf16"], BF16), (["amx_bf16"], BF16), (["avx512_fp16"], None)):
        able(monkeypatch, *names)
        assert resolved(mixed_precision="auto") == expected
    able(monkeypatch, "avx512_bf16")
    assert resolved() is resolved(mixed_precision="none") is None
    assert resolved(mixed_precision="auto", dtype="fp32") is None  # it was asked for
    assert resolved(base=BF16, mixed_precision="auto") is None  # the base's own
    assert not multiplies_bf16(CUDA) and resolved(CUDA, mixed_precision="auto") is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # as on processors that torch can't ask
    assert resolved(mixed_precision="auto") is None


def test_bf16_is_taken_wherever_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    able(monkeypatch)
    assert resolved(mixed_precision="bf16") == resolved(mixed_precision="bf16", dtype="fp32") == BF16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(EnvironmentFailure, match="Some GPU does not compute in bf16"):
        resolved(CUDA, mixed_precision="bf16")


def test_what_a_run_records(monkeypatch: pytest.MonkeyPatch) -> None:
    able(monkeypatch, "avx512_bf16")
    for hardware, expected in (
        ({}, "float32"),
        ({"mixed_precision": "auto"}, "bfloat16"),
        ({"mixed_precision": "auto", "dtype": "fp32"}, "float32"),
        ({"dtype": "bf16"}, "bfloat16"),
    ):
        assert products_of(HardwareConfig.model_validate(hardware), CPU) == expected


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))


def test_only_the_forward_passes_of_its_modules_while_active() -> None:
    inside, outside = layers(), layers()
    mixed = MixedPrecision([inside], BF16)
    x = torch.randn(4, 96)
    assert torch.equal(inside(x), outside(x))
    with mixed.active():
        assert inside(x).dtype == BF16
        assert outside(x).dtype == FP32 and not torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError, match="shapes"):
            inside(x[:, :5])
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(inside(x), outside(x))
    with pytest.raises(KeyError), mixed.active():
        raise KeyError
    assert inside(x).dtype == FP32
    with MixedPrecision().active():
        assert outside(x).dtype == FP32


class Attention(nn.Module):
    """Four heads of 16; notes which of torch's two attentions on the CPU ran."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (4, 16)).transpose(1, 2)
        with torch.profiler.profile() as profile:
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        names = {event.key for event in profile.key_averages()}
        kinds = {"flash": "flash_attention", "math": "attention_math"}
        self.seen += [kind for kind, part in kinds.items() if any(part in name for name in names)]
        return mixed


def test_attention_is_the_fused_one_where_no_gradient_is_recorded() -> None:
    module, x = Attention(), torch.randn(2, 12, 64)
    mixed = MixedPrecision([module], BF16)
    with float32_matmul("medium", CPU), mixed.active():
        with torch.no_grad():
            fused = module(x)
        plain = module(x)
        plain.float().square().sum().backward()
    assert module.seen == ["flash", "math"]
    torch.testing.assert_close(fused, plain.detach(), rtol=0.02, atol=0.02)


def gradient(module: nn.Module, x: Tensor, checkpointed: bool = False) -> Tensor:
    """Of a sum of squares to which a product outside the module belongs; after an evaluation without gradient."""
    outer = torch.linspace(-1, 1, 32 * 8).reshape(32, 8)
    module.zero_grad()
    with torch.no_grad():
        module(x)
    out = (checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)).float()
    (out @ outer).square().sum().backward()
    found = [parameter.grad for parameter in module.parameters()]
    assert all(each is not None and each.dtype == FP32 for each in found)
    return torch.cat([each.flatten() for each in found if each is not None])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_is_near_and_its_other_products_are_exact(checkpointed: bool) -> None:
    module, x = layers(), torch.randn(16, 96)
    exact = gradient(module, x)
    mixed = MixedPrecision([module], BF16)
    with mixed.active():
        found = gradient(module, x, checkpointed)
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.03

    seen: list[torch.dtype] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            seen.append((gradients[0] @ torch.eye(gradients[0].shape[-1])).dtype)
            return gradients[0]

    with mixed.active():
        Spy.apply(module(x).float()).square().sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [FP32]
