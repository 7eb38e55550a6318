"""Rewards of a training in several processes: each scores its own images, and all know all scores."""

from dataclasses import replace

from torch import Tensor

from rtdmd_cli.engine.compute.processes import Processes
from rtdmd_cli.engine.rewards.scoring import Scores, Unjudged
from rtdmd_cli.errors import RewardFailure


def gathered(processes: Processes, prompts: Tensor, own: Scores) -> Scores:
    """The scores of all processes' images; prompts [N]: their prompts' indices.

    Why an image of another process could not be judged is known there alone.
    """
    if processes.count == 1:
        return own
    rewards = {name: processes.gather(values) for name, values in own.rewards.items()}
    mine = processes.part(len(prompts))
    others = tuple(
        Unjudged(name, row, int(prompts[row]) + 1, "", "gave no number in another process")
        for name, values in rewards.items()
        for row in (~values.isfinite()).nonzero().flatten().tolist()
        if row not in mine
    )
    return Scores(rewards, own.unjudged + others)


def require_work(processes: Processes, rows: Tensor, count: int) -> None:
    """RewardFailure, in all processes alike, if one of them has none of the images `rows` of `count`."""
    wanted = set(rows.tolist())
    for index in range(processes.count):
        if wanted.isdisjoint(replace(processes, index=index).part(count)):
            raise RewardFailure(
                f"No picture of process {index} got a reward.", "Go on with --resume and fewer processes."
            )
