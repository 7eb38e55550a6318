"""The table of rewards. Each row's loader imports its module only when it is called."""

from __future__ import annotations

from difflib import get_close_matches

from rtdmd_cli.engine.rewards.base import RewardEntry
from rtdmd_cli.errors import UsageError

REWARDS: dict[str, RewardEntry] = {}


def find_reward(name: str) -> RewardEntry:
    """The row of that name. UsageError, with the nearest name, if there is none."""
    if name in REWARDS:
        return REWARDS[name]
    near = get_close_matches(name, REWARDS, n=1)
    raise UsageError(
        f"There is no reward `{name}`.",
        f"Did you mean `{near[0]}`?" if near else "List them: rtdmd rewards list",
    )
