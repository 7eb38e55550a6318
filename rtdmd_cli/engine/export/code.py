"""The Python of a card. The round trip runs these very lines, with the paths, prompts and number format of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rtdmd_cli.engine.backbones.single_file import Stored
from rtdmd_cli.engine.export.families import BUILTIN
from rtdmd_cli.engine.families.facts import Names
from rtdmd_cli.engine.storage.lora_files import DIFFUSERS_NAME

PROMPT = "a photo of a red ring and a blue cross"


@dataclass(frozen=True)
class Place:
    """A folder or a repository that the code loads: its name there, and a comment beside it, for people."""

    name: str
    comment: str = ""

    @property
    def expression(self) -> str:
        """As Python."""
        if self.name.startswith(BUILTIN):
            return 'str(files("rtdmd_cli") / "shapes/weights/sd3")'
        return f"os.path.expanduser({_text(self.name)})" if self.name.startswith("~") else _text(self.name)


@dataclass(frozen=True)
class Stock:
    """A stock pipeline: its class and its folder or repository.

    transformer: of another place than the pipeline's, a folder whose `transformer/` it is, or a single file; network: its
    class. file: how the single file holds it. lora: where the LoRA lies, and the file's name. scheduler: changes of its
    scheduler's configuration.
    """

    pipeline: str
    base: Place
    network: str = ""
    transformer: Place | None = None
    file: Stored | None = None
    lora: tuple[Place, str] | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def stock_lora(stock: Stock, where: str) -> Stock:
    """The same with the LoRA that an export holds for diffusers."""
    return replace(stock, lora=(Place(where), DIFFUSERS_NAME))


def load_lines(stock: Stock, dtype: str = "torch.bfloat16") -> list[str]:
    """The lines that make `pipe`."""
    places = [stock.base, *([stock.transformer] if stock.transformer else []), *(stock.lora or ())[:1]]
    expressions = [place.expression for place in places if isinstance(place, Place)]
    lines = ["import os"] if any("os.path" in each for each in expressions) else []
    lines += (
        ["from importlib.resources import files"] if any("files(" in each for each in expressions) else []
    )
    classes = [stock.pipeline, *([stock.network] if stock.transformer else [])]
    lines += [*([""] if lines else []), "import torch", f"from diffusers import {', '.join(classes)}"]
    lines += [*(["from safetensors.torch import load_file"] if stock.file is not None else []), ""]
    lines.append(f"base = {stock.base.expression}{_beside(stock.base)}")
    given = ""
    if stock.transformer is not None:
        given = "transformer=transformer, "
        lines += [
            f"path = {stock.transformer.expression}{_beside(stock.transformer)}",
            *_transformer(stock, dtype),
        ]
    lines.append(f"pipe = {stock.pipeline}.from_pretrained(base, {given}dtype={dtype}, use_safetensors=True)")
    if stock.scheduler:
        changes = ", ".join(f"{name}={value!r}" for name, value in stock.scheduler.items())
        lines.append(f"pipe.scheduler.register_to_config({changes})")
    if stock.lora is not None:
        place, name = stock.lora
        lines.append(f"pipe.load_lora_weights({place.expression}, weight_name={_text(name)})")
    return lines


def _transformer(stock: Stock, dtype: str) -> list[str]:
    rest = f'subfolder="transformer", dtype={dtype}'
    if stock.file is None:
        return [
            f"transformer = {stock.network}.from_pretrained(",
            f"    path, {rest}, use_safetensors=True",
            ")",
        ]
    return [
        *tensor_lines(stock.file),
        f"transformer = {stock.network}.from_single_file(",
        f"    tensors, config=base, {rest}",
        ")",
        "del tensors",
    ]


def tensor_lines(stored: Stored) -> list[str]:
    """The lines that make `tensors`, as diffusers' converters take them, of the single file `path`.

    The converters don't strip every prefix, drop scales, and FLUX.1's knows the norms by their older names alone.
    """
    lines = ["tensors = load_file(path)"]
    if stored.prefix:
        own = "key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)"
        lines += [f"prefix = {_text(stored.prefix)}", f"tensors = {{{own}}}"]
    return [*lines, *(SCALED if stored.scaled else ()), *(NEWER_NORMS if stored.newer_norms else ())]


SCALED = (
    'for key in [key for key in tensors if key.endswith((".scale_weight", ".weight_scale"))]:',
    '    weight, scale = key.rpartition(".")[0] + ".weight", tensors.pop(key).float()',
    "    tensors[weight] = tensors[weight].float() * (scale if scale.numel() == 1 else scale.reshape(-1, 1))",
    'unused = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")',
    "tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(unused)}",
)
"""Lines of Python that multiply 8-bit weights by their scales: one number, or one a row."""
NEWER_NORMS = (
    'for key in [key for key in tensors if key.endswith((".query_norm.weight", ".key_norm.weight"))]:',
    '    tensors[key.removesuffix("weight") + "scale"] = tensors.pop(key)',
)
"""Lines of Python that give FLUX's norms the name that diffusers converts."""


def call_lines(call: Mapping[str, str], prompt: str = PROMPT, seed: int = 0) -> list[str]:
    """The lines that make `image` with `pipe`. call: further arguments, as Python."""
    return [
        "image = pipe(",
        f"    prompt={_text(prompt)},",
        *(f"    {name}={value}," for name, value in call.items()),
        f'    generator=torch.Generator("cpu").manual_seed({seed}),',
        ").images[0]",
    ]


def block(stock: Stock, call: Mapping[str, str]) -> str:
    """All of it, as a card shows it: the pipeline, one picture, a file."""
    device = 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")'
    return fenced([*load_lines(stock), device, *call_lines(call), 'image.save("picture.png")'])


def join_code(target: str, names: Names | None = None) -> str:
    """A merged transformer's files as the one file that ComfyUI wants; run in the folder of the export.

    names: of the tensors there, where it wants others.
    """
    return fenced(
        [
            "from pathlib import Path",
            *(["import torch"] if names else []),
            "from safetensors.torch import load_file, save_file",
            "",
            'shards = Path("transformer").glob("*.safetensors")',
            "tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}",
            *(_renamed(names) if names else []),
            f"save_file(tensors, {_text(target)})",
        ]
    )


def _renamed(names: Names) -> list[str]:
    return [
        f"joined = {json.dumps(names.joined)}",
        "for name in [name for name in tensors if joined[0] in name]:",
        "    parts = [tensors.pop(name.replace(joined[0], part)) for part in joined]",
        f"    tensors[name.replace(joined[0], {_text(names.under)})] = torch.cat(parts)",
        *f"changed = {json.dumps(dict(names.changed), indent=4)}".splitlines(),
        "for old, new in changed.items():",
        "    tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}",
    ]


def fenced(lines: list[str]) -> str:
    """Lines as a block of Markdown."""
    return "```python\n" + "\n".join(lines) + "\n```"


def _beside(place: Place) -> str:
    return f"  # {place.comment}" if place.comment else ""


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
