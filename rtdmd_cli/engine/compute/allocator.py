"""How torch takes memory from a CUDA card. No torch here: it reads the setting when the card is first used."""

from __future__ import annotations

import os
import sys

SETTING, OLDER = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


def let_segments_grow() -> None:
    """Let pieces of the card's memory grow in place, so that phases of unlike sizes leave no gaps between them.

    A training goes from rollouts to turns, decoding and rewards, and a plan counts what is held, not gaps. What the user
    has set is kept; torch has it on Linux alone.
    """
    if sys.platform == "linux" and not {SETTING, OLDER} & os.environ.keys():
        os.environ[SETTING] = "expandable_segments:True"
