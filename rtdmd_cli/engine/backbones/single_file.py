"""A transformer in a single file: what kind of file it is, what its tensors mean, and that each of them is used.

Files for ComfyUI hold the weights of the original release, with a prefix where text encoders and VAE are in the file too,
and often in 8 bits ("scaled fp8"): beside a layer's `weight` lies the factor by which it is to be multiplied.
diffusers knows no such factors and passes over what it doesn't know; here every tensor of the transformer is accounted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.errors import DataError

UNREAD = {
    ".gguf": "a GGUF file, in which weights are quantised for llama.cpp and ComfyUI-GGUF",
    ".ckpt": "a pickle, which may run any code when it is opened",
    ".pt": "a pickle, which may run any code when it is opened",
    ".pth": "a pickle, which may run any code when it is opened",
    ".bin": "a pickle, which may run any code when it is opened",
}
"""Ending -> what such a file is."""
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
)  # of the transformer's keys, where other parts are in the file
LORA_MARKS = (
    ".lora_a.",
    ".lora_b.",
    ".lora_down.",
    ".lora_up.",
    "lora_unet_",
    "lora_transformer_",
    ".lokr_",
    ".hada_",
)
SCALES = (".scale_weight", ".weight_scale")  # of a layer's 8-bit weight
OF_ACTIVATIONS = (".scale_input", ".input_scale")  # for products in fp8, which are not used here
DESCRIBED = "comfy_quant"  # how a layer is stored
DESCRIPTIONS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")  # those that are read
NEWER_NORMS = (".query_norm.weight", ".key_norm.weight")
"""FLUX's norms of queries and keys as newer tools name them; the original release has `scale`."""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
TAKE = (
    "The file must be a fine-tune of the model in model.components, in fp32, fp16, bf16, "
    "or fp8 with scales of layers or rows."
)


def refuse_other_kinds(path: str, key: str) -> None:
    """DataError for a path that is known to be something else: another kind of file, or the root of a hub's cache."""
    kind = UNREAD.get(Path(path).suffix.lower())
    if kind is not None:
        raise DataError(
            f"{path} is {kind}; it is not read.",
            f"Set {key} to a .safetensors file, or to a folder in the layout of diffusers.",
        )
    snapshots = Path(path).expanduser() / "snapshots"
    if snapshots.is_dir() and not (snapshots.parent / "model_index.json").is_file():
        found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
        raise DataError(
            f"{path} is the root of a cache of the hub; the model lies below it.",
            f"Set {key} to {found[-1]}." if found else "Fetch the model first.",
        )


@dataclass(frozen=True)
class Stored:
    """How a file holds its transformer, by the keys.

    prefix: of the transformer's keys, "" where there is none. scaled: whether scales lie beside its 8-bit weights.
    newer_norms: whether it has keys of `NEWER_NORMS`.
    """

    prefix: str = ""
    scaled: bool = False
    newer_norms: bool = False


def stored_as(file: Path) -> Stored:
    """Of a single file; reads the header alone. Errors as `safe_open`."""
    with safe_open(file, framework="pt") as stored:
        keys = list(stored.keys())
    prefix = prefix_of(keys)
    own = [key for key in keys if key.startswith(prefix)]
    return Stored(
        prefix, any(key.endswith(SCALES) for key in own), any(key.endswith(NEWER_NORMS) for key in own)
    )


def refuse_lora(file: Path) -> None:
    """DataError where the file's keys are those of a LoRA; reads the header alone. Errors as `safe_open`."""
    with safe_open(file, framework="pt") as stored:
        keys = list(stored.keys())
    lora = [key for key in keys if any(mark in key.lower() for mark in LORA_MARKS)]
    if lora:
        raise DataError(
            f"{file} is a LoRA, not a whole model: it holds {lora[0]}.",
            "Set model.path to the model that it was made for; LoRA files can't be loaded.",
        )


def read_transformer(
    file: Path, network: Any, config: Mapping[str, Any], dtype: torch.dtype, shapes_only: bool = False
) -> dict[str, Tensor]:
    """The transformer's tensors with diffusers' names, scales multiplied in.

    network: its class in diffusers, config: of its config.json. shapes_only: all of it on `meta`, to see beforehand that
    the file fits; of the weights nothing is read. DataError, naming the tensor, where one of the transformer's is not
    used, or one of diffusers' is missing or has another shape. Errors of a damaged file as `load_file`.
    """
    refuse_lora(file)
    stored = load_file(file)  # mapped: a tensor is read where it is first used
    if shapes_only:
        stored = {key: t if key.endswith(DESCRIBED) else t.to("meta") for key, t in stored.items()}
    tensors = scaled(without_prefix(stored), file, dtype)
    with torch.device("meta"):
        expected = {name: t.shape for name, t in network.from_config(config).state_dict().items()}
    converted = tensors
    # Other names than diffusers' own; a part of them may be alike, as Z-Image's are.
    if tensors.keys() - expected.keys() and expected.keys() - tensors.keys():
        tensors = with_older_norms(tensors)
        convert = SINGLE_FILE_LOADABLE_CLASSES[network.__name__]["checkpoint_mapping_fn"]
        converted = convert(checkpoint=tensors, config=config)  # takes what it knows out of `tensors`
    require_all(file, "is not used", {*converted, *tensors} - expected.keys())
    require_all(file, "is missing", expected.keys() - converted.keys())
    others = [name for name, shape in expected.items() if converted[name].shape != shape]
    require_all(file, "has another shape", others)
    return {name: converted[name] for name in expected}


def require_all(file: Path, what: str, names: Iterable[str]) -> None:
    """DataError, naming the first, if there are any."""
    found = sorted(names)
    if found:
        more = f", and {len(found) - 1} more" if found[1:] else ""
        raise DataError(f"{file} doesn't fit the model: its tensor {found[0]} {what}{more}.", TAKE)


def prefix_of(keys: Iterable[str]) -> str:
    """The prefix of the transformer's keys; "" where there is none."""
    known = list(keys)
    return next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in known)), "")


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's own tensors: those under its prefix, without it, or all where there is none."""
    prefix = prefix_of(tensors)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def with_older_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with `scale` as the name of FLUX's norms, the only one that diffusers' converter of FLUX.1 knows."""
    return {
        f"{key.removesuffix('weight')}scale" if key.endswith(NEWER_NORMS) else key: tensor
        for key, tensor in tensors.items()
    }


def scaled(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with 8-bit weights in `dtype`, multiplied by their scales; DataError for scales of another kind.

    A scale is one number, or one for each row of the weight, by its shape: blocks may be as many as rows.
    """
    found = dict(tensors)
    found.pop("scaled_fp8", None)  # says that there are scales
    factors: dict[str, Tensor] = {}
    for key in list(found):
        layer, _, end = key.rpartition(".")
        if f".{end}" in OF_ACTIVATIONS:
            found.pop(key)
        elif f".{end}" in SCALES:
            factors[f"{layer}.weight"] = found.pop(key)
        elif end == DESCRIBED:
            _require_fp8(found.pop(key), key, file)
    for name, factor in factors.items():
        weight = found.get(name)
        if weight is None or weight.dtype not in EIGHT_BITS or not _of_layer_or_rows(factor, weight):
            raise DataError(f"{file} stores {name} in a format that is not read here.", TAKE)
        column = factor.float().reshape(-1, *[1] * (weight.ndim - 1))
        found[name] = (weight.float() * column).to(dtype)
    return {key: t.to(dtype) if t.dtype in EIGHT_BITS else t for key, t in found.items()}


def _of_layer_or_rows(factor: Tensor, weight: Tensor) -> bool:
    rows = weight.shape[:1]
    return factor.shape in ((), (1,), rows, (*rows, 1))


def _require_fp8(described: Tensor, key: str, file: Path) -> None:
    """A layer's own description, JSON as bytes: fp8 with one scale or one a row is understood, blocks are not."""
    try:
        known = strict_json.parse(bytes(described.tolist()).decode())
        kind = str(known["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} describes {key} in a way that is not read here.", TAKE) from error
    if kind not in DESCRIPTIONS:
        raise DataError(
            f"{file} stores {key.removesuffix('.comfy_quant')} as {kind}, which is not read here.", TAKE
        )


DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError)
"""What the libraries raise over files that hold something else."""
