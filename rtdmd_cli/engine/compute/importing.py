"""Importing the model libraries (torch, diffusers, transformers, peft) in three quarters of the time. No torch here."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""torch's own switch: while it is 1, `torch.compile` gives its function back as it is."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import libraries within the block; what they do is the same, but for two things that take a third of the time.

    Python's garbage collector rests: the libraries' million objects stay, and it would go over them again and again.
    They are left out of its later rounds too, but not where nothing was imported: a model may be there by then. And
    bitsandbytes passes four of its functions to `torch.compile` when it is imported, which imports inductor; they are
    its substitutes for devices it has no kernels for (the CPU and CUDA have theirs), and stay uncompiled.
    `hardware.compile` compiles later, outside such a block.
    """
    collecting, before, known = gc.isenabled(), os.environ.get(NO_COMPILER), len(sys.modules)
    gc.disable()
    os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = before
        if len(sys.modules) > known:
            gc.freeze()
        if collecting:
            gc.enable()
