"""An exported folder, and its description export.json.

<folder>/README.md  samples.png  export.json
         pytorch_lora_weights.safetensors            --format diffusers
         comfyui/<run>-<step>.safetensors  *.json    --format comfyui
         model_index.json  transformer/  vae/ ...    --format merged
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import DataError

MANIFEST, CARD = "export.json", "README.md"
FORMAT, VERSION = "rtdmd-export", 1
INDEX, COMFYUI = "model_index.json", "comfyui"
AGAIN = "Export the run again."


@dataclass(frozen=True)
class Exported:
    """What export.json says. preset: model, sampler and evaluation; lora: a LoRA file, None where there is none.

    merged: the folder is a whole pipeline; stock_schedule: whose stock schedule is the few-step one.
    base_hash: of the base model that a LoRA belongs to. trained_on: names of the rewards that stage 2 raised.
    """

    folder: Path
    preset: Preset
    lora: Path | None
    prefix: str
    merged: bool
    stock_schedule: bool
    base_hash: str
    trained_on: tuple[str, ...]


def is_exported(folder: Path) -> bool:
    """Whether the folder says that it is an export of this program."""
    try:
        body = strict_json.read(folder / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and body.get("format") == FORMAT


def is_untouched(folder: Path) -> bool:
    """Whether an export holds what was written to it and nothing else: the same files, of the same sizes, the same card."""
    try:
        body = strict_json.read(folder / MANIFEST)
        listed = {str(name): int(entry["size"]) for name, entry in body["files"].items()}
        card = str(body["card_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    with os_errors(folder, "read"):
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
        if found.keys() != {*listed, MANIFEST, CARD} or any(path.is_symlink() for path in found.values()):
            return False
        sizes = all(found[name].stat().st_size == size for name, size in listed.items())
        return sizes and file_sha256(found[CARD]) == card


def read_exported(folder: Path) -> Exported:
    """The folder's description. DataError where it is damaged, of another version, or a file that is loaded has changed."""
    body = strict_json.read(folder / MANIFEST)
    if body.get("version") != VERSION:
        raise DataError(
            f"{folder / MANIFEST} has version {body.get('version')}; this program reads version {VERSION}.",
            AGAIN,
        )
    try:
        sections = {key: body["preset"][key] for key in ("name", "model", "sampler")}
        sections |= {key: body["preset"][key] for key in ("evaluate",) if key in body["preset"]}
        found = Exported(
            folder=folder,
            preset=Preset.model_validate(sections),
            lora=_lora(folder, body),
            prefix=str(body["prefix"]),
            merged=bool(body["merged"]),
            stock_schedule=bool(body["stock_schedule"]),
            base_hash=str(body["base"]["hash"]),
            trained_on=tuple(str(name) for name in body["trained_on"]),
        )
    except (LookupError, TypeError, ValueError, ValidationError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {type(error).__name__}.", AGAIN) from error
    if found.lora is None and not found.merged:
        raise DataError(f"{folder / MANIFEST} names no weights.", AGAIN)
    if found.merged:
        _check_pipeline(folder, body)
    return found


def _check_pipeline(folder: Path, body: dict[str, Any]) -> None:
    """DataError where a file of a merged pipeline has changed, is missing, or was not written by the export."""
    try:
        listed = {str(name): str(entry["sha256"]) for name, entry in body["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {type(error).__name__}.", AGAIN) from error
    parts = {name.partition("/")[0] for name in listed if "/" in name} - {COMFYUI}
    loaded = {name for name in listed if name == INDEX or name.partition("/")[0] in parts}
    if INDEX not in loaded:
        raise DataError(f"{folder / MANIFEST} names no weights.", AGAIN)
    with os_errors(folder, "read"):
        found = [path for part in sorted(parts) for path in (folder / part).rglob("*") if not path.is_dir()]
    for path in found:
        if path.relative_to(folder).as_posix() not in loaded:
            raise DataError(f"{path} is not of this export, which would load it.", f"Remove it. {AGAIN}")
    for name in sorted(loaded):
        _require_same(folder / name, listed[name])


def _require_same(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing.", AGAIN)
    if file_sha256(path) != sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}.", AGAIN)


def _lora(folder: Path, body: dict[str, Any]) -> Path | None:
    """The LoRA file, the same one in every format; its contents are those that were written."""
    name = body["lora"]
    if name is None:
        return None
    if not isinstance(name, str) or not isinstance(body["files"], dict):
        raise TypeError("a name that is none, or no table of files")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a file outside the folder")
    _require_same(path, str(body["files"][name]["sha256"]))
    return path


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
