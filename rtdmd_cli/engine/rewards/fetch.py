"""Brings weights into the hub's cache before they are needed: models, and what rewards are made of."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

from rtdmd_cli.config.loader import load_preset, preset_names
from rtdmd_cli.config.places import is_single_file
from rtdmd_cli.config.schema import SHARED_BASE, ModelConfig
from rtdmd_cli.engine.families.table import MODELS
from rtdmd_cli.engine.rewards.base import Need, RewardEntry
from rtdmd_cli.engine.rewards.local import at_hand, cached_files, missing
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.components import weight_files
from rtdmd_cli.engine.storage.hub import FAILURES, REPOSITORY, hub_failure, hub_folder
from rtdmd_cli.errors import EnvironmentFailure, UsageError

MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class Wanted:
    """One thing to have on this machine. source: a hub id, a folder, or a built-in model's name.

    revision: of a model, None for its default branch. part: what of its pipeline. need: what of a reward is needed, None
    for a model.
    """

    kind: Literal["model", "reward"]
    source: str
    revision: str | None = None
    need: Need | None = None
    part: Literal["all", "transformer", "all but the transformer's weights"] = "all"

    @property
    def licence(self) -> str:
        """Its name, or where it can be read."""
        if self.need is not None:
            return self.need.licence
        known = MODELS.get(self.source.lower())
        if known is not None:
            return known.licence.text
        return (
            f"see https://huggingface.co/{self.source}"
            if re.fullmatch(REPOSITORY, self.source)
            else "your own"
        )


@dataclass(frozen=True)
class Fetched:
    """What is on disk now. path: None for what belongs to the package itself; size in bytes; fresh: downloaded now."""

    wanted: Wanted
    path: Path | None
    size: int
    fresh: bool


def find_wanted(name: str) -> list[Wanted]:
    """What a reward's name, a preset's name or file, a hub id or a model folder stands for, in this order.

    EnvironmentFailure for a reward whose package is not installed; UsageError, with the nearest name, for nothing.
    """
    if name in REWARDS:
        return _of_reward(REWARDS[name])
    presets = preset_names()
    if name in presets or name.endswith((".yaml", ".yml")):
        return wanted_of_model(load_preset(name).preset.model)
    if name.startswith("builtin:") or os.path.isdir(name) or re.fullmatch(REPOSITORY, name):
        return [Wanted("model", name)]
    near = get_close_matches(name, [*presets, *REWARDS], n=1)
    raise UsageError(
        f"`{name}` is no reward, no preset, no hub id and no folder.",
        f"Did you mean `{near[0]}`?" if near else "See: rtdmd presets list, rtdmd rewards list",
    )


def wanted_of_model(model: ModelConfig) -> list[Wanted]:
    """The base of a preset, or what belongs to its single file, and the generator's own base where it has one."""
    wanted = [Wanted("model", model.path, model.revision)]
    if is_single_file(model.path):
        rest: Literal["all but the transformer's weights"] = "all but the transformer's weights"
        wanted = [Wanted("model", model.components, model.revision, part=rest)] if model.components else []
    if model.generator_init != SHARED_BASE:
        wanted.append(Wanted("model", model.generator_init, model.generator_revision, part="transformer"))
    return wanted


def _of_reward(entry: RewardEntry) -> list[Wanted]:
    for absent in missing(entry):
        if absent.get.startswith("pip "):
            raise EnvironmentFailure(
                f"The reward {entry.name} needs {absent.what}.", f"Install it: {absent.get}"
            )
    return [Wanted("reward", need.source, None, need) for need in entry.needs]


def fetch(wanted: Wanted) -> Fetched:
    """Have it on this machine; nothing is downloaded where it is.

    EnvironmentFailure where the hub can't deliver it, or delivered it only in part.
    """
    if wanted.need is not None:
        return _fetch_need(wanted, wanted.need)
    if wanted.source.startswith("builtin:"):
        return Fetched(wanted, None, 0, False)
    if os.path.isdir(wanted.source):
        return Fetched(wanted, Path(wanted.source), _size(Path(wanted.source)), False)
    present = cached_model(wanted)
    if present is not None:
        return Fetched(wanted, present, _size(present), False)
    _download_model(wanted)
    present = cached_model(wanted)
    if present is None:
        raise _in_part(wanted.source)
    return Fetched(wanted, present, _size(present), True)


def cached_model(wanted: Wanted) -> Path | None:
    """The folder of a hub model in the local cache, if it is whole; no network.

    A repository holds more than its pipeline: the hub's client calls its copy incomplete where a README is missing.
    """
    try:
        folder = Path(snapshot_download(wanted.source, revision=wanted.revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if is_whole(folder, wanted.part) else None


def is_whole(folder: Path, part: str = "all") -> bool:
    """Whether a pipeline's folder holds every component that its index names, and every weight file of each.

    part: as `Wanted`.
    """
    try:
        if part == "transformer":
            return _component_is_whole(folder / part)
        index = strict_json.read(folder / MODEL_INDEX)
        parts = [
            name for name, kind in index.items() if isinstance(kind, list) and kind and kind != [None, None]
        ]
        if part != "all":
            parts.remove("transformer")
        return bool(parts) and all(_component_is_whole(folder / name) for name in parts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _component_is_whole(folder: Path) -> bool:
    """Tokenizers and schedulers need any file; a network, which has a config.json, its weights in safetensors."""
    if not (folder / "config.json").is_file():
        return any(path.is_file() for path in folder.iterdir())
    weights = weight_files(folder)
    return bool(weights) and all(path.is_file() for path in weights)


def _download_model(wanted: Wanted) -> None:
    from diffusers import DiffusionPipeline  # takes seconds

    from rtdmd_cli.engine.backbones.locating import find_transformer

    if wanted.part == "transformer":
        find_transformer(wanted.source, wanted.revision)
        return
    without = {} if wanted.part == "all" else {"transformer": None}
    try:
        DiffusionPipeline.download(wanted.source, revision=wanted.revision, use_safetensors=True, **without)
        if without:
            hf_hub_download(wanted.source, "transformer/config.json", revision=wanted.revision)
    except (*FAILURES, ValueError) as error:
        raise hub_failure(wanted.source, MODEL_INDEX, error) from error


def _fetch_need(wanted: Wanted, need: Need) -> Fetched:
    if not need.source:
        return Fetched(wanted, None, need.size, False)
    fresh = not at_hand(need)
    if fresh:
        hub_folder(need.source, need.files, need.files[0])
        if not at_hand(need):
            raise _in_part(need.source)
    found = cached_files(need.source)
    highest = min(found, key=lambda name: name.count("/"))
    return Fetched(wanted, found[highest].parent, need.size, fresh)


def _in_part(source: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{source} is only in part in the local cache, and the hub did not deliver the rest.",
        "Check the network, unset HF_HUB_OFFLINE, and try again.",
    )


def _size(folder: Path) -> int:
    """Of all files, links followed, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
