"""The one reader of JSON: what it takes, what it refuses, and that nothing is read past it."""

import ast
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.strict_json import BadJson
from rtdmd_cli.errors import DataError

PACKAGE = Path(__file__).resolve().parents[3] / "rtdmd_cli"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
BAD = {
    "": "it is not JSON",
    "[1,]": "it is not JSON",
    "{} {}": "it is not JSON",
    "[" * 100_000: "nested deeper",
    "[" * 33 + "]" * 33: "nested deeper",
    '{"a":' * 33 + "1" + "}" * 33: "nested deeper",
    "9" * 41: "more than 40 digits",
    "9" * 5_000: "more than 40 digits",
    "1e999": "too large",
    "-1e999": "too large",
    "[NaN]": "NaN is not JSON",
    "[-Infinity]": "-Infinity is not JSON",
    '{"a": 1, "b": 2, "a": 1}': "the key 'a' stands there twice",
    r'["\ud83d"]': "surrogate",
    r'{"\udc00": 1}': "surrogate",
    "[" + "[]," * 1_000_000 + "1]": "too many values",
}


@given(VALUES)
def test_what_python_writes_is_read_back(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert strict_json.parse(text.encode()) == value
        entries = list(strict_json.read_list(io.BytesIO(f" [ {text} , {text}]\n".encode())))
        assert [entry for entry, _ in entries] == [value, value]


@pytest.mark.parametrize(("text", "reason"), BAD.items(), ids=range(len(BAD)))
def test_what_could_surprise_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadJson, match=reason):
        strict_json.parse(text.encode())


@pytest.mark.parametrize("data", [b"\xff", b'"\xed\xa0\x80"', '"a"'.encode("utf-16")])
def test_other_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(BadJson, match="not UTF-8"):
        strict_json.parse(data)
    with pytest.raises(BadJson, match="not UTF-8"):
        list(strict_json.read_list(io.BytesIO(b"[" + data + b"]")))


def test_a_byte_order_mark_a_long_number_and_32_levels_are_fine() -> None:
    assert strict_json.parse("\ufeff[1]".encode()) == [1]
    assert strict_json.parse("1000000000000000019884624838656") == int(1e30)  # as tokenizers write it
    assert strict_json.parse("[" * 32 + "]" * 32)
    assert strict_json.parse(r'"\ud83d\ude00"') == "😀"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "1",
        "[",
        "[1",
        '["a',
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1] x",
        "[1]]",
        "[1e999]",
        "[" * 40 + "]" * 40,
    ],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(BadJson):
        list(strict_json.read_list(io.BytesIO(text.encode())))


def test_a_list_is_read_across_the_parts_that_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_LINE", 7)
    words = ["ä", "bc", "ö" * 5, [1, 23], {}]
    text = json.dumps(words, ensure_ascii=False).encode()
    assert [entry for entry, _ in strict_json.read_list(io.BytesIO(text))] == words
    with pytest.raises(BadJson, match="too long"):
        list(strict_json.read_list(io.BytesIO(b'["' + b"x" * 30 + b'"]')))


def test_a_long_list_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_LINE", 65_536)  # what is held
    text = b"[" + b'{"prompt": "a photo of a dog"},' * 20_000 + b"1]"
    stream, count = io.BytesIO(text), 0
    tracemalloc.start()
    for _ in strict_json.read_list(stream):
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_001 and peak < len(text)


def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BadJson, match="no regular file"):
            strict_json.read(path)
    with pytest.raises(IsADirectoryError):
        strict_json.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "none")
    with pytest.raises(DataError, match="pipe is damaged: it is no regular file"):
        strict_json.read_lines(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b" " * strict_json.MAX_BYTES + b"]")
    with pytest.raises(BadJson, match="larger than 16 MB"):
        strict_json.read(path)
    monkeypatch.setattr(strict_json, "MAX_LINES_BYTES", 1024**2)
    with pytest.raises(DataError, match="larger than 1 MB"):
        strict_json.read_lines(path)


def test_lines_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_LINE", 16)
    path, good = tmp_path / "a.jsonl", b'{"n": 1}\n'
    assert strict_json.read_lines(path) == []
    lines = [good, b"[1]\n", b'{"n": NaN}\n', b'{"n": "' + b"x" * 60 + b'"}\n', b"\n", good, good[:-1]]
    path.write_bytes(b"".join(lines))
    found = strict_json.read_lines(path)
    assert [entry for _, entry in found] == [{"n": 1}, None, None, None, None, {"n": 1}, None]
    assert [raw for raw, _ in found] == [line[:16] for line in lines]


def json_readers(source: str) -> list[str]:
    """Calls of Python's own reader."""
    names = ("json.load", "json.loads", "json.JSONDecoder")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute | ast.ImportFrom)]
    return [
        ast.unparse(node)
        for node in nodes
        if ast.unparse(node) in names or (isinstance(node, ast.ImportFrom) and node.module == "json")
    ]


def test_nothing_reads_json_past_it() -> None:
    found = {path.name: json_readers(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {"strict_json.py": ["json.JSONDecoder"]}
    assert json_readers("from json import loads") and json_readers("import json\nx = json.loads")
