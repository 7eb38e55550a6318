"""The Python that a card shows."""

from __future__ import annotations

from collections.abc import Mapping

from rtdmd_cli.engine.export.lora_files import DIFFUSERS_NAME

BUILTIN = "builtin:"


def lora_code(pipeline: str, base: str, where: str, call: Mapping[str, str]) -> str:
    """Base model, LoRA, one picture."""
    lines = ["import torch", f"from diffusers import {pipeline}"]
    model = f'"{base}"'
    if base.startswith(BUILTIN):
        lines.insert(0, "from importlib.resources import files\n")
        model = 'files("rtdmd_cli") / "shapes/weights/sd3"'
    lines += [
        "",
        f"pipe = {pipeline}.from_pretrained({model}, torch_dtype=torch.bfloat16)",
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
