"""The config.json of every component of a model: from its folder, the table of published models, or the hub's cache."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rtdmd_cli.config.places import is_single_file
from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones import families
from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.backbones.locating import BUILTIN
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.errors import DataError, EnvironmentFailure

TABLE = "models.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SCHEDULER = "scheduler"


def published() -> dict[str, dict[str, dict[str, Any]]]:
    """Hub id -> component -> what of its config decides sizes; for the models of the shipped presets."""
    models: dict[str, dict[str, dict[str, Any]]] = strict_json.parse(
        (files(__package__) / TABLE).read_text(encoding="utf-8")
    )["models"]
    return models


def find_configs(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Component -> its config. Nothing is downloaded.

    DataError for a folder that lacks one, EnvironmentFailure for a hub model of which nothing is known here.
    """
    layout = families.FAMILIES[model.family].module().LAYOUT
    source, key = model.path, "model.path"
    if is_single_file(source):
        source, key = model.components or "", "model.components"
    if source in BUILTIN:
        return _in_folder(layout, Path(str(files("rtdmd_cli"))) / BUILTIN[source])
    if Path(source).expanduser().is_dir():
        return _in_folder(layout, Path(source).expanduser())
    table = published()
    if source in table:
        return table[source]
    there = None
    if HUB_ID.fullmatch(source):
        there = try_to_load_from_cache(source, "model_index.json", revision=model.revision)
    if isinstance(there, str):
        return _in_folder(layout, Path(there).parent)
    raise EnvironmentFailure(
        f"The shapes of the model {source or model.path} are not known here.",
        f"Download it, or set {key} to a folder that holds it; known without: {', '.join(table)}.",
    )


def _in_folder(layout: Layout, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in (*layout.networks, SCHEDULER):
        path = folder / name / ("scheduler_config.json" if name == SCHEDULER else "config.json")
        try:
            found[name] = strict_json.read(path)
        except FileNotFoundError:
            if name not in layout.optional:
                raise DataError(
                    f"The model folder {folder} lacks {path.relative_to(folder)}.", layout.renew
                ) from None
        except ValueError as error:
            raise DataError(f"{path} can't be read: {error}", layout.renew) from error
    return found
