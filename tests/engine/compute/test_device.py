"""Devices and number formats, with the hardware played by monkeypatch."""

import platform
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rtdmd_cli.engine.compute import device
from rtdmd_cli.engine.compute.device import (
    device_name,
    float32_matmul,
    resolve_device,
    resolve_dtype,
    useful_matmul,
)
from rtdmd_cli.errors import EnvironmentFailure, UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def has_cuda(monkeypatch: pytest.MonkeyPatch, there: bool, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_auto_takes_cuda_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, True)
    assert resolve_device("auto") == resolve_device("cuda") == CUDA
    assert device_name(CUDA) == "Some GPU"
    has_cuda(monkeypatch, False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def test_a_processor_by_what_makes_it_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of Linux's list; elsewhere there is no list."""
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(device, "CPUINFO", listed)
    bare = device_name(CPU)
    assert bare == f"cpu ({platform.machine()})"
    one = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\n"
    listed.write_text(one + "\n" + one.replace("Some", "Other"))
    assert device_name(CPU) == bare.replace("(", "(Some CPU, family 25, model 17, ")
    monkeypatch.setattr(device, "CPUINFO", tmp_path)  # can't be read
    assert device_name(CPU) == bare


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(EnvironmentFailure, match=name) as caught:
        resolve_device(name)
    assert "--device cpu" in caught.value.hint
    assert caught.value.exit_code == 3


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, True)
    assert resolve_dtype("auto", CUDA) == resolve_dtype("bf16", CPU) == torch.bfloat16
    assert resolve_dtype("auto", CPU) == resolve_dtype("fp32", CUDA) == torch.float32
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, True, bf16=False)
    assert resolve_dtype("auto", CUDA) == torch.float32
    with pytest.raises(EnvironmentFailure, match="Some GPU does not compute in bf16"):
        resolve_dtype("bf16", CUDA)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="`tpu`"):
        resolve_device("tpu")
    with pytest.raises(UsageError, match="`fp8`"):
        resolve_dtype("fp8", CPU)


def test_the_precision_of_float32_products() -> None:
    """Set within the block alone; with medium products are at worst those of bf16, and attention stays close."""
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 160, generator=source), torch.randn(160, 64, generator=source)
    q, k, v = torch.randn(3, 2, 5, 41, 32, generator=source)
    exact, whole = (a.double() @ b.double()).float(), scaled_dot_product_attention(q, k, v)
    before = torch.get_float32_matmul_precision()
    for precision, tolerance in (("highest", 1e-4), ("medium", 0.15)):
        with float32_matmul(precision, CPU):
            assert torch.get_float32_matmul_precision() == precision
            assert (a @ b - exact).abs().max() < tolerance
            assert (scaled_dot_product_attention(q, k, v) - whole).abs().max() < 0.1 * tolerance
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="inside"), float32_matmul("medium", CPU):
        raise RuntimeError("inside")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("precision", "device", "capability", "taken"),
    [
        ("medium", "cpu", "AVX2", "highest"),
        ("medium", "cpu", "AVX512_BF16", "medium"),
        ("high", "cpu", "AVX2", "high"),
        ("medium", "cuda", "AVX2", "medium"),
    ],
)
def test_medium_is_for_processors_with_avx_512(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, capability: str, taken: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert useful_matmul(precision, torch.device(device)) == taken


def test_medium_takes_the_plain_attention_on_the_cpu() -> None:
    q = torch.zeros(1, 1, 2, 4)
    for precision, plain in (("high", False), ("medium", True)):
        with float32_matmul(precision, CPU), torch.profiler.profile() as seen:
            scaled_dot_product_attention(q, q, q)
        names = {event.key for event in seen.key_averages()}
        assert ("aten::_scaled_dot_product_attention_math" in names) == plain, names
