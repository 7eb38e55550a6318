"""The weights of one component of a pipeline, by the names that diffusers and transformers read."""

from __future__ import annotations

import re
from pathlib import Path

from rtdmd_cli.engine.storage import strict_json

NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Of diffusers' networks and of transformers'."""
INDEX = ".index.json"
"""After one of NAMES: in which file each weight is, where there are several."""
VARIANT = re.compile(
    r"\.(fp16|bf16|fp32)(-\d{5}-of-\d{5})?\.safetensors$|\.safetensors\.index\.(fp16|bf16|fp32)\.json$"
)
"""Names of the same weights in another format, which repositories hold beside them; never read here."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded from a component's folder; those of an index may be missing on the disk.

    Empty where there are none.

    Errors as `strict_json.read`; KeyError, AttributeError or TypeError for an index of another form.
    """
    for name in NAMES:
        index = folder / f"{name}{INDEX}"
        if index.is_file():
            return [folder / part for part in sorted(set(strict_json.read(index)["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    return []
