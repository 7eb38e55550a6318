"""What a reward has to offer, and what the table of rewards says of it. No torch until a reward is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reward(Protocol):
    """A loaded reward. Higher is better."""

    @property
    def differentiable(self) -> bool:
        """Whether a gradient flows from the score to the pixels."""
        ...

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The reward of each picture: float32 [B], on the images' device.

        images [B,3,H,W], float32 in 0..1; prompts and metadata: one for each picture. DataError where the
        metadata lacks what the reward needs.
        """
        ...


@dataclass(frozen=True)
class Need:
    """Weights a reward is made of: a repository of the hub, its files that are used, their size in bytes, the licence.

    `size` is the published size of the files that `files` (patterns) name; `source` "" stands for the package itself.
    """

    source: str
    files: tuple[str, ...]
    size: int
    licence: str


Loader: TypeAlias = "Callable[[torch.device, str | None], Reward]"


@dataclass(frozen=True)
class RewardEntry:
    """One row of the table of rewards.

    measures: one sentence. low, high: the values to be expected, not bounds. divisor: training divides the score
    by it, as the published recipe does (26 for PickScore). metadata: the key a prompt's metadata must have, or "".
    extra: the optional dependency (`pip install rtdmd[EXTRA]`), or "". load(device, path): path is a folder or
    hub id that takes the place of the default sources, None for these.
    """

    name: str
    measures: str
    low: float
    high: float
    differentiable: bool
    needs: tuple[Need, ...]
    load: Loader
    divisor: float = 1.0
    metadata: str = ""
    extra: str = ""


def require_metadata(entry: RewardEntry, metadata: Sequence[Metadata]) -> None:
    """DataError, naming the first prompt, if one lacks the key that a reward needs."""
    for number, known in enumerate(metadata, 1):
        if entry.metadata and entry.metadata not in known:
            raise DataError(
                f"The reward {entry.name} needs `{entry.metadata}` for every prompt; prompt {number} has none.",
                "Give the prompts as .jsonl, one object a line with `prompt` and that key, or leave the reward out.",
            )
