"""What NVIDIA's driver says of its cards. No torch here: asking it takes seconds, and it is silent of an old driver."""

from __future__ import annotations

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path

from rtdmd_cli.errors import EnvironmentFailure

LIBRARY = "libcuda.so.1"


def cuda_at_hand() -> bool:
    """Whether torch is built for CUDA and the driver counts a device.

    EnvironmentFailure where the driver is too old for this torch, which then computes on the processor and says no more
    than a warning. One of the same major version is new enough.
    """
    built = built_for()
    if built is None:
        return False
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return False
    does = does_cuda()
    if built and does and int(does.partition(".")[0]) < built[0]:
        raise EnvironmentFailure(
            f"The NVIDIA driver is too old: it does CUDA {does}, and this torch is built for {built[0]}.{built[1]}.",
            "Update the driver, or install torch for it (https://pytorch.org/get-started/locally/); --device cpu needs none.",
        )
    return True


def does_cuda() -> str:
    """The newest version of CUDA that the driver does, as "12.8"; "" where it doesn't tell."""
    does = ctypes.c_int(0)
    if ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(does)) != 0:
        return ""
    return f"{does.value // 1000}.{does.value % 1000 // 10}"


def built_for() -> tuple[int, ...] | None:
    """Major and minor version of CUDA that torch is built for; () for ROCm, None for neither, or without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b[^=]*= *['\"](\d+)\.(\d+)", text, re.MULTILINE)
    if cuda is not None:
        return int(cuda[1]), int(cuda[2])
    return () if re.search(r"^hip\b[^=]*= *['\"]", text, re.MULTILINE) else None
