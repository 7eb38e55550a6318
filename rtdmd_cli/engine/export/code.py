"""The Python that a card shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rtdmd_cli.engine.storage.lora_files import DIFFUSERS_NAME

BUILTIN = "builtin:"


@dataclass(frozen=True)
class SingleFile:
    """A base model whose transformer is a file: its class in diffusers, and where everything else comes from."""

    network: str
    components: str


def lora_code(
    pipeline: str, base: str, single: SingleFile | None, where: str, call: Mapping[str, str]
) -> str:
    """Base model, LoRA, one picture."""
    lines = ["import torch", f"from diffusers import {pipeline}"]
    model, parts = f'"{base}"', ""
    if base.startswith(BUILTIN):
        lines.insert(0, "from importlib.resources import files\n")
        model = 'files("rtdmd_cli") / "shapes/weights/sd3"'
    if single is not None:
        lines[1] += f", {single.network}"
        model, parts = f'"{single.components}"', "transformer=transformer, "
        lines += [
            "",
            f"transformer = {single.network}.from_single_file(",
            f'    "{base}", config={model}, subfolder="transformer", torch_dtype=torch.bfloat16',
            ")",
        ]
    lines += [
        *([] if single else [""]),
        f"pipe = {pipeline}.from_pretrained({model}, {parts}torch_dtype=torch.bfloat16)",
        f'pipe.load_lora_weights("{where}", weight_name="{DIFFUSERS_NAME}")',
        *_picture(call),
    ]
    return _block(lines)


def merged_code(pipeline: str, where: str, call: Mapping[str, str]) -> str:
    """The merged pipeline, one picture."""
    lines = ["import torch", f"from diffusers import {pipeline}", ""]
    lines += [f'pipe = {pipeline}.from_pretrained("{where}", torch_dtype=torch.bfloat16)', *_picture(call)]
    return _block(lines)


def _picture(call: Mapping[str, str]) -> list[str]:
    return [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "image = pipe(",
        '    "a photo of a red ring and a blue cross",',
        *(f"    {name}={value}," for name, value in call.items()),
        '    generator=torch.Generator("cpu").manual_seed(0),',
        ").images[0]",
        'image.save("picture.png")',
    ]


def _block(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
