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
