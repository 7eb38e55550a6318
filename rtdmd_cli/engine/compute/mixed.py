"""Mixed precision: matrix products in bf16, while weights, gradients and everything else keep their own format.

This is torch's autocast around the forward passes of chosen modules. Torch records the format of each product, and the
backward pass uses the same. The backward pass itself runs outside autocast, which would also round what was computed
outside these modules, such as a reward's gradient.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd_cli.config.schema import HardwareConfig
from rtdmd_cli.engine.compute.device import resolve_dtype


def resolve_mixed_precision(
    hardware: HardwareConfig, device: torch.device, dtype: torch.dtype
) -> torch.dtype | None:
    """Format of the matrix products by `hardware.mixed_precision`; None where they keep the base's `dtype`.

    "auto" is bf16 on a CPU that multiplies bf16 in hardware, unless a dtype was asked for. EnvironmentFailure for bf16
    on a cuda device without it.
    """
    name = hardware.mixed_precision
    wanted = multiplies_bf16(device) and hardware.dtype == "auto" if name == "auto" else name == "bf16"
    if not wanted or dtype == torch.bfloat16:
        return None
    return resolve_dtype("bf16", device)


def products_of(hardware: HardwareConfig, device: torch.device) -> str:
    """The nominal format of training's matrix products, for the record: "float32" or "bfloat16".

    Within it, `hardware.float32_matmul` may let torch round further.
    """
    dtype = resolve_dtype(hardware.dtype, device)
    mixed = resolve_mixed_precision(hardware, device, dtype)
    return str(mixed or dtype).removeprefix("torch.")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it is a CPU with AVX512-BF16 or AMX. On others bf16 was far slower than float32, or was not tried."""
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def cast_forward(module: nn.Module, wanted: Callable[[], torch.dtype | None]) -> None:
    """Autocast each later forward pass of `module` to `wanted()`; not where that is None.

    Without autocast's cache: a weight is used once in a pass, and inside another autocast the cache would hand a cast
    that was made without gradient to a step with one.
    """
    entered: list[ExitStack] = []

    def enter(module: nn.Module, *_: Any) -> None:
        dtype, device = wanted(), next(module.parameters()).device.type
        entered.append(ExitStack())
        if dtype is not None:
            entered[-1].enter_context(torch.autocast(device, dtype, cache_enabled=False))

    def leave(*_: Any) -> None:
        entered.pop().close()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def take_contiguous(module: nn.Module, wanted: Callable[[], bool]) -> None:
    """Make inputs of linear layers in `module` contiguous on the CPU, in all later passes where `wanted()`.

    Without gradients torch multiplies a slice (such as the picture's part of a joint attention's output) one picture at a
    time, each with a copy of the weights, which costs a tenth of a forward pass on the CPU.
    """

    def gather(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not wanted() or given[0].device.type != "cpu":
            return given
        return given[0].contiguous(), *given[1:]

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(gather)


class MixedPrecision:
    """Products of `modules` in `dtype`, in their forward passes while `active` is entered; of none by default.

    dtype: None to keep their format. On a CPU slices are gathered for them (`take_contiguous`).
    """

    def __init__(self, modules: Iterable[nn.Module] = (), dtype: torch.dtype | None = torch.bfloat16) -> None:
        self.dtype = dtype
        self._active = False
        for module in modules:
            if dtype is not None:
                cast_forward(module, self._wanted)
            take_contiguous(module, self._entered)

    def _entered(self) -> bool:
        return self._active

    def _wanted(self) -> torch.dtype | None:
        return self.dtype if self._active else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, not outside: measurements and pictures are in the base's precision."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
