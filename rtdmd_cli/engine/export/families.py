"""The base model of an export: its family's facts, its licence, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdmd_cli.config.schema import SHARED_BASE, Preset
from rtdmd_cli.engine.backbones.families import locate_model
from rtdmd_cli.engine.families import table
from rtdmd_cli.engine.families.facts import UNKNOWN, ExportFamily, Licence

BUILTIN = "builtin:"


def comfyui_knows(base: str) -> bool:
    """Whether ComfyUI can load the base model: it knows no SD3 with 8 latent channels and heads of 32, the built-in one."""
    return not base.startswith(BUILTIN)


FAMILIES: dict[str, ExportFamily] = {name: facts.export for name, facts in table.FAMILIES.items()}
"""Family of the preset -> what an export has to know of it."""


def generator_base(preset: Preset) -> str:
    """The base model that the generator's adapters belong to: a hub id, a built-in name or a path."""
    own = preset.model.generator_init
    return preset.model.path if own == SHARED_BASE else own


def generator_revision(preset: Preset) -> str | None:
    """Its pinned revision, if it has one."""
    model = preset.model
    return model.revision if model.generator_init == SHARED_BASE else model.generator_revision


def licence_of(base: str) -> Licence:
    """The licence that an export of this base model inherits."""
    known = table.MODELS.get(base.lower())
    return UNKNOWN if known is None else known.licence


def row(table: Mapping[str, Any], base: str) -> Any:
    """The row of a base model, or the row for any other ("")."""
    return table.get(base.lower(), table[""])


@dataclass(frozen=True)
class Bases:
    """Where the generator's base model lies. pipeline: a whole folder, whose transformer counts unless there is another.

    transformer: the folder of the weights that are adapted; None where they are the single `file`.
    """

    pipeline: Path
    transformer: Path | None
    file: Path | None

    @property
    def own(self) -> bool:
        """Whether the transformer is not the pipeline's."""
        return self.transformer != self.pipeline / "transformer"

    @property
    def read(self) -> list[Path]:
        """All of them."""
        return [path for path in (self.pipeline, self.transformer, self.file) if path is not None]


def find_bases(preset: Preset) -> Bases:
    """Where the generator's base model lies; downloads what is missing, loads nothing. Errors as `load_backbone`."""
    found = locate_model(preset.model)
    if found.generator is not None:
        return Bases(found.folder, found.generator / "transformer", None)
    if found.file is not None:
        return Bases(found.folder, None, found.file)
    return Bases(found.folder, found.folder / "transformer", None)
