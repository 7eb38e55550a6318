"""Sums by which an evaluation knows its own pictures, scores and times again.

    pictures.jsonl    {"exact": ..., "image": 0, "png": ..., "prompt": 0} of every picture that was made

A file that does not fit its sum was damaged, swapped or changed by hand. The sums are no signatures: somebody who changes a
file and writes a new sum is not noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.evaluation.prompts import Key
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.files import append_line, write_bytes

PICTURES = "pictures.jsonl"
CHECK = "check"
KINDS = ("png", "exact")
"""Of files that a picture has."""


def with_check(entry: Mapping[str, Any], of: str) -> dict[str, Any]:
    """A line with the sum of all it says. of: what it belongs to, so that it fits nowhere else."""
    return {**entry, CHECK: _sum(entry, of)}


def fits(entry: Mapping[str, Any], of: str) -> bool:
    """Whether a line says what `with_check` was given."""
    return entry.get(CHECK) == _sum({key: value for key, value in entry.items() if key != CHECK}, of)


def _sum(entry: Mapping[str, Any], of: str) -> str:
    text = json.dumps([of, dict(entry)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def contents_sum(path: Path) -> str:
    """sha256 of a file's contents. EnvironmentFailure where it can't be read."""
    with os_errors(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PictureSums:
    """The sums of a folder's pictures, and the file they are kept in (None: nowhere).

    known: by key, the sum of the PNG as "png" and, where there are unrounded values, of these as "exact".
    """

    path: Path | None
    known: dict[Key, dict[str, str]]

    @classmethod
    def open(cls, folder: Path) -> PictureSums:
        """What `folder` tells, less lines that are damaged, which are dropped from its file."""
        path = folder / PICTURES
        lines = strict_json.read_lines(path)
        good = [(raw, line) for raw, line in lines if line is not None and _is_sum(line)]
        if len(good) < len(lines):
            write_bytes(path, b"".join(raw for raw, _ in good))
        return cls(path, dict(_by_key(good)))

    @classmethod
    def read_only(cls, folder: Path) -> PictureSums:
        """As `open`, for a folder that is left as it is; nothing where it is not one of an evaluation."""
        lines = strict_json.read_lines(folder / PICTURES)
        return cls(
            None, dict(_by_key([(raw, line) for raw, line in lines if line is not None and _is_sum(line)]))
        )

    def add(self, key: Key, sums: dict[str, str]) -> None:
        """Note what a picture is, where that is not known yet."""
        if self.known.get(key) != sums:
            self.known[key] = sums
            if self.path is not None:
                entry = {"prompt": key[0], "image": key[1], **sums}
                append_line(self.path, json.dumps(entry, sort_keys=True))


def _by_key(lines: list[tuple[bytes, dict[str, Any]]]) -> Iterator[tuple[Key, dict[str, str]]]:
    for _, line in lines:
        yield (line["prompt"], line["image"]), {kind: line[kind] for kind in KINDS if kind in line}


def _is_sum(line: Mapping[str, Any]) -> bool:
    whole = all(type(line.get(name)) is int for name in ("prompt", "image"))
    return whole and "png" in line and all(isinstance(line.get(kind, ""), str) for kind in KINDS)
