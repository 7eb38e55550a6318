"""Presets: the schema, and the loader that says where each value came from. No torch."""

from rtdmd_cli.config.fields import allowed, keys
from rtdmd_cli.config.loader import (
    PresetInfo,
    Resolved,
    dump_resolved,
    list_presets,
    load_preset,
    preset_names,
    preset_path,
    preset_sha256,
    preset_text,
    preset_values,
)
from rtdmd_cli.config.schema import (
    DistillConfig,
    EvaluateConfig,
    HardwareConfig,
    ModelConfig,
    Preset,
    SamplerConfig,
)
from rtdmd_cli.config.section import LoraConfig

__all__ = [
    "DistillConfig",
    "EvaluateConfig",
    "HardwareConfig",
    "LoraConfig",
    "ModelConfig",
    "Preset",
    "PresetInfo",
    "Resolved",
    "SamplerConfig",
    "allowed",
    "dump_resolved",
    "keys",
    "list_presets",
    "load_preset",
    "preset_names",
    "preset_path",
    "preset_sha256",
    "preset_text",
    "preset_values",
]
