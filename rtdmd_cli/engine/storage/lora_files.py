"""A folded LoRA as a safetensors file that diffusers and ComfyUI load.

Keys are `transformer.<layer of diffusers>.lora_A.weight` and `.lora_B.weight`, without an alpha, which both read as a
scale of 1:

- diffusers 0.42, `get_peft_kwargs` of utils/peft_utils.py: without alphas and without `lora_adapter_metadata` in the
  header, alpha = rank. `SD3LoraLoaderMixin` refuses keys that don't hold "lora", so there may be no `.alpha` tensors.
- ComfyUI, comfy/lora.py: `model_lora_keys_unet` maps `transformer.<layer>` to its own layers for SD3 (by
  `mmdit_to_diffusers`: to_q, to_k, to_v become slices of its fused qkv), for Flux and its subclass Flux2 (by
  `flux_to_diffusers`), and for Lumina2, which Z-Image is there (by `z_image_to_diffusers`);
  comfy/weight_adapter/lora.py reads `lora_B` as up, `lora_A` as down, and no alpha as 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.tensor_files import tensor_bytes
from rtdmd_cli.errors import DataError

A, B = ".lora_A.weight", ".lora_B.weight"  # after a layer's name, in checkpoints and files
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for in a folder


def lora_tensors(layers: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    """The file's tensors: `<prefix>.<layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], float32.

    layers: (A, B) by the layer's name.
    """
    tensors = {}
    for layer, (a, b) in layers.items():
        tensors[f"{prefix}.{layer}{A}"] = a
        tensors[f"{prefix}.{layer}{B}"] = b
    return tensors


def write_lora(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the file; `header` gets modelspec's hash of the tensors' bytes. Errors as `files.write_bytes`."""
    body = safetensors.torch.save(dict(tensors))
    length = int.from_bytes(body[:8], "little")
    digest = hashlib.sha256(body[8 + length :]).hexdigest()
    metadata = dict(header) | {"modelspec.hash_sha256": f"0x{digest}", "format": "pt"}
    files.write_bytes(path, tensor_bytes(tensors, metadata))


def read_lora(path: Path, prefix: str, transformer: nn.Module) -> dict[str, Tensor]:
    """The tensors of an exported file, each of which fits a linear layer of `transformer`.

    DataError for a damaged file, none at all, an unexpected or half key, another shape or rank, and values that are no
    finite floating-point numbers.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"The LoRA {path} can't be read: {error}", "Export the run again.") from error
    if not tensors:
        raise DataError(f"The LoRA {path} holds no weights.", "Export the run again.")
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    for key, tensor in tensors.items():
        layer, end = _split(key.removeprefix(f"{prefix}."))
        other = f"{prefix}.{layer}{B if end == A else A}"
        fits = layer in linear and other in tensors and tensor.ndim == tensors[other].ndim == 2
        if fits:
            size = linear[layer].in_features if end == A else linear[layer].out_features
            ranks = [tensors[f"{prefix}.{layer}{each}"].shape[number] for number, each in enumerate((A, B))]
            fits = size == tensor.shape[1 if end == A else 0] and ranks[0] == ranks[1]
        if not fits:
            raise DataError(
                f"{path} doesn't fit the model: {key} {list(tensor.shape)}.", "Use the base model it names."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise DataError(
                f"{path} holds no usable weights: {key} is {tensor.dtype}, or not finite.",
                "Export the run again.",
            )
    return tensors


def add_lora(transformer: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put an exported LoRA on a diffusers model without adapters, frozen; the tensors are those of `read_lora`."""
    transformer.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name="exported")
    transformer.requires_grad_(False)


def _split(name: str) -> tuple[str, str]:
    for end in (A, B):
        if name.endswith(end):
            return name.removesuffix(end), end
    return name, ""


def header(facts: Mapping[str, str]) -> dict[str, str]:
    """Facts as modelspec's keys (https://github.com/Stability-AI/ModelSpec, version 1.0.1)."""
    return {"modelspec.sai_model_spec": "1.0.1"} | {f"modelspec.{key}": text for key, text in facts.items()}


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found: dict[str, str] = strict_json.parse(file.read(length)).get("__metadata__", {})
    return found
