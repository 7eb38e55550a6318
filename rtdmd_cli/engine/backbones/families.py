"""The table of model families, and the model that a preset names."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Backbone
from rtdmd_cli.engine.compute.importing import quick_imports
from rtdmd_cli.engine.families import table

if TYPE_CHECKING:
    from rtdmd_cli.engine.backbones.common import PipelineBackbone
    from rtdmd_cli.engine.backbones.layout import Layout, Sources


class FamilyModule(Protocol):
    """What a family's file offers: what its folders hold, its backbone's class, prompts encoded at once, and its loader."""

    LAYOUT: Layout
    ENCODE_BATCH: int

    @property
    def BACKBONE(self) -> type[PipelineBackbone]: ...

    def load(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig
    ) -> Backbone: ...


@dataclass(frozen=True)
class Family:
    """A model family: the name used in presets, and what it covers. Its file here has the same name."""

    name: str
    description: str

    def module(self) -> FamilyModule:
        """The family's file, imported at the first call; its libraries take seconds to import."""
        with quick_imports():
            module: Any = import_module(f"rtdmd_cli.engine.backbones.{self.name}")
        found: FamilyModule = module
        return found


FAMILIES: dict[str, Family] = {
    name: Family(name, facts.description) for name, facts in table.FAMILIES.items()
}


def load_backbone(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, hardware: HardwareConfig = PLAIN
) -> Backbone:
    """Load the model a preset names. EnvironmentFailure: can't be fetched; DataError: damaged or foreign.

    hardware: tells whether the base is quantised and how pictures are decoded. device and dtype are resolved already.
    """
    return FAMILIES[config.family].module().load(config, device, dtype, hardware)


def locate_model(config: ModelConfig) -> Sources:
    """Find, and download where they are missing, the folders and files of the model a preset names.

    Nothing is loaded. Errors as `load_backbone`.
    """
    from rtdmd_cli.engine.backbones.locating import locate

    return locate(FAMILIES[config.family].module().LAYOUT, config)
