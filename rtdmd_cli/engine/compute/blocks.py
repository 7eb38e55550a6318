"""The repeated blocks of a diffusion transformer: what is quantised and compiled."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from rtdmd_cli.errors import EnvironmentFailure

RECOMPILE_LIMIT = 64
"""Graphs of a block: three roles, with and without gradient, two batch sizes, and the last block is another: about 16."""


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks in order, of every transformer inside a module that holds several: what stands in its outermost lists.

    ValueError where there are none.
    """
    blocks = list(_listed(transformer))
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks")
    return blocks


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _listed(child)


def compile_blocks(transformer: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile each repeated block in place at its first call, after adapters have been put on.

    backend: of torch.compile. EnvironmentFailure where inductor lacks the C++ compiler it needs on the CPU, or the C
    compiler and Python's headers with which Triton builds its launcher on CUDA.
    """
    lacking = lacks(device) if backend == "inductor" else None
    if lacking is not None:
        raise EnvironmentFailure(
            f"hardware.compile needs {lacking.what}.",
            f"Install it (on Debian and Ubuntu: apt install {lacking.package}), or set hardware.compile to false.",
        )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Else the newest graph is tried first: with two batch sizes in one pass, checkpointing would compute a block again
    # by another graph than the first time, which saves other tensors (pytorch/pytorch#166926).
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined] # its stub lacks it
    for block in repeated_blocks(transformer):
        block.compile(backend=backend)


def find_compiler(device: torch.device) -> str | None:
    """Path of the compiler that `compile_blocks` needs on `device`; None where there is none."""
    return next((path for path in map(shutil.which, _compilers(device)) if path), None)


def _compilers(device: torch.device) -> list[str]:
    """Names to look for: the environment's own choice alone, where it makes one."""
    variable, usual = ("CXX", ["g++", "clang++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    return [os.environ[variable]] if os.environ.get(variable) else usual


class Lacking(NamedTuple):
    """What `compile_blocks` can't do without, and the package of Debian and Ubuntu that holds it."""

    what: str
    package: str


def lacks(device: torch.device) -> Lacking | None:
    """What is not there of what `compile_blocks` needs on `device`."""
    if find_compiler(device) is None:
        names = ", ".join(_compilers(device))
        return Lacking(f"a compiler, and none of {names} is on the PATH", "g++")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if device.type == "cuda" and not header.is_file():
        return Lacking(f"Python's headers, and there is no {header}", "python3-dev")
    return None
