"""Uploads an exported folder to the Hugging Face hub: private unless asked otherwise."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from rtdmd_cli.engine.storage.hub import reason
from rtdmd_cli.errors import EnvironmentFailure, UsageError

FAILURES = (OSError, HTTPError, RuntimeError, ValueError)
"""RuntimeError: of its storage (hf_xet); ValueError: a model card that the hub does not take."""


def check_name(repo: str) -> None:
    """UsageError for what can't be a repository's name, with its owner."""
    try:
        validate_repo_id(repo)
        if "/" not in repo:  # the client would make it, and then not find it
            raise HFValidationError("no owner")
    except HFValidationError as error:
        raise UsageError(
            f"`{repo}` can't be the name of a repository.", "Write it as in --push-to-hub USER/NAME."
        ) from error


def check_login(api: HfApi) -> None:
    """EnvironmentFailure where nobody is logged in or the hub can't be reached: known before anything is made."""
    try:
        api.whoami()
    except FAILURES as error:
        raise _failure("The hub can't be used", error, "Nothing was exported yet.") from error


def push(api: HfApi, folder: Path, repo: str, public: bool) -> str:
    """Upload the folder; returns the address.

    EnvironmentFailure where the hub refuses or can't be reached; UsageError for an existing public repository without
    `public`. The folder stays as it is.
    """
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UsageError(
                f"The repository {repo} exists and is public.", "Add --public, or choose another name."
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of rtdmd")
    except FAILURES as error:
        kept = f"The export is in {folder}; upload it alone: hf upload {repo} {folder}"
        raise _failure(f"{repo} could not be uploaded", error, kept) from error
    return str(address)


def _failure(what: str, error: Exception, state: str) -> EnvironmentFailure:
    if isinstance(error, LocalTokenNotFoundError):
        return EnvironmentFailure(f"{what}: nobody is logged in.", f"Run `hf auth login`. {state}")
    if isinstance(error, OfflineModeIsEnabled):
        return EnvironmentFailure(f"{what}: it is switched off.", f"Unset HF_HUB_OFFLINE. {state}")
    return EnvironmentFailure(f"{what}: {reason(error)}", f"Check network, token and name. {state}")
