"""Networks of few blocks in the place of deep ones: what they take grows in a straight line with the number of blocks.

Blocks of one kind are alike, so each more adds as much to every phase's peak and operations. A network is counted with two
blocks of each kind, and once more with a third; the rest is a multiplication. A test compares with counting all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

FEW = 2
"""Blocks of each kind that are counted; the last of SD3 differs from the others, and is among them."""
Config = Mapping[str, Any]
T = TypeVar("T")
COUNTS = re.compile(r"n(um)?_(\w+_)?layers")
"""The keys of a transformer's config that count its blocks: num_layers, num_single_layers, n_refiner_layers."""
PLAIN, DUAL = "num_layers", "dual_attention_layers"


def depths(config: Config) -> dict[str, int]:
    """Kind of block, by the config's key -> how many a transformer of diffusers has."""
    found = {key: number for key, number in config.items() if COUNTS.fullmatch(key)}
    dual = len(config.get(DUAL) or ())
    if dual:  # some of the plain ones
        found |= {PLAIN: found[PLAIN] - dual, DUAL: dual}
    return {kind: count for kind, count in found.items() if count}


def with_depths(config: Config, counts: Mapping[str, int]) -> dict[str, Any]:
    """A transformer's config with other numbers of blocks."""
    changed: dict[str, Any] = dict(counts)
    if DUAL in counts:
        changed |= {PLAIN: counts.get(PLAIN, 0) + counts[DUAL], DUAL: tuple(range(counts[DUAL]))}
    return dict(config) | changed


def extrapolated(
    real: Mapping[str, int], count: Callable[[Mapping[str, int]], dict[str, int]]
) -> dict[str, int]:
    """What `count` would give for the real numbers of blocks, by quantity, from runs with few.

    Each quantity of `count` is a sum over the blocks, plus a constant.
    """
    few = {kind: min(number, FEW) for kind, number in real.items()}
    base = count(few)
    total = dict(base)
    for kind, number in real.items():
        if number > few[kind]:
            more = count(few | {kind: few[kind] + 1})
            for name, value in more.items():
                total[name] += (number - few[kind]) * (value - base[name])
    return total
