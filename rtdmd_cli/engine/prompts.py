"""Reads prompts: a text file, standard input, or the training captions of the built-in world. No torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rtdmd_cli.engine.runtime.files import os_errors
from rtdmd_cli.errors import DataError, UsageError
from rtdmd_cli.shapes.prompts import benchmark, training_captions

BUILTIN = "builtin:shapes"
BUILTIN_BENCHMARK = "builtin:shapes-benchmark"
BUILTIN_DRAWS, BUILTIN_SEED = 4_000, 0
MAX_CHARACTERS = 10_000
"""Longest line of a prompt file."""

_MAX_BYTES = (
    4 * MAX_CHARACTERS + 8
)  # of a line: UTF-8 takes four at most; byte order mark and line end beside
_HINT = "A prompt file is UTF-8 text with one prompt a line."
_JSONL_HINT = 'A .jsonl file holds one object a line, as in {"prompt": "a photo of a dog"}.'


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what else is known of each: a mapping that is empty for plain text."""

    texts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, indices: Sequence[int]) -> "PromptSet":
        """These prompts, in this order."""
        return PromptSet([self.texts[i] for i in indices], [self.metadata[i] for i in indices])


def known_by(*sets: PromptSet) -> str:
    """The sha256 of sets of prompts: texts and metadata, in their order."""
    everything = [[list(prompts.texts), [dict(known) for known in prompts.metadata]] for prompts in sets]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def read_prompt_set(source: str) -> PromptSet:
    """As `read_prompts`, and from a .jsonl file: one object a line, its `prompt` the text, the rest metadata.

    Raises as `read_prompts`, and DataError, naming the prompt by its number, for a line that is no object with a text
    `prompt`, and for a text with a NUL character or half a surrogate pair.
    """
    lines = read_prompts(source)
    if not source.endswith(".jsonl"):
        return PromptSet(lines, [{}] * len(lines))
    texts, metadata = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: prompt {number} is not JSON.", _JSONL_HINT) from error
        prompt = entry.pop("prompt", None) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{source}: prompt {number} has no text `prompt`.", _JSONL_HINT)
        if "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise DataError(f"{source}: prompt {number} holds a character that is no text.", _JSONL_HINT)
        texts.append(prompt.strip())
        metadata.append(entry)
    return PromptSet(texts, metadata)


def read_prompts(source: str, stdin: BinaryIO | None = None) -> list[str]:
    """The prompts of a built-in set, of a text file, or of `stdin` where it is given and `source` is "-".

    Built in are "builtin:shapes" (training) and "builtin:shapes-benchmark" (held out).

    In a file: UTF-8, one prompt a line; blanks around it, blank lines and a byte order mark are dropped.
    Raises DataError, naming the line, for text that is not UTF-8, a NUL character or a line of more than
    10,000 characters, and for a file that is missing or holds no prompt; UsageError for an unknown built-in
    set; EnvironmentFailure for a file that can't be read.
    """
    if source == BUILTIN:
        return builtin_prompts()
    if source == BUILTIN_BENCHMARK:
        return [caption.text for caption in benchmark()]
    if source.startswith("builtin:"):
        raise UsageError(
            f"There are no built-in prompts {source}.", f"Built in: {BUILTIN}, {BUILTIN_BENCHMARK}."
        )
    if source == "-" and stdin is not None:
        return _prompts(stdin, "standard input")
    path = Path(source).expanduser()
    with os_errors(path, "read"):
        try:
            with path.open("rb") as file:
                return _prompts(file, str(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(f"There is no prompt file {path}.", "Check the path.") from error


def builtin_prompts() -> list[str]:
    """4,000 draws of the shapes world's training captions (seed 0), sorted.

    A caption stands as often as it was drawn, which keeps the mix of tasks: among distinct captions the six of
    single_object would be lost.
    """
    return sorted(caption.text for caption in training_captions(BUILTIN_DRAWS, BUILTIN_SEED))


def check_prompt(prompt: str) -> str:
    """A prompt of the command line, without blanks around it. UsageError where a line would be refused."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not valid UTF-8.", "Write it in a terminal set to UTF-8.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty.", 'Describe a picture, as in "a photo of two red circles".')
    if "\0" in prompt or len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"The prompt holds a NUL or more than {MAX_CHARACTERS:,} characters.", "Shorten it.")
    return prompt.strip()


def _prompts(stream: BinaryIO, name: str) -> list[str]:
    prompts = [line for line in _lines(stream, name) if line]
    if not prompts:
        raise DataError(f"{name} holds no prompts.", _HINT)
    return prompts


def _lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """Every line, stripped. Reads no further than a line that is too long."""
    number = 0
    while raw := stream.readline(_MAX_BYTES):
        number += 1
        where = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            if len(raw) == _MAX_BYTES:  # maybe cut inside a character
                raise _too_long(where) from error
            raise DataError(f"{where}: the text is not UTF-8.", _HINT) from error
        if len(line) > MAX_CHARACTERS:
            raise _too_long(where)
        if "\0" in line:
            raise DataError(f"{where}: the line holds a NUL character.", _HINT)
        yield line.strip()


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: the line has more than {MAX_CHARACTERS:,} characters.", _HINT)
