"""Loads presets: file, what it extends, environment and `--set`, validated, each value with its source."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rtdmd_cli.config import strict_yaml
from rtdmd_cli.config.fields import (
    KeyPath,
    allowed,
    dotted,
    keys,
    nearest_key,
    number_hint,
    sections,
    shown,
    takes_text,
)
from rtdmd_cli.config.planned import Planned, planned
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.errors import EnvironmentFailure, UsageError

ENVIRONMENT_PREFIX = "RTDMD_SET_"
OWN_KEYS = frozenset({("name",), ("description",)})  # of one file, not inherited
MAX_CHAIN = 16
"""Presets that extend one another."""
PYTHON_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
LIST_HINT = "List the shipped presets: rtdmd presets list"


@dataclass(frozen=True)
class PresetInfo:
    """One shipped preset. planned: what its header says that it takes; None for the built-in model's."""

    name: str
    description: str
    path: Path
    family: str
    planned: Planned | None


@dataclass(frozen=True)
class Resolved:
    """A validated preset, the source of every value by dotted key, and the hash of all values.

    Sources: "default", "preset NAME", "environment", "--set".
    """

    preset: Preset
    sources: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class _Setting:
    """A value before validation; `source` is shown to the user as such, `where` in messages."""

    value: Any
    source: str
    where: str


_Layer = dict[KeyPath, _Setting]


def preset_folder() -> Path:
    """The shipped presets: rtdmd_cli/presets in an installed wheel, else presets/ of the checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "presets", package.parent / "presets"):
        if any(folder.glob("*.yaml")):
            return folder
    raise EnvironmentFailure(
        "The shipped presets are missing from this installation.", "Install rtdmd again."
    )


def _stem(path: Path) -> str:
    return path.stem


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(preset_folder().glob("*.yaml"), key=_stem)}


def preset_path(name_or_path: str, base: Path = Path(), where: str = "") -> Path:
    """The file of a shipped preset's name or of a path (relative to `base`).

    Text with a slash, or ending in .yaml or .yml, is a path; other text is a shipped name first, then a file.
    Raises UsageError, with `where` in its message, for a name that is neither.
    """
    path = base / Path(name_or_path)
    if "\0" in name_or_path:
        raise UsageError("A preset's name or path holds a NUL character.", LIST_HINT)
    if path.suffix in (".yaml", ".yml") or len(Path(name_or_path).parts) > 1 or os.sep in name_or_path:
        return path
    names = _shipped()
    if name_or_path in names:
        return names[name_or_path]
    if name_or_path and os.path.isfile(path):  # unlike Path.is_file, False for a name too long
        return path
    nearest = max(names, key=lambda name: SequenceMatcher(None, name_or_path, name).ratio())
    raise UsageError(f"There is no preset `{name_or_path}`; the nearest is `{nearest}`{where}.", LIST_HINT)


def preset_text(name_or_path: str) -> str:
    """The text of a preset's file, not validated. Raises UsageError, EnvironmentFailure."""
    return strict_yaml.read_text(preset_path(name_or_path))


def preset_names() -> list[str]:
    """The names of the shipped presets, in order; no file is read."""
    return list(_shipped())


def list_presets() -> list[PresetInfo]:
    """The shipped presets by name, each read and checked, which takes half a second."""
    found = []
    for name, path in _shipped().items():
        preset = load_preset(name, environ={}).preset
        figures = planned(strict_yaml.read_text(path))
        found.append(PresetInfo(name, preset.description, path, preset.model.family, figures))
    return found


def _label(path: Path) -> str:
    return path.stem if path.parent == preset_folder() else str(path)


def _unknown(path: KeyPath, where: str, example: str, section: bool = False) -> UsageError:
    nearest = nearest_key(path, section)
    if dotted(path) == nearest:  # `distill.batch: 8` at the left margin of a file
        parent, _, last = nearest.rpartition(".")
        return UsageError(
            f"The key `{nearest}` is written with dots ({where}).",
            f"Write `{last}:` indented below `{parent}:`.",
        )
    return UsageError(
        f"Unknown key `{dotted(path)}` ({where}); the nearest key is `{nearest}`.",
        f"See every key: rtdmd presets show {example} --resolved",
    )


def _flatten(document: strict_yaml.Document, path: Path) -> _Layer:
    """The document's values by key. Raises UsageError for unknown keys, and for a value where a section belongs."""
    source, layer = f"preset {_label(path)}", {}

    def visit(data: dict[str, Any], prefix: KeyPath) -> None:
        for name, value in data.items():
            key = (*prefix, name)
            where = f"{path}, line {document.lines[key]}"
            if key in keys():
                layer[key] = _Setting(value, source, where)
            elif key not in sections():
                raise _unknown(key, where, "shapes-4step", isinstance(value, dict))
            elif not isinstance(value, dict):
                raise UsageError(
                    f"`{dotted(key)}` is a section and cannot be {shown(value)} ({where}).",
                    f"Write its keys indented below `{name}:`, or remove the line.",
                )
            else:
                visit(value, key)

    visit(document.data, ())
    return layer


def _file_layer(path: Path, seen: tuple[Path, ...] = ()) -> _Layer:
    """The values of a file on top of those it extends. Raises UsageError, also for a cycle."""
    document = strict_yaml.read_document(path)
    data = dict(document.data)
    parent = data.pop("extends", None)
    inherited: _Layer = {}
    if "extends" in document.data:
        where = f"{path}, line {document.lines[('extends',)]}"
        if not isinstance(parent, str):
            raise UsageError(
                f"`extends` must be the name or path of a preset, not {shown(parent)} ({where}).", LIST_HINT
            )
        chain = (*seen, path.resolve())
        if len(chain) > MAX_CHAIN:
            raise UsageError(
                f"More than {MAX_CHAIN} presets extend one another ({where}).",
                "Write what they say into one file.",
            )
        parent_path = preset_path(parent, path.parent, f" ({where})")
        if parent_path.resolve() in chain:
            raise UsageError(
                f"`extends: {parent}` leads back to the preset itself ({where}).", "Remove one `extends`."
            )
        inherited = {
            key: value for key, value in _file_layer(parent_path, chain).items() if key not in OWN_KEYS
        }
    own = _flatten(strict_yaml.Document(data, document.lines), path)
    if not seen and ("name",) not in own:
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:64]
        stem = stem if re.match(r"[A-Za-z0-9]", stem) else f"preset{stem}"[:64]
        own[("name",)] = _Setting(stem, f"preset {_label(path)}", str(path))
    return inherited | own


def _typed(text: str, key: KeyPath, where: str) -> Any:
    """The value of `--set` or the environment: text for a text key, else a YAML scalar or Python number."""
    is_text, nullable = takes_text(keys()[key])
    if is_text and not text.startswith(("'", '"')):
        return None if nullable and text in ("null", "~") else text
    value = strict_yaml.parse_value(text, where, f"The key takes {allowed(keys()[key])}.")
    if is_text:
        return value
    if isinstance(value, list):
        return [_python_number(item) for item in value]
    return _python_number(value)


def _python_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and PYTHON_FLOAT.fullmatch(value) else value


def _override_layer(overrides: Sequence[str], example: str) -> _Layer:
    """The values of `--set key=value`; the last of a repeated key counts. Raises UsageError."""
    layer: _Layer = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        key = tuple(name.strip().split("."))
        where = f"--set {name.strip()}"
        if not equals:
            raise UsageError(
                f"`--set {text}` has no value.",
                "Write it as --set key=value, as in --set distill.iterations=100",
            )
        if key in sections():
            inside = next(known for known in keys() if known[: len(key)] == key)
            raise UsageError(
                f"`{dotted(key)}` is a section, not a key (--set).",
                f"Name a key of it, as in --set {dotted(inside)}=...",
            )
        if key not in keys():
            raise _unknown(key, "--set", example)
        layer[key] = _Setting(_typed(value.strip(), key, where), "--set", "--set")
    return layer


def check_overrides(overrides: Sequence[str], example: str) -> None:
    """UsageError where a `--set` text names no key or has no value that can be read; `example` is a preset for the hint.

    For a command line whose preset is not known yet: whether the values fit is seen by `load_preset`.
    """
    _override_layer(overrides, example)


def _environment_layer(environ: Mapping[str, str], example: str) -> _Layer:
    """The values of RTDMD_SET_<SECTION>__<KEY> variables. Raises UsageError."""
    names = {ENVIRONMENT_PREFIX + "__".join(key).upper(): key for key in keys()}
    layer: _Layer = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in names:
            key = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            nearest = nearest_key(key)
            wanted = ENVIRONMENT_PREFIX + nearest.replace(".", "__").upper()
            raise UsageError(
                f"The environment variable {variable} names no key; the nearest is `{nearest}` ({wanted}).",
                f"See every key: rtdmd presets show {example} --resolved",
            )
        key = names[variable]
        where = f"environment variable {variable}"
        layer[key] = _Setting(_typed(environ[variable].strip(), key, where), "environment", where)
    return layer


def _explain(error: ErrorDetails, layer: _Layer) -> UsageError:
    """One sentence for pydantic's first error."""
    location = tuple(str(part) for part in error["loc"])
    key = next((location[:n] for n in range(len(location), 0, -1) if location[:n] in keys()), None)
    if key is None:  # a rule between the keys of a section
        assert error["type"] == "value_error", error
        return UsageError(f"{error['ctx']['error']}.", "Change one of the two.")
    if error["type"] == "missing" and location == key:
        return UsageError(
            f"The preset has no `{dotted(key)}`.",
            "Give it that key, or begin the file with `extends: shapes-4step`.",
        )
    field, setting = keys()[key], layer[key]
    own_words = error["type"] == "value_error"
    requirement = str(error["ctx"]["error"]) if own_words else f"must be {allowed(field)}"
    hint = number_hint(setting.value) or f"{dotted(key)}: {field.description}."
    return UsageError(f"`{dotted(key)}` {requirement}, not {shown(setting.value)} ({setting.where}).", hint)


def _validate(layer: _Layer) -> Preset:
    nested: dict[str, Any] = {}
    for key, setting in layer.items():
        section = nested
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = setting.value
    nested.setdefault("model", {})  # so that its missing keys are named, not the section
    try:
        return Preset.model_validate(nested)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], layer) from error


def preset_values(preset: Preset) -> dict[str, Any]:
    """Every value by dotted key, in the order of the schema, as JSON types."""
    data = preset.model_dump(mode="json")
    values: dict[str, Any] = {}
    for key in keys():
        value: Any = data
        for name in key:
            value = value[name]
        values[dotted(key)] = value
    return values


def preset_sha256(preset: Preset) -> str:
    """The hash of all values but name and description, which do not change what is computed."""
    values = {
        key: value for key, value in preset_values(preset).items() if key not in ("name", "description")
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def dump_resolved(preset: Preset) -> str:
    """YAML of every value; `load_preset` reads it back to an equal preset."""
    return strict_yaml.dump(preset.model_dump(mode="json"))


def load_preset(
    name_or_path: str, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Resolved:
    """The preset of a shipped name or a file, with `--set` texts and the environment applied.

    environ: None for the process's own. Order: overrides, environment, preset, default.
    Raises UsageError; EnvironmentFailure for an unreadable file.
    """
    layer = _file_layer(preset_path(name_or_path))
    layer |= _environment_layer(os.environ if environ is None else environ, name_or_path)
    layer |= _override_layer(overrides, name_or_path)
    preset = _validate(layer)
    sources = {dotted(key): layer[key].source if key in layer else "default" for key in keys()}
    return Resolved(preset, sources, preset_sha256(preset))
