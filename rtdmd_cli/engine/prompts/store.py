"""Where a public set of prompts lies on this machine, and how it gets there.

<cache>/data/<name>/<file>         as published, whole or not at all
                    .source.json   url, sha256, size, whether the sha256 was pinned, and whether it is a person's own file
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants

from rtdmd_cli.engine.prompts.geneval_train import (
    Requirement,
    as_text,
    training_requirements,
    validation_requirements,
)
from rtdmd_cli.engine.prompts.public_sets import DataSet
from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

RECORD = ".source.json"
MAX_BYTES = 100_000_000  # of a set; the largest known one has less than a tenth of it
TIMEOUT = 30.0  # seconds without an answer
POINTER = b"version https://git-lfs.github.com/spec/"
"""Begins what a server sends in the place of a file that is kept in Git LFS."""


class Prompts(Protocol):
    """What the prompts of a set are read as."""

    @property
    def texts(self) -> Sequence[str]:
        """The prompts, in their order."""
        ...


@dataclass(frozen=True)
class Stored:
    """A set on disk. sha256: of its file; fresh: whether it has only now been put there. own: whether it was taken from a
    person's file that could not be told to be the published set."""

    data: DataSet
    path: Path
    sha256: str
    fresh: bool = False
    own: bool = False

    @property
    def pinned(self) -> bool:
        """Whether the sha256 is a known one; else it is the one that was found at the first download."""
        return self.sha256 in self.data.accepted


def folder(data: DataSet) -> Path:
    """The set's own folder; it may not exist."""
    return files.cache_folder("data") / data.name


def command(data: DataSet, file: bool = False) -> str:
    """The command that brings a set; file: from a file at hand."""
    return f"rtdmd data fetch {data.name}" + (" --file FILE" if file else "")


def stored(data: DataSet) -> Stored | None:
    """The set, read through and checked; None if it isn't there, or is made here and not as it is now.

    DataError if it is not what was put there.
    """
    path = folder(data) / data.file
    if not path.is_file():
        return None
    with os_errors(path, "read"):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found not in data.accepted and not data.url:
        return None  # of another version of this program: it is made anew where it is asked for
    if found not in (data.accepted or (_recorded(data),)):
        raise DataError(
            f"{path} is damaged: its sha256 is another.", f"Fetch it again: {command(data)} --force"
        )
    return Stored(data, path, found, own=bool(_record(data).get("own")))


def require(data: DataSet) -> Stored:
    """The set. EnvironmentFailure, with the command that brings it, if it isn't there."""
    found = stored(data)
    if found is None:
        raise EnvironmentFailure(
            f"The prompt set {data.name} is not on this machine.", f"Fetch it: {command(data)}"
        )
    return found


def made_here(data: DataSet) -> list[Requirement]:
    """The prompts of a set without a url, each with its requirement."""
    return validation_requirements() if data.use == "validation" else training_requirements()


def fetch(
    data: DataSet, check: Callable[[Stored], Prompts], file: Path | None = None, force: bool = False
) -> Stored:
    """Bring a set into the cache: from `file`, from the network, or made here; one that is there is left alone.

    check: reads the set before it is put in place, and raises what it finds wrong. force: bring it anew.
    EnvironmentFailure where the network doesn't deliver, saying what to place where; DataError
    where what came is not the set, and the cache is as before.
    """
    if not force:
        present = stored(data)
        if present is not None:
            return present
    if file is not None:
        content = _read(file)
    elif not data.url:
        content = as_text(made_here(data)).encode()
    else:
        content = _download(data)
    origin = str(file) if file else data.url or "made here"
    return _install(data, content, origin, check, given=file is not None)


def recognised(data: DataSet, texts: Sequence[str]) -> bool:
    """Whether prompts are those of a set, by what is known of it without a pinned sum: number, first and last one."""
    ends = tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in (texts[0], texts[-1]))
    return data.prompts in (None, len(texts)) and data.ends is not None and ends == data.ends


def _install(
    data: DataSet, content: bytes, origin: str, check: Callable[[Stored], Prompts], given: bool
) -> Stored:
    """Check a set's content and make it the cached one."""
    found = hashlib.sha256(content).hexdigest()
    if data.accepted and found not in data.accepted:
        raise DataError(
            f"{origin} is not the prompt set {data.name}: its sha256 is {found}, not {data.sha256}.",
            "It is another version, or damaged; nothing was changed.",
        )
    final = folder(data)
    files.remove_leftovers(final.parent, name=final.name)
    with files.building(final) as temporary:
        files.write_bytes(temporary / data.file, content)
        prompts = check(Stored(data, temporary / data.file, found))
        known = bool(data.accepted) or recognised(data, prompts.texts)
        if not (given or known or data.ends is None):
            raise _other(data, origin, content)
        own = given and not known
        record = {"url": data.url, "sha256": found, "size": len(content), "pinned": bool(data.accepted)}
        record["own"] = own
        files.write_json(temporary / RECORD, record)
        files.replace_folder(temporary, final)
    return Stored(data, final / data.file, found, fresh=True, own=own)


def _other(data: DataSet, origin: str, content: bytes) -> DataError:
    """Of a download without a pinned sum that is not the set."""
    reason = "its first and last prompt are others"
    if content.startswith(POINTER):
        reason = "it is a pointer of Git LFS, which stands for the file"
    return DataError(
        f"{origin} is not the prompt set {data.name}: {reason}.",
        f"Nothing was changed. Get the file in another way, then: {command(data, file=True)}",
    )


def _recorded(data: DataSet) -> str:
    """The sha256 that was found when the set was fetched, "" if that is lost."""
    return str(_record(data).get("sha256", ""))


def _record(data: DataSet) -> dict[str, Any]:
    """What was noted when the set was fetched; nothing if that is lost."""
    try:
        found = strict_json.read(folder(data) / RECORD)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(f"There is no file {file}.", "Check the path.")
    with os_errors(file, "read"):
        return file.read_bytes()


def _download(data: DataSet) -> bytes:
    """The bytes that the set's server sends; it is trusted as the hub is: not every Python knows its system's authorities."""
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(data, "HF_HUB_OFFLINE is set")
    from httpx2 import create_ssl_context  # the hub's client is made of it; slow to import

    request = urllib.request.Request(data.url, headers={"User-Agent": "rtdmd"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=create_ssl_context()) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
            announced = answer.headers.get("Content-Length")
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(data, _reason(error)) from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{data.url} sends more than {MAX_BYTES:,} bytes.", "It can't be a prompt set.")
    if announced is not None and announced != str(len(content)):  # which a bounded read does not notice
        raise _unreachable(data, f"it broke off after {len(content):,} of {announced} bytes")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _unreachable(data: DataSet, reason: str) -> EnvironmentFailure:
    which = f"sha256 {data.sha256}" if data.sha256 else "its sha256 is not pinned yet"
    return EnvironmentFailure(
        f"The prompt set {data.name} could not be fetched from {data.url}: {reason}.",
        f"Get that file on another machine ({which}), then: {command(data, file=True)}; it goes to "
        f"{os.path.join(folder(data), data.file)}.",
    )
