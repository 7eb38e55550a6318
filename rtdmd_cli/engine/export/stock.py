"""The base model of an export in the stock pipeline: from this machine, and as a card's code names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.backbones.single_file import stored_as
from rtdmd_cli.engine.export.code import Place, Stock
from rtdmd_cli.engine.export.families import FAMILIES as EXPORTS
from rtdmd_cli.engine.export.families import Bases, generator_base
from rtdmd_cli.engine.export.names import is_hub_id, place_of


def stock_here(preset: Preset, stock: Stock, bases: Bases) -> Stock:
    """The base model in the stock pipeline, from where it lies on this machine."""
    own: dict[str, Any] = {"network": _network(preset), "transformer": None}
    if bases.file is not None:
        own |= {"transformer": Place(str(bases.file)), "file": stored_as(bases.file)}
    elif bases.own:
        assert bases.transformer is not None
        own |= {"transformer": Place(str(bases.transformer.parent)), "file": None}
    return replace(stock, base=Place(str(bases.pipeline)), **own)


def stock_there(preset: Preset, bases: Bases, pipeline: str) -> Stock:
    """The same as a card loads it: by hub ids where there are, else by paths without user names."""
    changes = EXPORTS[preset.model.family].scheduler
    return replace(_named(preset, bases, pipeline), scheduler=changes)


def _named(preset: Preset, bases: Bases, pipeline: str) -> Stock:
    model = preset.model
    if bases.file is not None:
        return Stock(
            pipeline,
            place_of(model.components or ""),
            _network(preset),
            place_of(model.path),
            stored_as(bases.file),
        )
    if bases.own and not is_hub_id(model.generator_init):
        return Stock(pipeline, place_of(model.path), _network(preset), place_of(model.generator_init))
    return Stock(pipeline, place_of(generator_base(preset)))


def _network(preset: Preset) -> str:
    name: str = FAMILIES[preset.model.family].module().LAYOUT.networks["transformer"].__name__
    return name
