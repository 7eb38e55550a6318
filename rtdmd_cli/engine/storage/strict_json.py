"""The JSON that is read from files: Python's parser without anything that could surprise.

Refused: what is no regular file (a pipe would be waited for), too many bytes or levels, text that is not UTF-8, the same
key twice, NaN and infinity, numbers beyond a float's range or of more than 40 digits, half of a surrogate pair. What was
read can be counted with, compared, printed and written again.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import DataError

MAX_BYTES = 16 * 1024**2
"""Of a file that is read whole."""
MAX_LINE = 1024**2
"""Bytes of a line, characters of an entry of a list."""
MAX_LINES_BYTES = 256 * 1024**2
"""Of a file that is read line by line."""
MAX_BRACKETS = 1_000_000
"""Lists and objects of a text: one of two bytes takes a hundred in memory."""
MAX_DEPTH = 32
MAX_DIGITS = 40  # tokenizers write "no limit" as a number of 31 digits

_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"
_BLANK = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """Not JSON, or none that is read here; the text is the reason, to follow "FILE is damaged:"."""


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadJson(f"it has a number of more than {MAX_DIGITS} digits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BadJson("it has a number that is too large")
    return number


def _constant(name: str) -> float:
    raise BadJson(f"{name} is not JSON")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadJson(f"the key {twice!a:.60} stands there twice")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_whole, parse_float=_real, parse_constant=_constant, object_pairs_hook=_object
)


def parse(data: bytes | str) -> Any:
    """The value of a JSON text. BadJson, with the reason, for anything else."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        if brackets(text) > MAX_BRACKETS:
            raise BadJson("it holds too many values")
        return _checked(_DECODER.decode(text), text)
    except UnicodeDecodeError as error:
        raise BadJson("the text is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadJson(f"it is not JSON (line {error.lineno})") from error
    except RecursionError as error:
        raise BadJson(_TOO_DEEP) from error


def brackets(text: str) -> int:
    """How many lists and objects a text holds at most."""
    return text.count("[") + text.count("{")


def _checked(value: Any, text: str) -> Any:
    """The value, if it is not too deep and all its text can be written."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise BadJson(_TOO_DEEP)
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadJson("it holds half of a surrogate pair") from error
    return value


def open_regular(path: Path) -> BinaryIO:
    """A file, to be read. OSError as `open`; BadJson for what is neither a file nor a folder, which isn't waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(f"{path} is a folder")
            raise BadJson("it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file. OSError where it can't be read; BadJson for more than `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadJson(f"it is larger than {limit // 1024**2} MB")
    return data


def read(path: Path, limit: int = MAX_BYTES) -> Any:
    """The value that a file of at most `limit` bytes holds. OSError where it can't be read, BadJson for anything else."""
    return parse(read_bytes(path, limit))


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line's bytes, and its object, or None where it is damaged: no line end, no JSON object, too long.

    Nothing where there is no file; of a line that is too long only the beginning is given. EnvironmentFailure where the
    file can't be read; DataError for more than 256 MB in all, and for what is no regular file.
    """
    if not os.path.lexists(path):
        return []
    try:
        with os_errors(path, "read"), open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_LINES_BYTES:
                raise BadJson(f"it is larger than {MAX_LINES_BYTES // 1024**2} MB")
            return [(raw, _line(raw)) for raw in _raw_lines(file)]
    except BadJson as error:
        raise DataError(f"{path} is damaged: {error}.", "Move it away; what it says is lost.") from error


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    while raw := file.readline(MAX_LINE):
        yield raw
        while len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE)


def _line(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        entry = parse(raw)
    except BadJson:
        return None
    return entry if isinstance(entry, dict) else None


def read_list(stream: BinaryIO) -> Iterator[tuple[Any, int]]:
    """The entries of a file that holds one list, each as soon as it is read: the file is never whole in memory.

    With each comes the number of `brackets` up to its end. BadJson for anything else, and for an entry of more than a
    million characters.
    """
    text = _Text(stream)
    if text.take() != "[":
        raise BadJson("it holds no list")
    found = 0
    end = text.take() if text.next() == "]" else ","
    while end == ",":
        value, part = text.entry()
        found += brackets(part)
        yield value, found
        end = text.take()
    if end != "]" or text.next():
        raise BadJson("it is not JSON")


class _Text:
    """The text of a stream: a part is held in memory, and is still to be read from `position` on."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.held, self.position, self.ended = "", 0, False

    def more(self) -> bool:
        """Hold more of the text; False at its end."""
        if self.ended:
            return False
        data = self.stream.read(MAX_LINE)
        self.ended = not data
        try:
            self.held = self.held[self.position :] + self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise BadJson("the text is not UTF-8") from error
        self.position = 0
        return True

    def next(self) -> str:
        """The next character that is no blank, or "" at the end."""
        while True:
            blank = _BLANK.match(self.held, self.position)
            self.position = blank.end() if blank else self.position
            if self.position < len(self.held) or not self.more():
                return self.held[self.position : self.position + 1]

    def take(self) -> str:
        """As `next`, and pass it."""
        found = self.next()
        self.position += len(found)
        return found

    def entry(self) -> tuple[Any, str]:
        """The next value, which is passed, and its text."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.held, self.position)
            except json.JSONDecodeError:  # perhaps only cut off
                end = len(self.held)
            except RecursionError as error:
                raise BadJson(_TOO_DEEP) from error
            else:
                if end < len(self.held) or self.ended:
                    text, self.position = self.held[self.position : end], end
                    return _checked(value, text), text
            if end - self.position > MAX_LINE:
                raise BadJson("it is not JSON, or an entry is too long")
            if not self.more():
                raise BadJson("it is not JSON")
