from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.compute.device import float32_matmul
from rtdmd_cli.engine.compute.mixed import (
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
    """Four heads of 16 and a linear layer after them, of every token but the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (4, 16)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2)[:, 1:])
        return out


def operations(module: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        module(x)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("recorded", [False, True])
def test_attention_on_the_cpu_is_the_plain_one_in_short_format(recorded: bool) -> None:
    module, x = Attention(), torch.randn(2, 12, 64)
    mixed = MixedPrecision([module], BF16)
    with float32_matmul("medium", CPU), mixed.active(), torch.set_grad_enabled(recorded):
        found, names = module(x), operations(module, x)
    assert "aten::_scaled_dot_product_attention_math" in names
    assert not any("flash" in name for name in names)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with torch.autocast("cpu", BF16):
        heads = module.project(x).unflatten(-1, (4, 16)).transpose(1, 2)
        scores = (heads / 2) @ (heads / 2).transpose(-1, -2)  # 1/sqrt(16), half to either side, as torch does
        pooled = (scores.to(BF16).softmax(-1).to(BF16) @ heads).transpose(1, 2).flatten(2)
        same = module.out(pooled[:, 1:].contiguous())
    assert torch.equal(found, same)
    with pytest.raises(KeyError), float32_matmul("medium", CPU):
        raise KeyError
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_attention_of_other_devices_and_of_full_precision_is_as_it_was() -> None:
    for precision, device in (("medium", CUDA), ("highest", CPU)):
        with float32_matmul(precision, device):
            assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    q, whole = torch.randn(2, 4, 12, 16), nn.functional.scaled_dot_product_attention
    torch.set_float32_matmul_precision("medium")  # which a processor with bf16 computes products in
    with sdpa_kernel(SDPBackend.MATH):
        expected = whole(q, q, q)
    torch.set_float32_matmul_precision("highest")
    with float32_matmul("medium", CPU):
        assert torch.equal(whole(q, q, q), expected)  # float32 stays float32


def test_attention_recomputed_in_a_backward_pass_is_the_same() -> None:
    module, x = Attention(), torch.randn(2, 12, 64)
    found = []
    for checkpointed in (False, True):
        module.zero_grad()
        with float32_matmul("medium", CPU), MixedPrecision([module], BF16).active():
            out = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            out.float().square().sum().backward()
        found.append(module.project.weight.grad)
    assert found[0] is not None and found[0].any() and torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [BF16, None])
def test_a_slice_is_no_product_for_each_picture(dtype: torch.dtype | None) -> None:
    plain, module = (Attention().requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 12, 64)
    mixed = MixedPrecision([module], dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert "aten::bmm" in operations(plain, x) & operations(module, x)
        assert torch.equal(module(x), plain(x))
    with mixed.active(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert "aten::bmm" not in operations(module, x)
        assert module(x).dtype == (dtype or FP32)
        near = 0.02 if dtype else 1e-6
        torch.testing.assert_close(module(x).float(), plain(x), rtol=near, atol=near)


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
