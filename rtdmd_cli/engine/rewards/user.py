"""Rewards of the user's own: `module:Class` stands for a class with the protocol of `base.Reward`.

    class Redness:
        differentiable = True

        def score(self, images, prompts, metadata):
            return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

in redness.py of the current directory, or in any installed module, is the reward `redness:Redness`. A class whose
constructor has a parameter `device`, or needs exactly one argument, is given the device, else nothing.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtdmd_cli.engine.rewards.base import Reward, RewardEntry
from rtdmd_cli.engine.rewards.printing import prints_on_stderr
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
SIGNATURE = "score(images, prompts, metadata)"


def user_entry(name: str) -> RewardEntry:
    """The row of a reward of the user's own; imports its module, without building the class.

    Its expected range is unbounded. UsageError where the module or class is missing, or the class lacks what
    `base.Reward` asks for.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            f"`{name}` names no reward: one of your own is written module:Class.",
            "Example: my_rewards:Redness for the class Redness in my_rewards.py.",
        )
    cls = _class(name, found[1], found[2])
    differentiable = inspect.getattr_static(cls, "differentiable", None)
    if not isinstance(differentiable, bool):
        raise UsageError(
            f"`{name}` does not say whether it is differentiable.",
            f"Write `differentiable = True` or False into the class {found[2]}.",
        )
    if not callable(inspect.getattr_static(cls, "score", None)):
        raise UsageError(f"`{name}` has no method `score`.", f"Give the class {found[2]} a {SIGNATURE}.")

    def load(device: torch.device, path: str | None) -> Reward:
        return _build(name, cls, device, path)

    words = (cls.__doc__ or "").strip().split("\n")[0]
    return RewardEntry(
        name=name,
        measures=words or "A reward of your own.",
        low=-math.inf,
        high=math.inf,
        differentiable=differentiable,
        needs=(),
        load=load,
    )


def _class(name: str, module: str, cls: str) -> type:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides an installed module
    try:
        with prints_on_stderr():
            loaded = import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of a script that ends with sys.exit(), say
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        raise UsageError(
            f"`{name}` can't be imported: {type(error).__name__}: {error}.",
            f"Run it where {module.split('.')[0]}.py is, or install the package that holds it."
            if absent
            else f"See where: python -c 'import {module}'",
        ) from error
    found = vars(loaded).get(cls)
    if not isinstance(found, type):
        classes = [key for key, value in vars(loaded).items() if isinstance(value, type)]
        known = f"It has {', '.join(classes)}." if classes else "It has no class at all."
        raise UsageError(f"The module `{module}` has no class `{cls}`.", known)
    return found


def _build(name: str, cls: type, device: torch.device, path: str | None) -> Reward:
    """An instance, checked. What its own constructor raises is passed on."""
    if path is not None:
        raise UsageError(f"`{name}` takes no path.", "Let the class find its own files.")
    reward: Any = _call(name, cls, device)
    try:
        inspect.signature(reward.score).bind([], [], [])
    except TypeError as error:
        raise UsageError(
            f"`score` of `{name}` doesn't take three arguments: {error}.", f"Write {SIGNATURE}."
        ) from error
    built: Reward = reward
    if built.differentiable is not inspect.getattr_static(cls, "differentiable"):
        raise UsageError(
            f"`{name}` says of itself that `differentiable` is {built.differentiable!r}; its class says otherwise.",
            "Say it in the class alone.",
        )
    return built


def _call(name: str, cls: type, device: torch.device) -> Any:
    """An instance: built with the device if its constructor takes one."""
    signature = inspect.signature(cls)
    parameters = signature.parameters
    needed = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    by_name = {"device": device} if "device" in parameters else {}
    by_place = [device] if len(needed) == 1 and not by_name else []
    try:
        bound = signature.bind(*by_place, **by_name)
    except TypeError as error:
        raise UsageError(
            f"`{name}` can't be built: {error}.", "Its class is called with the device, or with nothing."
        ) from error
    return cls(*bound.args, **bound.kwargs)
