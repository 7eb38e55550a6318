"""The paths of a preset, made independent of the folder that a command is started in. No torch."""

import os
from pathlib import Path
from typing import Any

from rtdmd_cli.config.loader import Resolved, preset_sha256
from rtdmd_cli.config.schema import Preset

PATHS = {
    "model": ("path", "components", "generator_init"),
    "distill": ("prompts",),
    "tune_reward": ("prompts", "eval_prompts"),
}
"""Section -> its keys that may name a file or a folder."""
MOVABLE = frozenset(f"{section}.{key}" for section, keys in PATHS.items() for key in keys)
"""The same keys, with their sections. What they name is known by its contents, which a run compares when it goes on."""
SINGLE_FILES = (".safetensors", ".sft")
"""Endings, in small letters, of a `model.path` that is one file of weights."""


def with_whole_paths(resolved: Resolved) -> Resolved:
    """The same with `located` of its preset."""
    preset = located(resolved.preset)
    return Resolved(preset, resolved.sources, preset_sha256(preset))


def located(preset: Preset) -> Preset:
    """Every path that is there as a whole one, so that a run finds it from any folder; names are left as they are.

    A relative path that does not exist, a hub id, `builtin:` and `data:` names stay. So do names in `tune_reward.rewards`:
    a reward of one's own is a module.
    """
    changes: dict[str, Any] = {}
    for section, keys in PATHS.items():
        own = {"model": preset.model, "distill": preset.distill, "tune_reward": preset.tune_reward}[section]
        values = own.model_dump()
        changes[section] = own.model_copy(update={key: whole(values[key]) for key in keys})
    tune = changes["tune_reward"]
    pairs = (text.partition("=") for text in tune.reward_paths)
    paths = tuple(f"{name}={whole(path)}" for name, _, path in pairs)
    watch = tune.watch.model_copy(update={"features": whole(tune.watch.features)})
    changes["tune_reward"] = tune.model_copy(update={"reward_paths": paths, "watch": watch})
    return preset.model_copy(update=changes)


def whole(path: str | None) -> str | None:
    """A path with its folders from the root, if it is there; anything else as it is."""
    if path is None or not Path(path).expanduser().exists():
        return path
    return os.path.abspath(Path(path).expanduser())


def is_single_file(path: str) -> bool:
    """Whether `model.path` names a file of weights."""
    return path.lower().endswith(SINGLE_FILES)


def is_gone(path: str | None) -> bool:
    """Whether it is a path from the root at which nothing is any more, as after a move."""
    return path is not None and os.path.isabs(path) and not os.path.exists(path)


def where_to_look(key: str, path: str) -> str:
    """The hint for a file or folder that is not there. key: of the preset."""
    moved = f" If it was moved, set its new place: --set {key}=PATH" if os.path.isabs(path) else ""
    return f"Check {key}.{moved}"


def shown_from(folder: Path, path: str) -> str:
    """A path as it is told to people: from `folder` on where it lies inside, else as it is."""
    inside, outer = os.path.abspath(path), os.path.abspath(folder)
    return (
        os.path.relpath(inside, outer) if os.path.isabs(path) and inside.startswith(outer + os.sep) else path
    )
