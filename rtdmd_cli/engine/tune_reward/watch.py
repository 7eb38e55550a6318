"""Whether stage 2 exploits its rewards: a run's measurements against its start and its best one. Plain numbers.

A gain is the mean over some rewards of (now - start) / std, where std is the reward's over the start's pictures, so that
rewards of unlike scales can be compared. The best measurement is that with the greatest gain of the held-out rewards.
The diversity, of few pictures, is uncertain: it is below a limit where it is so by twice its standard error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from rtdmd_cli.config.watch import WatchConfig
from rtdmd_cli.engine.storage.checkpoint import step_name
from rtdmd_cli.engine.tune_reward.measure import Measured

BEFORE, AFTER, WATCH, BEST, STOPPED, LEFT_OUT = (
    "rewards_before",
    "rewards_after",
    "watch",
    "best",
    "stopped",
    "left_out",
)
"""Keys of a run's records: the mean rewards of start and end, what else is remembered of the measurements, the best
checkpoint's epoch, whether the watch ended the run, the number of pictures left out of the training."""
STD_FLOOR = 1e-4


@dataclass(frozen=True)
class Standing:
    """A measurement against the start's. held_out, trained: gains; diversity: a share of the start's; None where
    it was not measured. diversity_error: the share's standard error. The start itself is `Standing(0, 0.0, 0.0, 1.0)`.
    """

    step: int
    held_out: float | None
    trained: float | None
    diversity: float | None
    diversity_error: float = 0.0


START = Standing(0, 0.0, 0.0, 1.0)


def begin_watch(records: dict[str, Any], start: Measured) -> None:
    """Remember the measurement of the start."""
    records[BEFORE] = start.means
    records[WATCH] = {
        "stds": start.stds,
        "features": start.features,
        "prompts": start.prompts,
        "diversities": list(start.diversities),
    }


def standing(step: int, now: Measured, records: Mapping[str, Any], weights: Mapping[str, float]) -> Standing:
    """weights: of the rewards trained on; the other measured ones are held out, with equal weights."""
    before, watch = records[BEFORE], records[WATCH]
    gains = {
        name: (value - before[name]) / (watch["stds"][name] + STD_FLOOR) for name, value in now.means.items()
    }
    held_out = {name: 1.0 for name in gains if name not in weights}
    trained = {name: weight for name, weight in weights.items() if name in gains}
    share, error = share_of_diversity(now.diversities, watch.get("diversities", ()))
    return Standing(step, _mean(gains, held_out), _mean(gains, trained), share, error)


def share_of_diversity(now: Sequence[float], start: Sequence[float]) -> tuple[float | None, float]:
    """The ratio of the means, of the same prompts one by one, and its standard error.

    None where the start has none: no picture features, or a run that was begun by a version without them.

    The error is the usual one of a ratio of paired samples (Cochran, Sampling Techniques, 2.11), 0 for one prompt.
    """
    if not start:
        return None, 0.0
    mean = max(fmean(start), STD_FLOOR)
    share = fmean(now) / mean
    rest = [after - share * before for after, before in zip(now, start, strict=True)]
    return share, (stdev(rest) / math.sqrt(len(rest)) / mean if len(rest) > 1 else 0.0)


def _mean(gains: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    total = sum(weights.values())
    return sum(weight * gains[name] for name, weight in weights.items()) / total if total else None


def passed_limits(now: Standing, best: Standing, config: WatchConfig) -> list[str]:
    """What is past its limit while the rewards trained on rose, each as half a sentence; empty where all is well.

    best: the best measurement so far, the start among them. The held-out rewards are compared with that, the diversity
    with the start.
    """
    found: list[str] = []
    if now.trained is None:
        return found
    if now.held_out is not None and best.held_out is not None and best.trained is not None:
        fall = best.held_out - now.held_out
        if fall > config.max_held_out_fall and now.trained > best.trained:
            since = f"epoch {best.step}" if best.step else "the start"
            found.append(
                f"the held-out ones fell by {fall:.2g} standard deviations since {since} "
                f"(limit {config.max_held_out_fall:g})"
            )
    low = now.diversity is not None and now.diversity + 2 * now.diversity_error < config.min_diversity
    if low and now.trained > 0:
        found.append(
            f"the diversity fell to {now.diversity:.0%} of the start's, give or take {2 * now.diversity_error:.0%} "
            f"(limit {config.min_diversity:.0%})"
        )
    return found


def watch(records: dict[str, Any], now: Standing, config: WatchConfig) -> str:
    """Take a measurement into the records; a sentence, begun small, where it is past a limit, else "".

    The best measurement after the start is remembered, and its epoch under BEST, whose checkpoint is kept.
    """
    memory = records[WATCH]
    own = Standing(**memory["best"]) if "best" in memory else None
    peak = own if own and (own.held_out or 0.0) > 0 else START
    found = passed_limits(now, peak, config)
    if now.held_out is not None and (own is None or now.held_out > (own.held_out or 0.0)):
        memory["best"], records[BEST] = asdict(now), now.step
    if not found:
        return ""
    text = f"the rewards trained on rose while {' and '.join(found)}: the generator may be exploiting them."
    earlier = memory.get("alarm", {"first": now.step, "count": 0})
    memory["alarm"] = {"first": earlier["first"], "count": earlier["count"] + 1, "text": text}
    return text


def advice(records: Mapping[str, Any]) -> str:
    """Which checkpoint is best by the held-out rewards, in a sentence; "" without such a measure."""
    if BEST not in records:
        return ""
    best = Standing(**records[WATCH]["best"])
    text = f"The best checkpoint by the held-out rewards is {step_name(best.step)}, which is kept"
    if (best.held_out or 0.0) <= 0:
        return f"{text}; the generator of stage 1 was no worse by them."
    return f"{text}."


def alarm(records: Mapping[str, Any]) -> str:
    """What the watch found last, and since when; "" where nothing was past a limit."""
    found = records.get(WATCH, {}).get("alarm")
    if not found:
        return ""
    count = f", in {found['count']} measurements" if found["count"] > 1 else ""
    return f"From epoch {found['first']} on{count}: {found['text']}"
