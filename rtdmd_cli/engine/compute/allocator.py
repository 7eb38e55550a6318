"""How torch takes memory from a CUDA card. No torch here: it reads the setting when the card is first used."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTING, OLDER = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


KERNEL = Path("/proc/sys/kernel/osrelease")


def on_wsl() -> bool:
    """Whether this is Windows' subsystem for Linux, whose driver has less of CUDA than Linux's own."""
    return sys.platform == "linux" and KERNEL.is_file() and "microsoft" in KERNEL.read_text().lower()


def let_segments_grow() -> None:
    """Let pieces of the card's memory grow in place, so that phases of unlike sizes leave no gaps between them.

    A training goes from rollouts to turns, decoding and rewards, and a plan counts what is held, not gaps. What the user
    has set is kept; torch has it on Linux alone. On WSL it can be that no memory is given at all then
    (pytorch/pytorch#192330: "CUDA driver error: unknown error", "device not ready").
    """
    if sys.platform == "linux" and not on_wsl() and not {SETTING, OLDER} & os.environ.keys():
        os.environ[SETTING] = "expandable_segments:True"
