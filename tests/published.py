"""Schedulers' configurations as the models' repositories hold them: older than some keys that today's diffusers writes."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

OF_RESOLUTION = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "use_dynamic_shifting")
KEYS = {
    "StableDiffusion3Pipeline": ("num_train_timesteps", "shift"),
    "FluxPipeline": ("num_train_timesteps", "shift", *OF_RESOLUTION),
    "ZImagePipeline": ("num_train_timesteps", "shift", "use_dynamic_shifting"),
}
"""Pipeline -> the keys of its published scheduler_config.json, where it is known to have fewer than today's."""


def cut_scheduler(folder: Path) -> None:
    """Leave the published keys in the scheduler's file of a saved pipeline; what goes must be the defaults."""
    keys = KEYS.get(json.loads((folder / "model_index.json").read_text())["_class_name"])
    if keys is None:
        return
    path = folder / "scheduler/scheduler_config.json"
    saved, defaults = json.loads(path.read_text()), FlowMatchEulerDiscreteScheduler().config
    kept = {key: value for key, value in saved.items() if key in keys or key.startswith("_")}
    assert all(defaults[key] == saved[key] for key in saved.keys() - kept.keys())
    path.write_text(json.dumps(kept, indent=2))
