"""Whether a network's configuration goes with its weights, before anything is built of its numbers.

A configuration that says 100,000 layers, or widths that no weight has, would take gigabytes for modules that nothing is
loaded into.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rtdmd_cli.engine.backbones.layout import Layout
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.components import weight_files
from rtdmd_cli.errors import DataError

WIDTHS = (
    "attention_head_dim",
    "block_out_channels",
    "caption_projection_dim",
    "cross_attention_dim",
    "d_ff",
    "d_model",
    "dim",
    "head_dim",
    "hidden_size",
    "in_channels",
    "intermediate_size",
    "joint_attention_dim",
    "latent_channels",
    "num_attention_heads",
    "out_channels",
    "pooled_projection_dim",
    "vocab_size",
)
"""Keys of configurations whose numbers are, or divide, sizes of weights."""
SQUARES = ("pos_embed_max_size",)
"""Keys of the side of a table whose every cell is a row of a weight."""
SMALL = 4096
"""Widths up to this are taken without a weight of that size: defaults of what a network does not have."""


def check_sizes(layout: Layout, folder: Path) -> None:
    """DataError where a network's config.json says more layers than there are weights, or a width far above all of theirs.

    Networks without weights in `folder` are passed over. Errors as of `strict_json.read` and `safe_open`.
    """
    for name in layout.networks:
        shapes = [shape for file in weight_files(folder / name) if file.is_file() for shape in _shapes(file)]
        path = folder / name / "config.json"
        if not shapes or not path.is_file():
            continue
        widest = max((size for shape in shapes for size in shape), default=1)
        for key, value in _numbers(strict_json.read(path)):
            most = _most(key, len(shapes), max(widest, SMALL))
            if most is not None and value > most:
                raise DataError(
                    f"{path} doesn't go with the weights beside it: {key} is {value:,}, and they allow {most:,} at most.",
                    layout.renew,
                )


def _shapes(file: Path) -> Iterator[list[int]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            yield tensors.get_slice(name).get_shape()


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Every whole number in a configuration with its key, those of lists with the list's."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not isinstance(each, bool):
                yield key, each


def _most(key: str, weights: int, widest: int) -> int | None:
    """The largest number that the key may have; None where it is no size."""
    if "layers" in key:
        return max(weights, SMALL // 8)
    if key in SQUARES:
        return int(widest**0.5)
    return widest if key in WIDTHS else None
