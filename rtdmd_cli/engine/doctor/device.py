"""The GPU, what it computes in, the compiler, and the quantised layers."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import nn

from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.compute.blocks import find_compiler, lacks
from rtdmd_cli.engine.compute.device import device_name
from rtdmd_cli.engine.compute.host import GIB
from rtdmd_cli.engine.compute.mixed import multiplies_bf16
from rtdmd_cli.engine.doctor.check import Check

FREE = 0.85
"""Share of the card's memory below which other programs are worth a warning."""
FP8 = (8, 9)
"""Compute capability from which a card of NVIDIA multiplies fp8."""
NEAR = {"int8": 0.03, "nf4": 0.2}
"""Largest relative error of a quantised layer that is taken for working; measured: 0.006 and 0.1."""
SHARED = Path("/dev/shm")
SHARED_GIB = 1.0
"""GiB of shared memory below which NCCL may fail between several cards; a container of Docker has 1/16 of that."""
INSTALL = "Install torch for your driver: https://pytorch.org/get-started/locally/"


def current() -> torch.device:
    """What `--device auto` would take, and mps where that is all there is."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def driver() -> dict[str, str]:
    """GPU and driver as nvidia-smi names them, of the first card, and the number of cards; empty where it finds none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines() or [""]
    name, _, version = lines[0].partition(", ")
    return {"name": name, "version": version, "count": str(len(lines))} if version else {}


def hiding(count: int) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES where it leaves none of `count` cards, else None.

    CUDA reads the list up to the first entry that is no card.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    first = value.partition(",")[0].strip()
    card = first.startswith(("GPU-", "MIG-")) or (first.isdecimal() and int(first) < count)
    return None if card else value


def gpu() -> Check:
    """The device, its free memory, and whether torch can compute on it."""
    device, seen = current(), driver()
    if device.type == "cuda":
        return _cuda(device, seen)
    facts = {"device": device.type, "cuda": torch.version.cuda, "driver": seen.get("version")}
    hidden = hiding(int(seen["count"])) if seen and torch.version.cuda else None
    if hidden is not None:
        found = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the {seen['name']} (driver {seen['version']})"
        return Check("gpu", "FAIL", found, "unset CUDA_VISIBLE_DEVICES", facts)
    if seen:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found = f"{seen['name']} (driver {seen['version']}), which torch can't use: it is {built}"
        return Check("gpu", "FAIL", found, INSTALL, facts)
    if device.type == "mps":
        found = "mps, without 8 and 4 bits: those are for cpu and cuda"
        return Check("gpu", "WARN", found, "Set hardware.base to plain.", facts)
    fix = "The built-in model needs none; for the published ones use a machine with a card of 16 GB or more."
    return Check("gpu", "WARN", f"none; {device_name(device)}", fix, facts)


def _cuda(device: torch.device, seen: dict[str, str]) -> Check:
    free, total = torch.cuda.mem_get_info()
    facts = {
        "device": "cuda",
        "name": device_name(device),
        "count": torch.cuda.device_count(),
        "free_gib": round(free / GIB, 2),
        "total_gib": round(total / GIB, 2),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "driver": seen.get("version"),
    }
    found = (
        f"{facts['count']} x {facts['name']}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        f"CUDA {torch.version.cuda}, driver {seen.get('version', 'unknown')}"
    )
    one = torch.ones(8, 8, device=device)
    if float((one @ one).sum()) != 8**3:
        return Check("gpu", "FAIL", f"{found}; it multiplies wrongly", INSTALL, facts)
    if free < FREE * total:
        held = f"Other programs hold {(total - free) / GIB:.1f} GiB; see who: nvidia-smi"
        return Check("gpu", "WARN", found, held, facts)
    return Check("gpu", "PASS", found, facts=facts)


def shared() -> Check:
    """The size of the shared memory, through which processes on several cards exchange gradients."""
    cards = torch.cuda.device_count()
    size = shutil.disk_usage(SHARED).total / GIB if SHARED.is_dir() else None
    found = "no /dev/shm here" if size is None else f"{size:.1f} GiB in /dev/shm"
    facts = {"size_gib": None if size is None else round(size, 3), "cards": cards}
    if cards < 2:
        return Check("shared", "PASS", f"{found}; several cards alone need it", facts=facts)
    if size is None or size < SHARED_GIB:
        fix = "For --processes: start the container with docker run --shm-size=1g, or with --ipc=host"
        return Check("shared", "WARN", f"{found}, too little for NCCL between {cards} cards", fix, facts)
    return Check("shared", "PASS", found, facts=facts)


def formats() -> Check:
    """bf16 and fp8 on this device."""
    device = current()
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp8 = torch.cuda.get_device_capability() >= FP8
    else:
        bf16, fp8 = multiplies_bf16(device), False
    words = [f"{name} {'yes' if there else 'no'}" for name, there in (("bf16", bf16), ("fp8", fp8))]
    facts = {"bf16": bf16, "fp8": fp8}
    if device.type == "cuda" and not bf16:
        fix = "Use --dtype fp32, with twice the memory; the presets of published models say bf16."
        return Check("formats", "WARN", ", ".join(words), fix, facts)
    return Check("formats", "PASS", f"{', '.join(words)} in hardware on {device.type}", facts=facts)


def compiler() -> Check:
    """The compiler that `hardware.compile` needs, and on CUDA Python's headers."""
    found, lacking = find_compiler(current()), lacks(current())
    if lacking is not None:
        fix = f"For hardware.compile alone; on Debian and Ubuntu: apt install {lacking.package}"
        return Check("compiler", "WARN", f"hardware.compile needs {lacking.what}", fix, {"path": found})
    return Check("compiler", "PASS", str(found), facts={"path": found})


def quantisation() -> Check:
    """Whether layers in 8 and 4 bits compute here what the plain layer does, nearly."""
    from rtdmd_cli.engine.compute.quantise import QUANTISED, swap_linears  # bitsandbytes may fail to import

    device = current()
    if device.type == "mps":
        return Check("bitsandbytes", "WARN", "not for mps", "Set hardware.base to plain.")
    errors: dict[str, float] = {}
    weight, x = (rng.normal((64,), 0, name, 0, range(64)) for name in ("weight", "x"))
    expected = x @ weight.t()
    for base in QUANTISED:
        layer = nn.Linear(64, 64, bias=False)
        layer.weight.data.copy_(weight)
        parent = nn.Sequential(layer)
        swap_linears(parent, base, device)
        with torch.no_grad():
            errors[base] = float((parent(x.to(device)).float().cpu() - expected).norm() / expected.norm())
    words = ", ".join(f"{base} within {error:.3f} of plain" for base, error in errors.items())
    wrong = [base for base, error in errors.items() if not error < NEAR[base]]
    found = f"{words} on {device.type}"
    if wrong:
        fix = "pip install --force-reinstall bitsandbytes, or set hardware.base to plain"
        return Check("bitsandbytes", "FAIL", found, fix, errors)
    return Check("bitsandbytes", "PASS", found, facts=errors)
