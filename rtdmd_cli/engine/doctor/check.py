"""One line of `rtdmd doctor`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """What was found.

    name: what was looked at; state: FAIL where a command can't work, WARN where a part of them can't; found: one
    line; fix: the command or step that mends it, "" where nothing is to be done; facts: the same for a program.
    """

    name: str
    state: State
    found: str
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def examined(name: str, look: Callable[[], Check]) -> Check:
    """The check; FAIL with the error's own words where looking itself fails.

    Any error is caught: a broken driver or library may raise whatever it likes, and the other lines are wanted then.
    """
    try:
        return look()
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0][:300]
        return Check(
            name, "FAIL", f"{type(error).__name__}: {words}", f"See: RTDMD_DEBUG=1 rtdmd doctor, {name}"
        )
