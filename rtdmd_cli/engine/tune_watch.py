"""Whether stage 2 exploits its rewards: a run's measurements against its start and its best one. Plain numbers.

A gain is the mean over some rewards of (now - start) / std, std that of the reward over the start's pictures, so that
rewards of unlike scales can be compared. The best measurement is that with the greatest gain of the held-out rewards.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rtdmd_cli.config.watch import WatchConfig
from rtdmd_cli.engine.runtime.checkpoint import step_name
from rtdmd_cli.engine.tune_measure import Measured

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
    it was not measured. The start itself is `Standing(0, 0.0, 0.0, 1.0)`."""

    step: int
    held_out: float | None
    trained: float | None
    diversity: float | None


START = Standing(0, 0.0, 0.0, 1.0)


def begin_watch(records: dict[str, Any], start: Measured) -> None:
    """Remember the measurement of the start."""
    records[BEFORE] = start.means
    records[WATCH] = {"stds": start.stds, "features": start.features, "prompts": start.prompts}


def standing(step: int, now: Measured, records: Mapping[str, Any], weights: Mapping[str, float]) -> Standing:
    """weights: of the rewards trained on; the other measured ones are held out, with equal weights."""
    before, watch = records[BEFORE], records[WATCH]
    gains = {
        name: (value - before[name]) / (watch["stds"][name] + STD_FLOOR) for name, value in now.means.items()
    }
    held_out = {name: 1.0 for name in gains if name not in weights}
    trained = {name: weight for name, weight in weights.items() if name in gains}
    diversity = watch["features"].get("diversity")
    return Standing(
        step,
        _mean(gains, held_out),
        _mean(gains, trained),
        now.features["diversity"] / max(diversity, STD_FLOOR) if diversity is not None else None,
    )


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
    if now.diversity is not None and now.diversity < config.min_diversity and now.trained > 0:
        found.append(
            f"the diversity fell to {now.diversity:.0%} of the start's (limit {config.min_diversity:.0%})"
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
