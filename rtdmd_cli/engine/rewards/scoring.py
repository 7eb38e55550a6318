"""What rewards say of pictures, and of which pictures they say nothing that can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd_cli.engine.compute.device import within_memory
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards.base import Reward
from rtdmd_cli.engine.rewards.guard import Failed, answer
from rtdmd_cli.errors import RewardFailure

SCORE_BATCH = 64
"""Pictures a reward sees at once."""
NOT_ASKED = "was not asked any more"


@dataclass(frozen=True)
class Limits:
    """What a reward may cost. max_share: of the pictures that may go unjudged, 0 to below 1; seconds: the longest time
    for one picture, None for any."""

    max_share: float = 0.1
    seconds: float | None = 60.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Unjudged:
    """A picture that a reward gave no finite number. row: among the pictures; prompt: its number from 1."""

    reward: str
    row: int
    prompt: int
    text: str
    reason: str

    def __str__(self) -> str:
        return f"the reward {self.reward} {self.reason} for prompt {self.prompt} ({self.text!r})"


@dataclass(frozen=True)
class Scores:
    """rewards: name -> float32 [N] on the CPU, undivided, nan for a picture that is among `unjudged`."""

    rewards: dict[str, Tensor]
    unjudged: tuple[Unjudged, ...] = ()

    def judged(self) -> Tensor:
        """Rows [n], rising, of the pictures that every reward gave a finite number."""
        finite = torch.stack([values.isfinite() for values in self.rewards.values()])
        return finite.all(dim=0).nonzero().flatten()


def require_judged(scores: Scores, max_share: float, where: str, tell: Callable[[str], None]) -> Tensor:
    """The rows [n] to go on with: those that every reward judged. `tell` is given a line for each that is left out.

    where: "epoch 3", for these lines. RewardFailure if more than `max_share` (0 to below 1) of the pictures are
    left out.
    """
    for each in scores.unjudged:
        tell(f"{where}: {each}; the picture is left out")
    rows, count = scores.judged(), len(next(iter(scores.rewards.values())))
    left_out = count - len(rows)
    if left_out > max_share * count:
        first = scores.unjudged[0]
        raise RewardFailure(
            f"{left_out} of {count} pictures got no reward in {where}, more than `tune_reward.max_bad_share` "
            f"({max_share:g}): {first}.",
            f"Check it, then go on with --resume: rtdmd rewards check {first.reward}",
        )
    return rows


def score_all(
    name: str,
    reward: Reward,
    device: torch.device,
    images: Tensor,
    prompts: PromptSet,
    numbers: Sequence[int],
    limits: Limits,
) -> tuple[Tensor, list[Unjudged]]:
    """A reward [N] of images [N,3,H,W] (nan where it fails), and its failures.

    A batch that is not answered properly is given to the reward once more, picture by picture, to find those at fault,
    until there are more than may be. numbers: of the prompts, from 1. Where the memory is full, it is given half as many.
    Errors that are no picture's fault are passed on: rtdmd's own, and memory that one picture fills.
    """

    def ask(rows: list[int]) -> Tensor:
        part, chosen = images[rows].to(device), prompts.pick(rows)  # a copy of the pictures
        return answer(reward, part, chosen.texts, chosen.metadata, limits.seconds)

    def ask_within_memory(rows: list[int]) -> Tensor:
        def parts(size: int) -> Tensor:
            return torch.cat([ask(rows[start : start + size]) for start in range(0, len(rows), size)])

        return within_memory(parts, len(rows), device)

    values, reasons = torch.full((len(images),), torch.nan), dict[int, str]()
    for start in range(0, len(images), SCORE_BATCH):
        rows = list(range(start, min(start + SCORE_BATCH, len(images))))
        try:
            values[rows] = ask_within_memory(rows)
        except Failed:
            for row in rows:
                try:
                    if len(reasons) > limits.max_share * len(images):
                        raise Failed(NOT_ASKED)
                    values[row] = ask([row])[0]
                except Failed as failed:
                    reasons[row] = str(failed)
    for row in (~values.isfinite()).nonzero().flatten().tolist():
        reasons.setdefault(row, f"answered {float(values[row]):g}")
    values = values.where(values.isfinite(), torch.nan)
    return values, [
        Unjudged(name, row, numbers[row], prompts.texts[row], reason)
        for row, reason in sorted(reasons.items())
    ]
