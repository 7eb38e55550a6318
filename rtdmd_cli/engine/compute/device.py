"""Which device and which number format a run computes with."""

import gc
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtdmd_cli.engine.compute.driver import cuda_at_hand, does_cuda
from rtdmd_cli.errors import EnvironmentFailure, UsageError, is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = {"model name": "", "cpu family": "family ", "model": "model "}
"""What of Linux's list of processors tells one from another, and how it is named."""


def resolve_device(name: str) -> torch.device:
    """The device of "auto" (cuda if there is one, else cpu), "cpu", "cuda" or "mps".

    Raises EnvironmentFailure if it isn't there, or torch can't use what the driver counts, UsageError for another name.
    """
    if name in ("auto", "cuda") and not torch.cuda.is_available():
        _refuse_unusable()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise UsageError(f"There is no device `{name}`.", f"Choose one of {', '.join(DEVICES)}.")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise EnvironmentFailure(_absent(name), "Use --device cpu, or --device auto to take what is there.")
    return torch.device(name)


def _refuse_unusable() -> None:
    """EnvironmentFailure where the driver counts a card that torch, built for it, can't use: "auto" would train without.

    Cards that CUDA_VISIBLE_DEVICES hides are not counted.
    """
    if cuda_at_hand() and torch.version.cuda is not None:  # which itself says so of an old driver
        does = does_cuda() or "of a version unknown"
        raise EnvironmentFailure(
            f"The NVIDIA driver, which does CUDA {does}, counts a card, and this torch, built for {torch.version.cuda}, "
            "can't use it.",
            "Update the driver, or see why: python -c 'import torch; torch.cuda.init()'; --device cpu needs none.",
        )


def _absent(name: str) -> str:
    if name == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"No cuda device can be used: this torch ({torch.__version__}) is built without it."
    return f"No {name} device was found on this machine."


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of "auto" (bf16 on a cuda device that computes in it, else fp32), "fp32" or "bf16".

    Raises EnvironmentFailure for bf16 on a cuda device without it, UsageError for another name.
    """
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and not lacks_bf16 else torch.float32
    if name not in DTYPES:
        raise UsageError(f"There is no dtype `{name}`.", f"Choose one of auto, {', '.join(DTYPES)}.")
    if name == "bf16" and lacks_bf16:
        raise EnvironmentFailure(f"{device_name(device)} does not compute in bf16.", "Use --dtype fp32.")
    return DTYPES[name]


def is_float32_on_cpu(tensor: Tensor) -> bool:
    """Whether its numbers are float32 in host memory.

    Subclasses of Tensor may have none, as where shapes alone are computed.
    """
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) is Tensor


class HostRows:
    """A tensor of `count` rows in host memory that is filled part by part; each part is waited for.

    A copy that is queued goes into memory of its own, of the next power of two in size, which the process never gives back:
    for the pictures of an epoch that is more than the pictures themselves.
    """

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._rows: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """The next rows [b, ...]; the first part decides on their shape and dtype."""
        if self._rows is None:
            self._rows = torch.empty(self._count, *part.shape[1:], dtype=part.dtype)
        self._rows[self._filled : self._filled + len(part)].copy_(part)
        self._filled += len(part)

    def whole(self) -> Tensor:
        """[count, ...], once all rows are there."""
        assert self._rows is not None and self._filled == self._count
        return self._rows


def wait(device: torch.device) -> None:
    """Return when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more, before something else takes its place."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def within_memory(make: Callable[[int], T], size: int, device: torch.device) -> T:
    """`make(size)`, where `size` is how many are computed at once; with half as many where the memory is full, down to 1."""
    while True:
        try:
            return make(size)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2  # out of the handler, which holds the frames of the error, and their tensors
        _tell(size)
        free_memory(device)


def where_there_is_room(
    make: Callable[[torch.device], T], device: torch.device, say: Callable[[str], None]
) -> T:
    """`make(device)`; `make` of the CPU where a card's memory is full, which is said first."""
    try:
        return make(device)
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    free_memory(device)  # out of the handler, which holds the frames of the error, and their tensors
    say("the card's memory is full: on the CPU instead, which takes longer")
    return make(torch.device("cpu"))


@cache
def _tell(size: int) -> None:
    """Once a process for each size."""
    log.warning("the memory is full: pictures are taken %d at a time, which takes longer", size)


def useful_matmul(precision: str, device: torch.device) -> str:
    """The precision of float32 products that `float32_matmul` takes: "highest" for "medium" on a CPU without AVX-512.

    There oneDNN is no quicker than torch's own products (44 to 66 GFLOP/s by either, on Zen 3), and "medium" costs the
    fused attention.
    """
    capable = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return precision if capable or precision != "medium" else "highest"


@contextmanager
def float32_matmul(precision: str, device: torch.device) -> Iterator[None]:
    """Within the block, how far torch may round float32 matrix products: "highest", "high" or "medium".

    On cuda the latter two are TF32. On the CPU high changes nothing, and medium hands the products to oneDNN, which may
    round what goes in to bf16: processors with AMX may, one with AVX-512 alone was seen not to, and to be faster
    nonetheless. With medium on the CPU attention is `plain_attention`: the fused one became about ten times slower.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    plain = device.type == "cpu" and precision == "medium"
    try:
        with plain_attention() if plain else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within the block attention is torch's plain one, with its products in the format of its inputs.

    Otherwise torch computes the products of bf16 tensors in float32, and a training step takes a tenth longer on the CPU.
    Enter it around a backward pass as well: checkpointing recomputes there, and must find the same.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of the CPU too, in spite of its name
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def device_name(device: torch.device) -> str:
    """The device's name: the GPU's, or else the processor's (where Linux gives one) and its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({', '.join([*_processor(CPUINFO), platform.machine()])})"


def _processor(cpuinfo: Path) -> list[str]:
    """The facts that identify a processor, from the first one in Linux's list; empty where there is no list."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return [label + facts[key] for key, label in PROCESSOR.items() if key in facts]
