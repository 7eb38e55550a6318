"""The keys of a preset as a flat table: what each allows, and which is nearest to a misspelt one."""

import json
import re
import types
import typing
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rtdmd_cli.config.schema import Preset

KeyPath = tuple[str, ...]

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truth values"),
    str: ("text", "texts"),
}
LOOKS_REAL = re.compile(r"([-+]?)(\d*)(\.\d*)?(?:[eE]([-+]?)(\d+))?")


def _walk(model: type[BaseModel], prefix: KeyPath) -> dict[KeyPath, FieldInfo | None]:
    table: dict[KeyPath, FieldInfo | None] = {}
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            table[path] = None
            table |= _walk(field.annotation, path)
        else:
            table[path] = field
    return table


@cache
def keys() -> dict[KeyPath, FieldInfo]:
    """Every key that takes a value, in the order of the schema."""
    return {path: field for path, field in _walk(Preset, ()).items() if field is not None}


@cache
def sections() -> frozenset[KeyPath]:
    """Every key that holds further keys."""
    return frozenset(path for path, field in _walk(Preset, ()).items() if field is None)


def dotted(path: KeyPath) -> str:
    """`distill.lora.rank` for ("distill", "lora", "rank")."""
    return ".".join(path)


def nearest_key(path: KeyPath, section: bool = False) -> str:
    """The real key most like `path`, with dots. Compared by spelling: first with keys that end in the same word, then
    with keys that `path` abbreviates (`distill.iter`; not `distill.lr`, which is a whole word).

    section: whether `path` holds further keys; then the sections are looked at as well.
    """
    text = dotted(path)
    names = [dotted(known) for known in (*keys(), *(sorted(sections()) if section else ()))]
    last = text.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    longer = [name for name in names if name.startswith(text) and name[len(text) :][:1] != "_"]
    return max(same or longer or names, key=lambda name: SequenceMatcher(None, text, name).ratio())


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return inner[0], True
    return annotation, False


def takes_text(field: FieldInfo) -> tuple[bool, bool]:
    """Whether the key takes any text, and whether it takes null."""
    inner, nullable = _without_none(field.annotation)
    return inner is str, nullable


def _bounds(field: FieldInfo) -> str:
    limits = field.metadata
    low = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    high = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    between = low is not None and high is not None
    parts = [f"from {low} to {high}"] if between else []
    for limit in limits:
        if between and isinstance(limit, Ge | Le):
            continue
        if isinstance(limit, Gt):
            parts.append(f"above {limit.gt}")
        elif isinstance(limit, Ge):
            parts.append(f"of at least {limit.ge}")
        elif isinstance(limit, Lt):
            parts.append(f"below {limit.lt}")
        elif isinstance(limit, Le):
            parts.append(f"at most {limit.le}")
        elif isinstance(limit, MinLen):
            parts.append(f"of at least {limit.min_length} character{'s' * (limit.min_length > 1)}")
        elif isinstance(limit, MaxLen):
            parts.append(f"at most {limit.max_length} characters")
        elif isinstance(limit, MultipleOf):
            parts.append(f"a multiple of {limit.multiple_of}")
    return " " + " and ".join(parts) if parts else ""


def allowed(field: FieldInfo) -> str:
    """What a key takes, in words: "a whole number of at least 1 and at most 4096, or null"."""
    inner, nullable = _without_none(field.annotation)
    if typing.get_origin(inner) is typing.Literal:
        words = "one of " + ", ".join(str(choice) for choice in typing.get_args(inner))
    elif typing.get_origin(inner) is tuple:
        items = typing.get_args(inner)
        words = f"a list of {'' if Ellipsis in items else f'{len(items)} '}{WORDS[items[0]][1]}"
    else:
        words = WORDS[inner][0] + _bounds(field)
    return words + (", or null" if nullable else "")


def shown(value: Any) -> str:
    """A value in one short piece of text, as it would stand in YAML."""
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def number_hint(value: Any) -> str:
    """For text that looks like a number: how YAML wants it written; else ""."""
    if not isinstance(value, str) or not any(c.isdigit() for c in value):
        return ""
    match = LOOKS_REAL.fullmatch(value)
    if match is None:
        return ""
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    if exponent is None:
        return f"Write {value} without quotes."
    plain = f"{sign}{whole or 0}{fraction or '.0'}e{exponent_sign or '+'}{exponent}"
    return f"Write {plain} without quotes: YAML takes {value} for text."
