"""Files of a hub repository, by way of the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionResolutionError,
)

from rtdmd_cli.errors import DataError, EnvironmentFailure

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
TRANSFORMER_FILES = ("transformer/*.json", "transformer/*.safetensors")
"""Patterns of a pipeline's files that are its transformer."""
FAILURES = (OSError, HTTPError, HFValidationError, RevisionResolutionError, RuntimeError)
"""What the hub's client raises where it can't deliver; RuntimeError is its storage's (hf_xet), whatever went wrong there."""
AGAIN = "Check network and disk space and try again (where it stays, with HF_HUB_DISABLE_XET=1)"
REFUSED = (401, 403)
TOKEN = "Let your token read gated repositories (https://huggingface.co/settings/tokens), or give another: hf auth login"
_EMPTY = re.compile(r"(\d{3} \w+ Error\.?)?\s*(\(Request ID:.*\))?")
"""A line of the client's messages that says nothing of the cause."""


def hub_file(repository: str, file: str) -> Path:
    """Where `file` of `repository` ("owner/name") lies on disk; it is downloaded if it isn't cached.

    DataError where `repository` is no hub id, EnvironmentFailure where the hub can't deliver.
    """
    _check_id(repository)
    try:
        return Path(hf_hub_download(repository, file))
    except FAILURES as error:
        raise hub_failure(repository, file, error) from error


def hub_folder(repository: str, patterns: Sequence[str], file: str) -> Path:
    """The folder where the files of `repository` that match `patterns` lie; what isn't cached is downloaded.

    Offline it may hold a part of them: check what you need. file: the one that is named in errors, as `hub_file`.
    """
    _check_id(repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except FAILURES as error:
        raise hub_failure(repository, file, error) from error


def _check_id(repository: str) -> None:
    if not re.fullmatch(REPOSITORY, repository):
        raise DataError(f"{repository} is neither a folder nor a hub id.", "Check the path of the reward.")


def told_by_hub(error: Exception) -> Exception:
    """The hub client's own error: `error` itself, or what diffusers wrapped in it; of any other error the cause.

    The client's errors have a cause too, the bare HTTP error, which no longer says whether a licence is to be accepted.
    What the hub refuses, the client at last looks for in its cache: the refusal is the cause of what it doesn't find.
    """
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        return cause
    own = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return error if isinstance(error, own) else cause


def is_refused(error: Exception) -> bool:
    """Whether the hub knows who asks, or that nobody is logged in, and does not allow it."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSED


def reason(error: Exception) -> str:
    """What an error of the client says, in one line: the hub's own words where it sent any."""
    text = str(error)
    if isinstance(error, HfHubHTTPError) and error.server_message:
        text = error.server_message
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if not _EMPTY.fullmatch(line)), type(error).__name__)[:300]


def hub_failure(repository: str, file: str, error: Exception) -> EnvironmentFailure:
    """What an error of the hub's client means, and what to do; `file` is what was asked for."""
    error = told_by_hub(error)
    instead = f"give a folder that holds {file}"
    if isinstance(error, GatedRepoError):
        return EnvironmentFailure(
            f"{repository} is gated: its licence has to be accepted first.",
            f"Accept it on https://huggingface.co/{repository}, then run `hf auth login`.",
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):  # also without any network
        return EnvironmentFailure(
            f"{file} of {repository} is not in the local cache, and the hub can't be reached.",
            f"Check the network and unset HF_HUB_OFFLINE, or {instead}.",
        )
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return EnvironmentFailure(
            f"The hub has no public {file} of {repository}.",
            f"Check the name, run `hf auth login` for a private repository, or {instead}.",
        )
    hint = TOKEN if is_refused(error) else AGAIN
    return EnvironmentFailure(
        f"{file} of {repository} could not be fetched from the hub: {reason(error)}", f"{hint}, or {instead}."
    )
