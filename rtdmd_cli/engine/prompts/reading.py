"""Reads prompts: files, folders, standard input, the public sets, the captions of the built-in world. No torch."""

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rtdmd_cli.engine.prompts.public_sets import PREFIX, DataSet, find_data
from rtdmd_cli.engine.prompts.store import Stored, made_here, require
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.errors import DataError, UsageError
from rtdmd_cli.shapes.prompts import benchmark, training_captions

BUILTIN = "builtin:shapes"
BUILTIN_BENCHMARK = "builtin:shapes-benchmark"
BUILTIN_DRAWS, BUILTIN_SEED = 4_000, 0
MAX_CHARACTERS = 10_000
"""Longest line of a prompt file."""

_MAX_LINE = 4 * MAX_CHARACTERS + 8  # bytes: UTF-8 takes four at most; byte order mark and line end beside
MAX_BYTES = 256 * 1024**2
MAX_PROMPTS = 1_000_000
MAX_BRACKETS = 4_000_000
"""Opening brackets of a file: each may be a value that takes fifty times its own size in memory."""
TABLES = {".csv": ",", ".tsv": "\t"}
"""Ending of a table -> what stands between its columns."""
COLUMNS = ("prompt", "caption", "text")  # of a table, the first that is there
SUFFIXES = (".txt", ".json", ".jsonl", *TABLES)
"""Of the files that are read, in small letters; a name without an ending is taken for text."""
OPTION = re.compile(r"(?:^|\s)(--[A-Za-z][\w-]*)(?:[\s=]\S|$)")
"""What looks like an option of another tool, as in kohya's `a cat --w 512`."""
USUAL_NAMES = frozenset({"train", "train_metadata", "prompts"})
_HINT = "A prompt file is UTF-8 text with one prompt a line."
_JSON_HINT = 'A .json file holds one list, of texts or of objects as in {"prompt": "a photo of a dog"}.'
_TABLE_HINT = (
    f"The first line of a table names its columns, one of them {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}."
)
_JSONL_HINT = 'A .jsonl file holds one object a line, as in {"prompt": "a photo of a dog"}.'

log = logging.getLogger(__name__)


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
    """The prompts that `source` names, and what is known of each.

    "builtin:shapes" (training) and "builtin:shapes-benchmark" (held out); "data:NAME", a public set of
    `public_sets` that has been fetched; or a path: a .jsonl file (one object a line, its `prompt` the text, the
    rest metadata), a .json file (a list of such objects or of texts), a .csv or .tsv file (its first line names the columns,
    one of them `prompt`, `caption` or `text`; the rest metadata), a .txt file or one without an ending (UTF-8 text, one
    prompt a line; blanks around it, blank lines, lines that begin with # and a byte order mark are dropped), or a folder that
    holds one of these. Endings count without regard to case. The log says what was left out and what looks like options.

    Raises DataError, naming the line or the prompt's number, for text that is not UTF-8, a NUL character, a line of
    more than 10,000 characters, and an entry without a text `prompt`; DataError for a file that is missing, holds no
    prompt or is no JSON; UsageError for an unknown built-in or public set; EnvironmentFailure for a file that can't be
    read and a public set that has not been fetched. DataError for a file with another ending, and for lone carriage returns.
    """
    if source == BUILTIN:
        return _plain(builtin_prompts())
    if source == BUILTIN_BENCHMARK:
        return _plain([caption.text for caption in benchmark()])
    if source.startswith("builtin:"):
        raise UsageError(
            f"There are no built-in prompts {source}.", f"Built in: {BUILTIN}, {BUILTIN_BENCHMARK}."
        )
    if source.startswith(PREFIX):
        return _public(find_data(source))
    path = Path(source).expanduser()
    with os_errors(path, "read"):
        path = _only_file(path) if path.is_dir() else path
        found = _read_file(path)
    _say_options(found.texts, str(path))
    return found


def evenly_chosen(prompts: PromptSet, count: int) -> PromptSet:
    """`count` prompts, evenly spread over the set, or all of them."""
    count = min(count, len(prompts))
    return prompts.pick([(2 * i + 1) * len(prompts) // (2 * count) for i in range(count)])


def read_prompts(source: str, stdin: BinaryIO | None = None) -> Sequence[str]:
    """The texts alone, and where `stdin` is given and `source` is "-", its lines. Errors as `read_prompt_set`."""
    if source == "-" and stdin is not None:
        lines = _prompts(stdin, "standard input")
        _say_options(lines, "standard input")
        return lines
    return read_prompt_set(source).texts


def read_stored(found: Stored) -> PromptSet:
    """The prompts of a public set that lies on this machine; each once, sorted, where its file repeats them.

    Its text is read as the published programs do: what begins with # is a prompt, and a lone carriage return ends a line.
    """
    prompts = _read_file(found.path, published=True)
    if not found.data.distinct:
        return prompts
    first = {text: index for index, text in reversed(list(enumerate(prompts.texts)))}
    return prompts.pick([first[text] for text in sorted(first)])


def _public(data: DataSet) -> PromptSet:
    if data.url:
        return read_stored(require(data))
    made = made_here(data)
    return PromptSet(
        [each["prompt"] for each in made],
        [{key: value for key, value in each.items() if key != "prompt"} for each in made],
    )


def _plain(texts: Sequence[str]) -> PromptSet:
    return PromptSet(texts, [{}] * len(texts))


def _only_file(folder: Path) -> Path:
    """The prompt file of a folder: the only one, or the only one with a usual name. DataError otherwise."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    found = sorted(path for path in visible if path.suffix.lower() in SUFFIXES)
    usual = [path for path in found if path.stem in USUAL_NAMES]
    for chosen in (found, usual):
        if len(chosen) == 1:
            return chosen[0]
    if not found:
        raise DataError(f"There is no prompt file in {folder}.", f"It holds no {', '.join(SUFFIXES)}.")
    names = ", ".join(path.name for path in (usual or found)[:5])
    raise DataError(
        f"{folder} holds several prompt files: {names}.", f"Name one, as in {folder / found[0].name}"
    )


def _read_file(path: Path, published: bool = False) -> PromptSet:
    name, ending = str(path), path.suffix.lower()
    try:
        with strict_json.open_regular(path) as file:
            if ending == ".json":
                return _entries(_json_list(file, name), name, _JSON_HINT)
            if ending in TABLES:
                return _entries(_rows(file, name, TABLES[ending]), name, _TABLE_HINT)
            if ending and ending not in SUFFIXES:
                raise DataError(
                    f"{name} ends in {path.suffix}, which is not the ending of a prompt file.",
                    f"Use one of {', '.join(SUFFIXES)}: rename the file if it is text with one prompt a line.",
                )
            if ending == ".jsonl":
                return _entries(_json_lines(_prompts(file, name, comments=False), name), name, _JSONL_HINT)
            return _plain(_prompts(file, name, comments=not published, returns=published))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"There is no prompt file {path}.", "Check the path.") from error
    except strict_json.BadJson as error:
        raise DataError(f"{path} can't be read: {error}.", "Write the prompts to a file first.") from error


def _json_list(file: BinaryIO, name: str) -> Iterator[Any]:
    """The entries of a .json file; a text stands for an object that holds nothing else."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise _too_much(name)
    number = 0
    try:
        for number, (entry, brackets) in enumerate(strict_json.read_list(file), 1):
            _require_few(number, brackets, name)
            yield {"prompt": entry} if isinstance(entry, str) else entry
    except strict_json.BadJson as error:
        where = f", after prompt {number}" if number else ""
        raise DataError(f"{name} can't be read{where}: {error}.", _JSON_HINT) from error
    if not number:
        raise DataError(f"{name} holds no prompts.", _JSON_HINT)


def _rows(file: BinaryIO, name: str, between: str) -> Iterator[Any]:
    """The rows of a table as objects with a `prompt`; other columns that hold something are metadata."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise _too_much(name)
    try:
        text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
        reader = csv.DictReader(text, delimiter=between, strict=True)
        names = {str(column).strip().lower(): column for column in reader.fieldnames or ()}
        column = next((names[each] for each in COLUMNS if each in names), None)
        if column is None:
            raise DataError(
                f"{name} has no column called {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}.", _TABLE_HINT
            )
        for number, row in enumerate(reader, 1):
            _require_few(number, 0, name)
            rest = {key: value for key, value in row.items() if key not in (column, None) and value}
            yield rest | {"prompt": row[column]}
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text.", _TABLE_HINT) from error
    except csv.Error as error:
        raise DataError(f"{name} can't be read as a table: {error}.", _TABLE_HINT) from error


def _json_lines(lines: Sequence[str], name: str) -> Iterator[Any]:
    brackets = 0
    for number, line in enumerate(lines, 1):
        brackets += strict_json.brackets(line)
        _require_few(number, brackets, name)
        try:
            yield strict_json.parse(line)
        except strict_json.BadJson as error:
            raise DataError(f"{name}: prompt {number} can't be read: {error}.", _JSONL_HINT) from error


def _require_few(prompts: int, brackets: int, name: str) -> None:
    if prompts > MAX_PROMPTS or brackets > MAX_BRACKETS:
        raise _too_much(name)


def _too_much(name: str) -> DataError:
    return DataError(
        f"{name} holds more than {MAX_PROMPTS:,} prompts or {MAX_BYTES // 1024**2} MB, or too much about them.",
        "Take a part of it.",
    )


def _entries(entries: Iterable[Any], name: str, hint: str) -> PromptSet:
    """Objects with a text `prompt`; DataError, naming the first by its number, for others."""
    texts, metadata = [], []
    for number, entry in enumerate(entries, 1):
        prompt = entry.pop("prompt", None) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{name}: prompt {number} has no text `prompt`.", hint)
        if "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise DataError(f"{name}: prompt {number} holds a character that is no text.", hint)
        if len(prompt) > MAX_CHARACTERS:
            raise DataError(f"{name}: prompt {number} has more than {MAX_CHARACTERS:,} characters.", hint)
        texts.append(prompt.strip())
        metadata.append(entry)
    return PromptSet(texts, metadata)


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


def _prompts(stream: BinaryIO, name: str, comments: bool = True, returns: bool = False) -> list[str]:
    """comments: whether lines that begin with # are left out. returns: whether a lone carriage return ends a line."""
    prompts, left_out = [], 0
    for line in _lines(stream, name, returns):
        if comments and line.startswith("#"):
            left_out += 1
        elif line:
            prompts.append(line)
            _require_few(len(prompts), 0, name)
    if left_out:
        log.warning("%s: %d lines begin with # and are left out as comments", name, left_out)
    if not prompts:
        raise DataError(f"{name} holds no prompts.", _HINT)
    return prompts


def _say_options(texts: Sequence[str], name: str) -> None:
    """Say what looks like options of another tool: they are words of the prompt here."""
    found = [match for match in map(OPTION.search, texts) if match]
    if found:
        log.warning(
            "%s: %d of %d prompts hold what looks like options (%s); they are read as words of the prompt",
            *(name, len(found), len(texts), found[0][1]),
        )


def _lines(stream: BinaryIO, name: str, returns: bool) -> Iterator[str]:
    """Every line, stripped. Reads no further than a line that is too long."""
    number, read = 0, 0
    while raw := stream.readline(_MAX_LINE):
        number, read = number + 1, read + len(raw)
        if read > MAX_BYTES:
            raise _too_much(name)
        where = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            if len(raw) == _MAX_LINE:  # maybe cut inside a character
                raise _too_long(where) from error
            raise DataError(f"{where}: the text is not UTF-8.", _HINT) from error
        if len(line) > MAX_CHARACTERS:
            raise _too_long(where)
        if "\0" in line:
            raise DataError(f"{where}: the line holds a NUL character.", _HINT)
        if "\r" in line and not returns:
            raise DataError(
                f"{where}: its lines end in lone carriage returns.",
                "Convert it: tr '\\r' '\\n' < FILE > NEW_FILE",
            )
        yield from (part.strip() for part in line.split("\r"))


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: the line has more than {MAX_CHARACTERS:,} characters.", _HINT)
