"""The one way in which a reward's code is called: what it raises, how long it may take, and what it can't change.

A reward may be anyone's code. Whatever it does within a call, the caller gets a tensor of the right shape, or `Failed`.
Its seeds, gradient switches and other settings of torch end with the call, its pictures and metadata are its own copies,
and what it prints goes to stderr.
"""

from __future__ import annotations

import copy
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.rewards.printing import prints_on_stderr
from rtdmd_cli.errors import DataError, RtdmdError, is_device_fault, is_out_of_memory

T = TypeVar("T")
OWN_SECONDS, LISTED_SECONDS, LOAD_SECONDS = 60.0, 600.0, 600.0
"""The longest time for one picture of a reward of the user's own and of one of the table, where nothing else is asked for,
and for building one of the user's own."""
AGAIN = 1.0
"""Seconds between reminders to a call that takes too long and goes on, as code does that catches everything."""


def _matmul_precision() -> str | None:
    """None after a change by torch's newer settings of the same, which this one does not read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (_matmul_precision, torch.set_float32_matmul_precision),
)
"""How what is global in torch is read, and set."""


class Failed(Exception):
    """A call of a reward came to nothing. The text is the reason, to follow "the reward NAME"."""

    @property
    def place(self) -> str:
        """Where its code raised, " (FILE, line N)", or ""."""
        if self.__cause__ is None or isinstance(self.__cause__, TooSlow):
            return ""
        last = traceback.extract_tb(self.__cause__.__traceback__)[-1]
        return f" ({Path(last.filename).name}, line {last.lineno})"


class TooSlow(BaseException):
    """A block took longer than it may. No Exception, which the block might take for one of its own."""


def seconds_of(name: str) -> float:
    """How long a reward of that name may take for one picture, where nobody says otherwise."""
    return OWN_SECONDS if ":" in name else LISTED_SECONDS


def guarded(call: Callable[[], T], seconds: float | None) -> T:
    """What `call` returns; Failed if it raises anything, SystemExit too, or takes longer. seconds: None for any time.

    Passed on: rtdmd's own errors, full memory, a GPU that fails, and Ctrl-C.
    """
    try:
        with _settings_kept(), prints_on_stderr(), time_limit(seconds):
            return call()
    except (RtdmdError, KeyboardInterrupt):
        raise
    except TooSlow as error:
        raise Failed(f"took more than {seconds:g} s") from error
    except BaseException as error:  # a user's own code may raise anything
        if is_out_of_memory(error) or is_device_fault(error):
            raise
        text = " ".join(str(error).split())
        raise Failed(f"raised {type(error).__name__}{f': {text}' if text else ''}") from error


def load_reward(entry: RewardEntry, device: torch.device, path: str | None) -> Reward:
    """The loaded reward. DataError where the code of the user's own raises; other errors as `RewardEntry.load`."""
    try:
        return build_reward(entry, device, path)
    except Failed as failed:
        raise DataError(
            f"The reward {entry.name} can't be built: it {failed}{failed.place}.",
            f"Check it: rtdmd rewards check {entry.name}",
        ) from failed


def build_reward(entry: RewardEntry, device: torch.device, path: str | None) -> Reward:
    """As `load_reward`, but Failed where the code of the user's own raises."""
    if ":" in entry.name:
        return guarded(lambda: entry.load(device, path), LOAD_SECONDS)
    return entry.load(device, path)


def answer(
    reward: Reward, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], seconds: float | None
) -> Tensor:
    """One call without gradient: float32 [n] on the CPU, of images [n,3,H,W] on the reward's device.

    Failed, with the reason, if it raises, takes more than n times `seconds`, or answers something else. It may change
    `images`: give it no tensor that is used again.
    """
    with torch.no_grad():
        given = _call(reward, images, texts, metadata, seconds)
    if given.is_complex():
        raise Failed(f"answered {given.dtype}")
    return given.detach().float().cpu()


def answer_with_gradient(
    reward: Reward, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], seconds: float | None
) -> Tensor:
    """One call [n], on the images' device, with gradient to images [n,3,H,W]. Failed as `answer`, and without gradient.

    Values that are not finite are passed on as they are.
    """
    with torch.enable_grad():
        given = _call(reward, images.clone(), texts, metadata, seconds)
    if not given.is_floating_point():
        raise Failed(f"answered {given.dtype}")
    if images.requires_grad and not given.requires_grad and bool(given.isfinite().all()):
        raise Failed(NO_GRADIENT)
    return given.to(images.device)


NO_GRADIENT = "has no gradient to the pictures, though it says that it is differentiable"


def picture_gradient(
    reward: Reward, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], seconds: float | None
) -> Tensor:
    """The gradient [n,3,H,W] of the scores' sum by images [n,3,H,W]. Failed as `answer_with_gradient`, and if not finite."""
    gradient = scores_and_gradient(reward, images, texts, metadata, seconds)[1]
    if gradient is None:
        raise Failed(NO_GRADIENT)
    if not bool(gradient.isfinite().all()):
        raise Failed("has a gradient to the pictures that is not finite")
    return gradient


def scores_and_gradient(
    reward: Reward, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], seconds: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [n] and the gradient [n,3,H,W] of their sum by images [n,3,H,W]. Failed as `answer_with_gradient`.

    What is not finite is passed on as it is; None for the gradient of such scores that have none.
    """
    own = images.detach().clone().requires_grad_()
    scores = answer_with_gradient(reward, own, texts, metadata, seconds)
    if not scores.requires_grad:  # then they are not finite
        return scores, None

    def backward() -> Tensor | None:
        return torch.autograd.grad(scores.sum(), own, allow_unused=True)[0]

    gradient = guarded(backward, None if seconds is None else seconds * len(images))
    if gradient is None:
        raise Failed(NO_GRADIENT)
    return scores.detach(), gradient


def _call(
    reward: Reward, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], seconds: float | None
) -> Tensor:
    """A tensor [n]; Failed for anything else."""
    count, own = len(images), copy.deepcopy(list(metadata))
    given: object = guarded(
        lambda: reward.score(images, list(texts), own), None if seconds is None else seconds * count
    )
    if not isinstance(given, Tensor):
        raise Failed(f"answered {type(given).__name__}, no tensor")
    if given.shape != (count,):
        raise Failed(f"answered {given.dtype} {list(given.shape)} instead of [{count}]")
    return given


@contextmanager
def _settings_kept() -> Iterator[None]:
    """After the block, seeds and settings are as before it."""
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if value is not None and read() != value:
                write(value)
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TooSlow in the block after that time, at the next step of Python code. Main thread only."""
    if seconds is None:
        yield
        return
    running = True

    def stop(number: int, frame: FrameType | None) -> None:
        if running:
            raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            yield
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
