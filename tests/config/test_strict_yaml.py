"""The YAML reader refuses what could surprise, with file and line, and quickly."""

import time
from pathlib import Path

import pytest

from rtdmd_cli.config.strict_yaml import MAX_BYTES, MAX_NODES, dump, parse_value, read_document
from rtdmd_cli.errors import EnvironmentFailure, UsageError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_values_and_lines(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "# c\na: 1\nb:\n  c: [1.5, yes, null]\n  d: 2026-01-01\n"))
    assert document.data == {"a": 1, "b": {"c": [1.5, True, None], "d": "2026-01-01"}}
    assert document.lines == {("a",): 2, ("b",): 3, ("b", "c"): 4, ("b", "d"): 5}


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    assert read_document(write(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: x\r\n")).data == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key `a` stands there twice"),
        ("s:\n  a: 1\n  a: 1\n", "line 3: the key `s.a` stands there twice"),
        ("a: &x 1\n", "line 1: anchors and aliases"),
        ("a: 1\nb: *x\n", "line 2: anchors and aliases"),
        ("a: !!python/object:os.system x\n", "line 1: tags"),
        ("a: !!str 1\n", "line 1: tags"),
        ("? [a]\n: 1\n", "line 1: a key must be plain text"),
        ("a: 010\n", "line 1: whole numbers"),
        ("a: 0x10\n", "line 1: whole numbers"),
        ("a: 1:30\n", "line 1: whole numbers"),
        ("a: 1:30.5\n", "line 1: numbers are written"),
        ("a: " + "9" * 5000, "line 1: whole numbers"),
        ("a: 1\n---\nb: 2\n", "line 2: expected a single document"),
        ("a:\n\tb: 1\n", "line 2"),
        ("a: [1\n", "line 2"),
        ("a: \x1b[31m\n", "control character #x1b"),
        ("[a, b]\n", "does not hold `key: value` lines"),
        ("just text\n", "does not hold `key: value` lines"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("[" * 1000, "more or deeper entries"),
        ("a: [" + "1," * MAX_NODES + "]", "more or deeper entries"),
        (b"a: 1\nb: \xff\n", "line 2: the text is not UTF-8"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_document(path)
    assert words in caught.value.message
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message and caught.value.message.endswith(".")
    assert caught.value.hint


def test_the_size_limit_is_256_kb(tmp_path: Path) -> None:
    text = "a: 1\n#"
    assert MAX_BYTES == 256 * 1024
    assert read_document(write(tmp_path, text + "x" * (MAX_BYTES - len(text)))).data == {"a": 1}
    with pytest.raises(UsageError, match="256 KB"):
        read_document(write(tmp_path, text + "x" * (MAX_BYTES - len(text) + 1)))


def test_a_hostile_file_is_refused_quickly(tmp_path: Path) -> None:
    started = time.process_time()
    with pytest.raises(UsageError):
        read_document(write(tmp_path, ("[" * MAX_BYTES)))
    assert time.process_time() - started < 3


def test_absent_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no preset file"):
        read_document(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match="is not a file"):
        read_document(tmp_path)


def test_a_file_that_cannot_be_read_is_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a: 1\n")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFailure, match="Permission denied"):
        read_document(path)


def test_parse_value() -> None:
    assert parse_value("[1, a]", "x", "h") == [1, "a"]
    assert parse_value("", "x", "h") is None
    assert parse_value("1e-5", "x", "h") == "1e-5"  # as YAML has it
    with pytest.raises(UsageError, match=r"^x: ") as caught:
        parse_value("*a", "x", "h")
    assert caught.value.hint == "h"


def test_dump_writes_no_anchor_and_is_read_back(tmp_path: Path) -> None:
    shared = [1, 2]
    data = {"a": shared, "b": shared, "c": {"d": 1e-8, "e": "1e-4", "f": None, "g": "ä: #", "h": "on"}}
    text = dump(data)
    assert "a: [1, 2]\nb: [1, 2]\nc:\n  d: 1.0e-08\n" in text
    assert read_document(write(tmp_path, text)).data == data
