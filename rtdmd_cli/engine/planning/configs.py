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
    models: dict[str, dict[str, dict[str, Any]]] = _table()["models"]
    return models


def published_format(source: str) -> str | None:
    """`fp16` or `bf16`, of every network's files in a hub's repository; None where it is not known."""
    found: str | None = _table()["formats"].get(source)
    return found


def _table() -> dict[str, Any]:
    table: dict[str, Any] = strict_json.parse((files(__package__) / TABLE).read_text(encoding="utf-8"))
    return table


def find_folder(source: str, revision: str | None) -> Path | None:
    """Where a model's files lie on this machine: the built-in one's, a folder, or the hub's cache; None for nowhere."""
    if source in BUILTIN:
        return Path(str(files("rtdmd_cli"))) / BUILTIN[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source):
        return None
    there = try_to_load_from_cache(source, "model_index.json", revision=revision)
    return Path(there).parent if isinstance(there, str) else None


def find_configs(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Component -> its config. Nothing is downloaded.

    DataError for a folder that lacks one, EnvironmentFailure for a hub model of which nothing is known here.
    """
    layout = families.FAMILIES[model.family].module().LAYOUT
    source, key = model.path, "model.path"
    if is_single_file(source):
        source, key = model.components or "", "model.components"
    table = published()
    if source in table and not Path(source).is_dir():
        return table[source]
    folder = find_folder(source, model.revision)
    if folder is not None:
        return _in_folder(layout, folder)
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
