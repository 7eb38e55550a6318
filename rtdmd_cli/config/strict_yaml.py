"""The YAML that presets are written in: PyYAML's safe loader without anything that could surprise.

Refused: duplicate keys, anchors and aliases, tags, several documents, deep nesting, numbers in other
notations than the decimal one, files over 256 KB or not in UTF-8. Dates and merge keys are plain text.
Every failure is a UsageError with the line.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rtdmd_cli.errors import EnvironmentFailure, UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_NODES = 10_000

# Decimal only: YAML 1.1 would read 010 as 8 and 1:30 as 90.
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,29})")
REAL = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A file's mapping, and the line (from 1) on which each key stands."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]


def _refuse(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader that refuses anchors, aliases, tags and large trees while it composes nodes."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None:  # an alias's event has the name of its anchor
            raise _refuse("anchors and aliases (`&name`, `*name`) are not allowed", event.start_mark)
        if event.tag is not None:
            raise _refuse("tags (`!name`) are not allowed", event.start_mark)
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise _refuse("there are more or deeper entries than a preset can have", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """The value of a scalar: null, a truth value, a number, else its text."""
        kind = node.tag.rpartition(":")[2]
        if kind == "int" and not INTEGER.fullmatch(node.value):
            raise _refuse("whole numbers are written in plain decimal digits", node.start_mark)
        if kind == "float" and not REAL.fullmatch(node.value):
            raise _refuse("numbers are written in plain decimal notation", node.start_mark)
        if kind in ("null", "bool", "int", "float"):
            return self.construct_object(node)
        return node.value

    def mapping(self, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
        """The mapping of a node; keys are taken as text."""
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refuse("a key must be plain text", key_node.start_mark)
            key = key_node.value
            if key in result:
                raise _refuse(f"the key `{'.'.join((*path, key))}` stands there twice", key_node.start_mark)
            lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*path, key), lines)
        return result

    def value(self, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
        """The Python value of any node."""
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, path, lines) for item in node.value]
        return self.mapping(node, path, lines)


def _parse(text: str, label: str, hint: str, numbered: bool = True) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a YAML text, None where it is empty; `label` (and the line, if numbered) names it."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            return (None if node is None else loader.value(node, (), lines)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None and numbered else ""
        cause = f"{error.context}, {error.problem}" if error.problem.startswith("but ") else error.problem
        raise UsageError(f"{label}{where}: {cause}.", hint) from error
    except yaml.reader.ReaderError as error:
        raise UsageError(f"{label}: it holds the control character #x{error.character:02x}.", hint) from error


def parse_value(text: str, label: str, hint: str) -> Any:
    """The value of one YAML scalar or one-line list, as typed after `--set key=`. Raises UsageError."""
    return _parse(text, label, hint, numbered=False)[0]


def read_text(path: Path) -> str:
    """The text of a preset file.

    Raises UsageError (absent, over 256 KB, not UTF-8), EnvironmentFailure (unreadable).
    """
    copy_hint = "Start from a shipped preset: rtdmd presets copy shapes-4step FILE"
    try:
        if not path.exists():
            raise UsageError(
                f"There is no preset file {path}.", "List the shipped presets: rtdmd presets list"
            )
        if not path.is_file():
            raise UsageError(f"{path} is not a file.", copy_hint)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EnvironmentFailure(
            f"The preset {path} cannot be read ({reason}).", "Check its permissions."
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} is larger than the 256 KB a preset may have.", copy_hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: the text is not UTF-8.", "Save the file as UTF-8.") from error


def read_document(path: Path) -> Document:
    """The mapping a preset file holds.

    Raises as `read_text`, and UsageError for text that is not a strict YAML mapping.
    """
    hint = f"Correct the file, then check it: rtdmd presets validate {path}"
    data, lines = _parse(read_text(path), str(path), hint)
    if data is None:
        raise UsageError(f"{path} is empty.", "Give it one line at least: extends: shapes-4step")
    if not isinstance(data, dict):
        raise UsageError(f"{path} does not hold `key: value` lines.", hint)
    return Document(data, lines)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Lists on one line, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def dump(data: dict[str, Any]) -> str:
    """YAML text that `read_document` reads back to the same values."""
    return str(
        yaml.dump(
            data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False
        )
    )
