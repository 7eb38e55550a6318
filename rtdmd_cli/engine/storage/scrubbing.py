"""What is written to be shared names nobody: no token, no home path. Applied where a file is written, whatever it says."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{8,}")
_SECRET = re.compile(r"(?i)((?:token|api[_-]?key|secret|password)=)\S+")
_SECRET_OPTION = re.compile(r"(?i)-[\w.-]*(?:token|api[_-]?key|secret|password)")
_PICTURE = re.compile(r"(data:image/[a-z]+;base64,[A-Za-z0-9+/=]*)")


def scrub_text(text: str) -> str:
    """Any text with tokens replaced by `<token>` and the home path by `~`."""
    text = encodable(text)
    for name in TOKEN_VARIABLES:
        if os.environ.get(name):
            text = text.replace(os.environ[name], "<token>")
    text = _SECRET.sub(r"\1<token>", _TOKEN.sub("<token>", text))
    for home in _homes():
        if len(home) > 1:
            text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    return text


def _homes() -> set[str]:
    """The user's home as it is named and where it lies; nothing for a user without one, as in a container."""
    try:
        home = Path.home()
    except RuntimeError:
        return set()
    return {str(home), os.path.realpath(home)}


def scrub_page(text: str) -> str:
    """As `scrub_text`, for HTML: pictures inside it are left as they are."""
    return "".join(
        part if number % 2 else scrub_text(part) for number, part in enumerate(_PICTURE.split(text))
    )


def scrub_values(value: Any) -> Any:
    """JSON values with every text as `scrub_text` gives it."""
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, Mapping):
        return {key: scrub_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_values(each) for each in value]
    return value


def scrub(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with tokens, home path, user and host name replaced by marks in angle brackets or `~`."""
    names = {name: mark for name, mark in ((_user(), "<user>"), (platform.node(), "<host>")) if name}
    cleaned = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        text = "<token>" if _SECRET_OPTION.fullmatch(before) else scrub_text(argument)
        for name, mark in names.items():
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", mark, text)
        cleaned.append(text)
    return cleaned


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no name for this user id
        return ""


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: bytes that were no UTF-8 on the command line are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
