"""A whole pipeline folder with the generator's adapters merged into the transformer's weights.

The files are those of the base model: same shards, same number format. Each shard is read, changed in float32, rounded
back and written, so that the memory of one shard is enough. Everything but the transformer is copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rtdmd_cli.engine.export.fold import Folded
from rtdmd_cli.engine.export.schedule import stock_config
from rtdmd_cli.engine.families.facts import ExportFamily
from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.components import NAMES, VARIANT, weight_files
from rtdmd_cli.engine.storage.tensor_files import write_tensors
from rtdmd_cli.errors import DataError

Change = Callable[[Tensor], Tensor]
Changes = Mapping[str, Change]

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER = "transformer"
CONFIG = "config.json"
WEIGHTS = NAMES[0]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by falling rounding error
PICKLES = (".bin", ".ckpt", ".msgpack", ".pt", ".pth")  # neither written nor passed on


def write_merged(
    out: Path,
    base: Path,
    transformer: Path | Mapping[str, Tensor],
    changes: Changes,
    sigmas: Sequence[float],
    exact_already: bool,
    family: ExportFamily,
) -> bool:
    """Write the pipeline; whether its stock schedule of T = len(sigmas) - 1 steps is `sigmas`.

    base: the base model's folder; transformer: the folder with the weights that `changes` are for, or these weights where
    they come from a single file, with the configuration in `base`. exact_already: the base model's schedule, with the
    family's changes of its scheduler, is right as it is. family: tells what of the configuration changes.
    """
    parts = components(base)
    for name in parts:
        if name != TRANSFORMER:
            for source in _copied(base / name):
                _copy(source, out / source.relative_to(base))
    if isinstance(transformer, Path):
        write_transformer(out / TRANSFORMER, transformer, changes)
    else:
        _copy(base / TRANSFORMER / CONFIG, out / TRANSFORMER / CONFIG)
        write_weights(out / TRANSFORMER / WEIGHTS, transformer, changes)
    described: dict[str, Any] = strict_json.read(base / INDEX)
    described.pop("_name_or_path", None)
    files.write_json(out / INDEX, described | dict(family.index))
    config = strict_json.read(base / SCHEDULER) | dict(family.scheduler)
    changed = None if exact_already else stock_config(config, sigmas)
    if changed is not None or family.scheduler:
        files.write_json(out / SCHEDULER, config if changed is None else changed)
    return exact_already or changed is not None


def components(base: Path) -> list[str]:
    """The pipeline's subfolders that model_index.json names and that are there."""
    index = strict_json.read(base / INDEX)
    return sorted(name for name in index if not name.startswith("_") and (base / name).is_dir())


def lora_changes(folded: Folded) -> dict[str, Change]:
    """`weight + B A` for the weight of each folded layer, computed in float32."""

    def change(a: Tensor, b: Tensor) -> Change:
        return lambda weight: weight + b @ a

    return {f"{layer}.weight": change(a, b) for layer, (a, b) in folded.layers.items()}


def full_changes(weights: Mapping[str, Tensor]) -> dict[str, Change]:
    """Other weights in the place of the base's."""

    def change(weight: Tensor) -> Change:
        return lambda base: weight.to("cpu", torch.float32).reshape(base.shape)

    return {name: change(weight) for name, weight in weights.items()}


def write_transformer(out: Path, base: Path, changes: Changes) -> None:
    """Copy a transformer's folder, with `changes` (weight's name -> what becomes of it in float32).

    DataError where one of these isn't among the weights.
    """
    left = set(changes)
    for source in sorted(base.glob("*.json")):
        _copy(source, out / source.name)
    for source in weight_files(base):
        tensors, metadata = _read(source)
        left -= tensors.keys()
        write_tensors(out / source.name, _with(tensors, changes), metadata)
    _require_all_used(left, base)


def write_weights(path: Path, tensors: Mapping[str, Tensor], changes: Changes) -> None:
    """Write a transformer's weights as one file, with `changes` as in `write_transformer`."""
    _require_all_used(changes.keys() - tensors.keys(), path)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(path, _with(kept, changes), {"format": "pt"})


def _with(tensors: dict[str, Tensor], changes: Changes) -> dict[str, Tensor]:
    return {
        name: _changed(tensor, changes[name]) if name in changes else tensor
        for name, tensor in tensors.items()
    }


def _require_all_used(left: Set[str], where: Path) -> None:
    if left:
        raise DataError(
            f"The transformer in {where} has no {sorted(left)[0]}.", "Export with the base model of the run."
        )


def _changed(weight: Tensor, change: Change) -> Tensor:
    """The changed weight in the weight's own format."""
    if weight.dtype not in DTYPES.values():
        raise DataError(
            f"The base model's weights are stored as {weight.dtype}, into which nothing can be merged.",
            "Use --format diffusers or comfyui, or a base model in float32, float16 or bfloat16.",
        )
    return change(weight.float()).to(weight.dtype)


def stored_dtype(transformer: Path) -> torch.dtype:
    """The least precise number format among a transformer's weights."""
    found = set()
    for path in weight_files(transformer):
        with safe_open(path, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return next((DTYPES[name] for name in DTYPES if name in found), torch.float32)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        return tensors, dict(stored.metadata() or {"format": "pt"})


def _copied(folder: Path) -> Iterator[Path]:
    """The files of a component, less pickles, hidden ones, and the same weights in another format."""
    for path in sorted(folder.rglob("*")):
        left_out = path.suffix in PICKLES or path.name.startswith(".") or VARIANT.search(path.name)
        if path.is_file() and not left_out:
            yield path


def _copy(source: Path, target: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    files.write_with(target, write)
