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
)

from rtdmd_cli.errors import DataError, EnvironmentFailure

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
TRANSFORMER_FILES = ("transformer/*.json", "transformer/*.safetensors")
"""Patterns of a pipeline's files that are its transformer."""


def hub_file(repository: str, file: str) -> Path:
    """Where `file` of `repository` ("owner/name") lies on disk; it is downloaded if it isn't cached.

    DataError where `repository` is no hub id, EnvironmentFailure where the hub can't deliver.
    """
    _check_id(repository)
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, HTTPError, HFValidationError) as error:
        raise hub_failure(repository, file, error) from error


def hub_folder(repository: str, patterns: Sequence[str], file: str) -> Path:
    """The folder where the files of `repository` that match `patterns` lie; what isn't cached is downloaded.

    Offline it may hold a part of them: check what you need. file: the one that is named in errors, as `hub_file`.
    """
    _check_id(repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, HTTPError, HFValidationError) as error:
        raise hub_failure(repository, file, error) from error


def _check_id(repository: str) -> None:
    if not re.fullmatch(REPOSITORY, repository):
        raise DataError(f"{repository} is neither a folder nor a hub id.", "Check the path of the reward.")


def told_by_hub(error: Exception) -> Exception:
    """The hub client's own error: `error` itself, or what diffusers wrapped in it; of any other error the cause.

    The client's errors have a cause too, the bare HTTP error, which no longer says whether a licence is to be accepted.
    """
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    own = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return error if isinstance(error, own) else cause


def hub_failure(repository: str, file: str, error: Exception) -> EnvironmentFailure:
    """What an error of the hub's client means, and what to do; `file` is what was asked for."""
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
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return EnvironmentFailure(
        f"{file} of {repository} could not be fetched from the hub: {reason}",
        f"Check network and disk space and try again, or {instead}.",
    )
