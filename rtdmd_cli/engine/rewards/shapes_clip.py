"""The two CLIPs of the shapes world, trained apart from each other: one to train on, one held out to judge."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.rewards.clip_reward import ClipReward

REWARD = "shapes/weights/clip"  # in the package
HELD_OUT = "shapes/weights/clip-judge"


def load(device: torch.device, path: str | None = None) -> ClipReward:
    """The cosine of picture and caption by the package's own CLIP: about 0.8 where they agree.

    path: a folder or hub id as for `pickscore.load`. Errors as `ClipScorer.load`.
    """
    return ClipReward(ClipScorer.load(path or _folder(REWARD), device))


def load_held_out(device: torch.device, path: str | None = None) -> ClipReward:
    """As `load`, by the CLIP with which `rtdmd eval shapes` scores: nothing should be trained on it."""
    return ClipReward(ClipScorer.load(path or _folder(HELD_OUT), device))


def _folder(name: str) -> Path:
    return Path(str(files("rtdmd_cli"))) / name
