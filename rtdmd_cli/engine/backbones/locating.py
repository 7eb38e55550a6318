"""Where the weights lie: folders, single files, and what the hub has to deliver first."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rtdmd_cli.config.places import is_single_file, where_to_look
from rtdmd_cli.config.schema import SHARED_BASE, ModelConfig
from rtdmd_cli.engine.backbones.layout import Layout, Sources, first_line, pass_on_machine_faults
from rtdmd_cli.engine.backbones.single_file import DAMAGED, refuse_lora, refuse_other_kinds
from rtdmd_cli.engine.storage.hub import (
    AGAIN,
    FAILURES,
    TOKEN,
    TRANSFORMER_FILES,
    is_refused,
    reason,
    told_by_hub,
)
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

BUILTIN = {"builtin:shapes": "shapes/weights/sd3"}  # folder inside the package


def locate(layout: Layout, config: ModelConfig) -> Sources:
    """Find the folders and files that `config` names; what the hub has and this machine lacks is downloaded.

    Errors as `load_pipeline`, but nothing is read yet.
    """
    generator = None
    if config.generator_init != SHARED_BASE:
        generator = find_transformer(config.generator_init, config.generator_revision)
    if not is_single_file(config.path):
        return Sources(find_folder(layout, config.path, config.revision), None, generator)
    file = Path(config.path).expanduser()
    if file.is_file():
        try:
            refuse_lora(file)
        except DAMAGED as error:
            pass_on_machine_faults(error)
            raise DataError(f"{file} can't be read: {first_line(error)}", "Fetch the file again.") from error
    else:
        raise DataError(f"There is no model file {config.path}.", where_to_look("model.path", config.path))
    if config.components is None:
        raise UsageError(
            f"{config.path} holds a transformer, and nothing says where the rest of the model is.",
            "Name the model it was tuned from, as in --set model.components=FOLDER_OR_HUB_ID",
        )
    rest = find_folder(layout, config.components, config.revision, "model.components", transformer=False)
    return Sources(rest, file, generator)


def find_folder(
    layout: Layout, path: str, revision: str | None, key: str = "model.path", transformer: bool = True
) -> Path:
    """The folder that holds a pipeline; downloads what is missing of a hub model. Errors as `load_pipeline`.

    key: the preset's key that names it. transformer: False to leave out the transformer's weights.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UsageError(f"There is no built-in model {path}.", f"Built in: {', '.join(BUILTIN)}.")
        return Path(str(files("rtdmd_cli"))) / BUILTIN[path]

    def download(cached: bool) -> str:
        where: dict[str, Any] = {"revision": revision, "local_files_only": cached}
        if transformer:
            return str(layout.pipeline.download(path, use_safetensors=True, **where))
        there = layout.pipeline.download(path, use_safetensors=True, transformer=None, **where)
        hf_hub_download(path, "transformer/config.json", **where)
        return str(there)

    return _folder_or_download(path, revision, key, download)


def find_transformer(path: str, revision: str | None) -> Path:
    """The folder whose `transformer/` is the generator's own base; of a hub model only that is downloaded."""

    def download(cached: bool) -> str:
        patterns = list(TRANSFORMER_FILES)
        return snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=cached)

    folder = _folder_or_download(path, revision, "model.generator_init", download)
    if not (folder / "transformer/config.json").is_file():
        raise DataError(f"The folder {folder} lacks transformer/config.json.", "Check model.generator_init.")
    return folder


def _folder_or_download(path: str, revision: str | None, key: str, download: Callable[[bool], str]) -> Path:
    """download: of a hub model, its folder; True for what is in the cache alone."""
    refuse_other_kinds(path, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise DataError(f"There is no model folder {path}.", where_to_look(key, path))
    try:
        return _downloaded(download)
    except FAILURES as error:
        raise _hub_failure(path, revision, key, error) from error


def _downloaded(download: Callable[[bool], str]) -> Path:
    """As it says; where the hub gives no answer, from the cache: diffusers looks there where it can't connect, but not
    where a connection takes too long."""
    try:
        return Path(download(False))
    except HTTPError as error:
        if not isinstance(error, HfHubHTTPError):
            with suppress(OSError):
                return Path(download(True))
        raise


def _hub_failure(path: str, revision: str | None, key: str, error: Exception) -> EnvironmentFailure:
    """What went wrong with the hub and what to do about it."""
    cause = told_by_hub(error)
    if isinstance(cause, GatedRepoError):
        return EnvironmentFailure(
            f"The model {path} is gated: its licence has to be accepted first.",
            f"Accept it on https://huggingface.co/{path}, then run `hf auth login`.",
        )
    if isinstance(cause, RepositoryNotFoundError):
        return EnvironmentFailure(
            f"There is no folder {path} here, and no public model of that name on the hub.",
            f"Check {key}; for a private model run `hf auth login`.",
        )
    if isinstance(cause, RevisionNotFoundError):
        return EnvironmentFailure(
            f"The model {path} has no revision {revision}.", f"Check {_revision_key(key)}."
        )
    if isinstance(cause, LocalEntryNotFoundError):
        return EnvironmentFailure(
            f"The model {path} is not in the local cache, and the hub can't be reached.",
            f"Check the network, unset HF_HUB_OFFLINE, or set {key} to a folder that holds the model.",
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return EnvironmentFailure(
            f"The model {path} is not in the local cache, and the hub is switched off.",
            f"Unset HF_HUB_OFFLINE, or set {key} to a folder that holds the model.",
        )
    hint = TOKEN if is_refused(cause) else AGAIN
    return EnvironmentFailure(
        f"The model {path} could not be fetched from the hub: {reason(cause)}",
        f"{hint}, or set {key} to a folder that holds the model.",
    )


def _revision_key(key: str) -> str:
    return "model.generator_revision" if key == "model.generator_init" else "model.revision"
