"""Whether a reward works: pictures whose order is known, the expected range, and a gradient where one is claimed."""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation.probes import Pair, pairs_for
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.rewards.guard import Failed, build_reward, guarded, picture_gradient, seconds_of
from rtdmd_cli.engine.rewards.local import missing
from rtdmd_cli.errors import EnvironmentFailure, RtdmdError, UsageError

SLACK = 1.0
"""How far scores may lie outside of the expected range, in parts of its width: a wrong scale is further off."""


@dataclass(frozen=True)
class CheckResult:
    """What the check of one reward found.

    reason: what is wrong or missing, else "". hint: the next step where something is missing. pairs: how many there
    are; ordered: of how many the better picture got the higher score, None where no order is known. low, high: the
    least and the greatest score. gradient: the greatest absolute derivative by a pixel, None where none is claimed.
    """

    name: str
    status: Literal["passed", "failed", "not available"]
    reason: str = ""
    hint: str = ""
    pairs: int = 0
    ordered: int | None = None
    low: float | None = None
    high: float | None = None
    gradient: float | None = None
    seconds: float = 0.0


class Wrong(Exception):
    """The reward fails its check, for the reason given."""


@dataclass
class Findings:
    """What is known of a reward so far; the fields of CheckResult."""

    pairs: int = 0
    ordered: int | None = None
    low: float | None = None
    high: float | None = None
    gradient: float | None = None


def check_rewards(
    entries: Iterable[RewardEntry],
    device: torch.device,
    path: str | None = None,
    on_start: Callable[[str], None] = lambda name: None,
    seconds: float | None = None,
) -> Iterator[CheckResult]:
    """`check_reward` for one after the other; on_start is told each name. Only one is in memory at a time."""
    for entry in entries:
        on_start(entry.name)
        yield check_reward(entry, device, path, seconds)
        gc.collect()


def check_reward(
    entry: RewardEntry, device: torch.device, path: str | None = None, seconds: float | None = None
) -> CheckResult:
    """Load a reward and try it. It passes if

    - its scores are finite float32 [B] on the device, not all the same, and near the expected range;
    - no worse picture of a pair gets a higher score than the better one, and some get a lower one (not for rewards of
      the user's own, whose order nobody knows);
    - it is differentiable where its row says so, with finite gradients that are not all zero.

    Nothing is downloaded: a reward whose weights aren't here is "not available". path: as for `RewardEntry.load`;
    seconds: the longest time for one picture, 0 for any, None for `guard.seconds_of`.
    UsageError where a reward of the user's own can't be built.
    """
    began = time.monotonic()
    absent = missing(entry) if path is None else []
    if absent:
        reason = " and ".join(each.what for each in absent)
        return CheckResult(entry.name, "not available", reason, absent[0].get)
    findings = Findings()
    try:
        try:
            reward = build_reward(entry, device, path)
        except EnvironmentFailure as error:
            return CheckResult(entry.name, "not available", error.message.rstrip("."), error.hint)
        _try(entry, reward, device, findings, seconds_of(entry.name) if seconds is None else seconds or None)
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return CheckResult(
            entry.name, "failed", _reason(error), **vars(findings), seconds=time.monotonic() - began
        )
    return CheckResult(entry.name, "passed", **vars(findings), seconds=time.monotonic() - began)


def _reason(error: Exception) -> str:
    if isinstance(error, RtdmdError):
        return error.message
    if isinstance(error, Wrong):
        return str(error)
    if isinstance(error, Failed):
        return f"it {error}{error.place}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _try(
    entry: RewardEntry, reward: Reward, device: torch.device, findings: Findings, seconds: float | None
) -> None:
    """Fills in the findings; raises Wrong at the first thing that is wrong."""
    if reward.differentiable != entry.differentiable:
        claims = ["not differentiable", "differentiable"]
        raise Wrong(f"it says it is {claims[reward.differentiable]}, its row {claims[entry.differentiable]}")
    pairs = pairs_for(entry.name)
    findings.pairs = len(pairs)
    better, worse = (_scores(reward, pairs, which, device, seconds) for which in ("better", "worse"))
    _check_range(entry, torch.cat([better, worse]), findings)
    if ":" not in entry.name:
        _check_order(pairs, better, worse, findings)
    if entry.differentiable:
        findings.gradient = _gradient(reward, pairs[0], device, seconds)


def _scores(
    reward: Reward,
    pairs: Sequence[Pair],
    which: Literal["better", "worse"],
    device: torch.device,
    seconds: float | None,
) -> Tensor:
    """[pairs], on the CPU."""
    images = torch.stack([pair.better if which == "better" else pair.worse for pair in pairs]).to(device)
    texts, metadata = [pair.prompt for pair in pairs], [copy.deepcopy(pair.metadata) for pair in pairs]
    limit = None if seconds is None else seconds * len(pairs)
    with torch.no_grad():
        scores = guarded(lambda: reward.score(images, texts, metadata), limit)
    _check_tensor(scores, len(pairs), device)
    return scores.detach().cpu()


def _check_tensor(scores: Tensor, count: int, device: torch.device) -> None:
    if not isinstance(scores, Tensor) or scores.shape != (count,) or scores.dtype != torch.float32:
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise Wrong(f"scores of {count} pictures are {got}, not torch.float32 [{count}]")
    if scores.device.type != device.type:
        raise Wrong(f"scores are on {scores.device.type}, the pictures on {device.type}")
    if not scores.isfinite().all():
        raise Wrong(f"a score is not finite: {_listed(scores)}")


def _check_range(entry: RewardEntry, scores: Tensor, findings: Findings) -> None:
    findings.low, findings.high = float(scores.min()), float(scores.max())
    if findings.low == findings.high:
        raise Wrong(f"every picture scores {findings.low:.4g}")
    slack = SLACK * (entry.high - entry.low)
    if findings.low < entry.low - slack or findings.high > entry.high + slack:
        raise Wrong(
            f"scores from {findings.low:.4g} to {findings.high:.4g} are far from the usual {entry.low:g} to {entry.high:g}"
        )


def _check_order(pairs: Sequence[Pair], better: Tensor, worse: Tensor, findings: Findings) -> None:
    findings.ordered = int((better > worse).sum())
    for pair, good, bad in zip(pairs, better.tolist(), worse.tolist(), strict=True):
        if good < bad:
            raise Wrong(
                f"{pair.prompt!r} scores {good:.4g} for a picture of it and {bad:.4g} for one that is worse"
            )
    if not findings.ordered:
        raise Wrong("no picture scores more than its worse counterpart")


def _gradient(reward: Reward, pair: Pair, device: torch.device, seconds: float | None) -> float:
    """The greatest absolute derivative of the better picture's score by one of its values."""
    images = pair.better[None].to(device)
    size = float(picture_gradient(reward, images, [pair.prompt], [pair.metadata], seconds).abs().max())
    if size == 0:
        raise Wrong("the gradient to the pixels is zero")
    return size


def _listed(scores: Tensor) -> str:
    return ", ".join(f"{score:.4g}" for score in scores.tolist())
