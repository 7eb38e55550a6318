"""The table of model families: a file here for each name that a preset may give."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

from rtdmd_cli.config.schema import FamilyName
from rtdmd_cli.engine.families.facts import FamilyFacts, Published

FAMILIES: dict[str, FamilyFacts] = {
    name: import_module(f"rtdmd_cli.engine.families.{name}").FACTS for name in get_args(FamilyName)
}
"""Family of the preset -> its facts."""
MODELS: dict[str, Published] = {
    source.lower(): model for facts in FAMILIES.values() for source, model in facts.models.items()
}
"""Hub id or built-in name, in small letters -> what is published there."""
