"""Cards by name, and how fast this machine multiplies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import torch

from rtdmd_cli.errors import UsageError

UTILISATION = 0.4
"""Share of the dense bf16 rate that training one to four pictures at a time is taken to reach: an assumption, not measured."""
PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Gpu:
    """memory in GB as sold; tflops: dense bf16 products with float32 sums, 10^12 operations a second; where it stands."""

    name: str
    memory: int
    tflops: float
    source: str


_AMPERE = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("3090", 24, 71.0, _AMPERE),
        Gpu("4080", 16, 97.5, _ADA),
        Gpu("4090", 24, 165.2, _ADA),
        Gpu("5080", 16, 112.6, _BLACKWELL),
        Gpu("5090", 32, 209.5, _BLACKWELL),
        Gpu("A6000", 48, 154.8, _AMPERE),
        Gpu("6000-Ada", 48, 364.2, "NVIDIA RTX 6000 Ada data sheet, without sparsity"),
        Gpu("L4", 24, 121.0, "NVIDIA L4 data sheet, without sparsity"),
        Gpu("L40S", 48, 362.0, "NVIDIA L40S data sheet, without sparsity"),
        Gpu("A100", 80, 312.0, "NVIDIA A100 data sheet"),
        Gpu("H100", 80, 989.4, "NVIDIA H100 SXM data sheet, without sparsity"),
        Gpu("H200", 141, 989.4, "NVIDIA H200 data sheet, without sparsity"),
    )
}


def find_gpu(name: str) -> Gpu:
    """A row of the table; UsageError, naming the nearest, for none."""
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    wanted = name.lower().replace("rtx", "").replace("nvidia", "").replace("geforce", "").strip(" -_")
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=1, cutoff=0.4)
    hint = f"Did you mean `{known[near[0]].name}`? " if near else ""
    raise UsageError(f"There is no GPU `{name}` in the table.", f"{hint}Known: {', '.join(GPUS)}.")


@cache
def probe(device: torch.device, dtype: torch.dtype, seconds: float = PROBE_SECONDS) -> float:
    """Operations a second of a product of square matrices on this machine, measured for about `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    began, count = time.perf_counter(), 0
    while True:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        taken = time.perf_counter() - began
        if taken > seconds and count > 2:
            return count * 2 * size**3 / taken
