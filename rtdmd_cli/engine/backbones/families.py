"""The table of model families, and the model that a preset names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones.base import PLAIN, Backbone
from rtdmd_cli.engine.compute.importing import quick_imports

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
    """One row of the table: the name used in presets, what it covers, and its file, imported when it is called."""

    name: str
    description: str
    load: Callable[[], FamilyModule]

    def module(self) -> FamilyModule:
        """The family's file; its libraries take seconds to import."""
        with quick_imports():
            return self.load()


def _sd3() -> FamilyModule:
    from rtdmd_cli.engine.backbones import sd3

    return sd3


def _flux1() -> FamilyModule:
    from rtdmd_cli.engine.backbones import flux1

    return flux1


def _flux2() -> FamilyModule:
    from rtdmd_cli.engine.backbones import flux2

    return flux2


def _zimage() -> FamilyModule:
    from rtdmd_cli.engine.backbones import zimage

    return zimage


FAMILIES: dict[str, Family] = {
    "sd3": Family("sd3", "Stable Diffusion 3 and 3.5 Medium, and the built-in shapes model", _sd3),
    "flux1": Family("flux1", "FLUX.1-dev", _flux1),
    "flux2": Family("flux2", "FLUX.2-klein, 4B and 9B", _flux2),
    "zimage": Family("zimage", "Z-Image", _zimage),
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
