"""Prompt files: what is read, and what is refused with which line."""

import io
import json
import os
from pathlib import Path

import pytest

from rtdmd_cli.engine.prompts import reading
from rtdmd_cli.engine.prompts.reading import (
    PromptSet,
    builtin_prompts,
    check_prompt,
    known_by,
    read_prompt_set,
    read_prompts,
)
from rtdmd_cli.errors import DataError, RtdmdError, UsageError
from rtdmd_cli.shapes.grammar import parse
from rtdmd_cli.shapes.prompts import benchmark, held_out_combinations


def prompt_file(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return str(path)


def test_one_prompt_a_line_blanks_dropped(tmp_path: Path) -> None:
    data = "\ufeffa red circle\r\n\n   \n\t zwei grüne Ringe \u2028 x\x0bz \nlast without line end".encode()
    expected = ["a red circle", "zwei grüne Ringe \u2028 x\x0bz", "last without line end"]
    assert read_prompts(prompt_file(tmp_path, data)) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "holds no prompts"),
        (b" \n\n\t\n", "holds no prompts"),
        (b"good\nbad \xff\xfe\n", "line 2: the text is not UTF-8"),
        ("good\n".encode("utf-16"), "line 1: the text is not UTF-8"),
        (b"g\0o\0o\0d\0\n\0", "line 1: the line holds a NUL"),
        (b"good\n\n" + b"x" * 10_001, "line 3: the line has more than 10,000 characters"),
        ("é".encode() * 10_001 + b"\n", "line 1: the line has more than 10,000 characters"),
        ("\U0001f534".encode() * 30_000, "line 1: the line has more than 10,000 characters"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_prompts(prompt_file(tmp_path, data))


def test_the_longest_line_is_read(tmp_path: Path) -> None:
    longest = "\U0001f534" * 10_000
    data = f"\ufeff{longest}\r\n{longest}\n".encode()
    assert read_prompts(prompt_file(tmp_path, data)) == [longest, longest]


def test_an_endless_line_is_not_read_to_its_end() -> None:
    stream = io.BytesIO(b"x" * 1_000_000)
    with pytest.raises(DataError, match="standard input, line 1"):
        read_prompts("-", stream)
    assert stream.tell() < 100_000


def test_missing_files_folders_and_unknown_sets(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.txt"), str(tmp_path), "-"):
        with pytest.raises(DataError, match="There is no prompt file"):
            read_prompts(source)
    with pytest.raises(UsageError, match="builtin:nothing"):
        read_prompts("builtin:nothing")


def test_standard_input() -> None:
    assert read_prompts("-", io.BytesIO(b"a\n\nb")) == ["a", "b"]


def test_builtin_prompts_are_fixed_training_captions_in_the_mix_of_tasks() -> None:
    prompts = read_prompts("builtin:shapes")
    assert prompts == sorted(prompts) == builtin_prompts()
    assert (len(prompts), len(set(prompts))) == (4000, 1489)  # another number means other distilled models
    tasks = [parse(prompt).task for prompt in prompts]
    assert set(tasks) == {caption.task for caption in benchmark()}
    assert tasks.count("single_object") > 150
    hidden = held_out_combinations("color_attr")
    combined = {c.text for c in benchmark() if c.task == "color_attr"}
    assert hidden and not combined & set(prompts)


def test_a_prompt_of_the_command_line() -> None:
    assert check_prompt("  a red circle ") == "a red circle"
    for bad in ("", "  ", "a\0b", "x" * 10_001, "broken \udcff"):
        with pytest.raises(UsageError) as caught:
            check_prompt(bad)
        assert isinstance(caught.value, RtdmdError) and caught.value.hint


def jsonl_file(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_jsonl_file_has_metadata(tmp_path: Path) -> None:
    source = jsonl_file(
        tmp_path, '{"tag": "counting", "prompt": " a ring ", "n": [1]}', "", '{"prompt": "zwei grüne Ringe"}'
    )
    found = read_prompt_set(source)
    assert found.texts == ["a ring", "zwei grüne Ringe"] and len(found) == 2
    assert found.metadata == [{"tag": "counting", "n": [1]}, {}]
    swapped = found.pick([1, 0, 1])
    assert swapped.texts == ["zwei grüne Ringe", "a ring", "zwei grüne Ringe"]
    assert swapped.metadata == [{}, {"tag": "counting", "n": [1]}, {}]


def test_other_files_have_none(tmp_path: Path) -> None:
    line = '{"prompt": "a ring"}'
    found = read_prompt_set(prompt_file(tmp_path, f"{line}\na star\n".encode()))
    assert found.texts == [line, "a star"] and found.metadata == [{}, {}]
    builtin = read_prompt_set("builtin:shapes")
    assert list(builtin.texts) == builtin_prompts() and len(builtin.metadata) == 4000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a ring", "prompt 2 can't be read: it is not JSON"),
        ('{"prompt": "a ring"', "prompt 2 can't be read: it is not JSON"),
        ("[" * 9_000, "prompt 2 can't be read: it is (nested deeper|not JSON)"),
        ('{"prompt": "a ring", "n": 1e999}', "prompt 2 can't be read: it has a number"),
        ('["a ring"]', "prompt 2 has no text `prompt`"),
        ('"a ring"', "prompt 2 has no text `prompt`"),
        ("{}", "prompt 2 has no text `prompt`"),
        ('{"prompt": 3}', "prompt 2 has no text `prompt`"),
        ('{"prompt": "  "}', "prompt 2 has no text `prompt`"),
        ('{"Prompt": "a ring"}', "prompt 2 has no text `prompt`"),
        (r'{"prompt": "a\u0000ring"}', "prompt 2 holds a character"),
        (r'{"prompt": "a \ud83d ring"}', "prompt 2 can't be read: it holds half of a surrogate pair"),
        ('{"prompt": "' + "x" * 10_001 + '"}', "line 2: the line has more than 10,000"),
    ],
)
def test_a_bad_jsonl_line_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    source = jsonl_file(tmp_path, '{"prompt": "good"}', line)
    with pytest.raises(DataError, match=expected) as caught:
        read_prompt_set(source)
    assert source in caught.value.message and caught.value.hint


def test_jsonl_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no prompt file"):
        read_prompt_set(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompt_set(jsonl_file(tmp_path, "", " "))


def json_file(folder: Path, text: str, name: str = "prompts.json") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_json_file_is_a_list_of_texts_or_objects(tmp_path: Path) -> None:
    found = read_prompt_set(json_file(tmp_path, '[" a ring ", {"prompt": "grün", "tag": "x", "n": [1]}]'))
    assert found.texts == ["a ring", "grün"] and found.metadata == [{}, {"tag": "x", "n": [1]}]
    assert read_prompts(json_file(tmp_path, '["a ring"]')) == ["a ring"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no list"),
        ('["a ring"', "after prompt 1: it is not JSON"),
        ("[" * 100_000, "can't be read: it is nested deeper"),
        ("[" + "[]," * 100_000 + "1]", "prompt 1 has no text `prompt`"),
        ('{"prompt": "a ring"}', "holds no list"),
        ("[]", "holds no prompts"),
        ('["a ring", 3]', "prompt 2 has no text `prompt`"),
        ('["a ring", " "]', "prompt 2 has no text `prompt`"),
        ('["a ring", {"text": "a star"}]', "prompt 2 has no text `prompt`"),
        (r'["a\u0000ring"]', "prompt 1 holds a character"),
        ('["' + "x" * 10_001 + '"]', "prompt 1 has more than 10,000"),
    ],
)
def test_a_bad_json_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    source = json_file(tmp_path, text)
    with pytest.raises(DataError, match=expected) as caught:
        read_prompt_set(source)
    assert source in caught.value.message and caught.value.hint


def test_a_folder_stands_for_its_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no prompts")
    json_file(tmp_path, '["a ring"]', "some.json")
    assert read_prompts(str(tmp_path)) == ["a ring"]
    json_file(tmp_path, "a star\n", "train.txt")
    json_file(tmp_path, "a cross\n", "test.txt")
    assert read_prompts(str(tmp_path)) == ["a star"]
    json_file(tmp_path, '{"prompt": "a square"}\n', "prompts.jsonl")
    with pytest.raises(DataError, match="several prompt files: prompts.jsonl, train.txt"):
        read_prompt_set(str(tmp_path))


def test_prompts_are_known_by_texts_metadata_and_order() -> None:
    one, other = PromptSet(["a", "b"], [{"n": 1}, {}]), PromptSet(["a", "b"], [{"n": 2}, {}])
    variants = [
        known_by(one),
        known_by(other),
        known_by(one.pick([1, 0])),
        known_by(one.pick([0])),
        known_by(PromptSet(["ab"], [{}])),
        known_by(one, other),
        known_by(other, one),
    ]
    assert len(set(variants)) == len(variants) and all(len(text) == 64 for text in variants)
    assert known_by(PromptSet(("a", "b"), ({"n": 1}, {}))) == variants[0]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=r"prompts\.txt can't be read: it is no regular file"):
        read_prompt_set(str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_more_than_can_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    texts = [json.dumps({"prompt": f"a ring {number}", "n": [[], []]}) for number in range(5)]
    content = f"[{','.join(texts)}]" if name == "a.json" else "\n".join(texts)
    source = json_file(tmp_path, content, name)
    assert len(read_prompt_set(source)) == 5
    for limit, value in {"MAX_PROMPTS": 4, "MAX_BYTES": 100, "MAX_BRACKETS": 19}.items():
        if (limit, name) != ("MAX_BRACKETS", "a.txt"):
            with monkeypatch.context() as patch, pytest.raises(DataError, match="holds more than"):
                patch.setattr(reading, limit, value)
                read_prompt_set(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,Prompt,tag\n1,"a cat, asleep",x\n2,"two\nlines",\n'),
        ("a.TSV", "caption\ttag\na cat, asleep\tx\ntwo\nlines"),
        ("a.csv", "﻿text\na cat\n"),
    ],
)
def test_tables_are_read_by_their_header(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read_prompt_set(str(tmp_path / name))
    expected = {
        "id": (["a cat, asleep", "two\nlines"], [{"id": "1", "tag": "x"}, {"id": "2"}]),
        "ca": (["a cat, asleep", "two", "lines"], [{"tag": "x"}, {}, {}]),
        "﻿t": (["a cat"], [{}]),
    }[content[:2]]
    assert (list(found.texts), list(found.metadata)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a cat\na dog\n", "no column called prompt, caption or text"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.csv", b'prompt\n"open\n', "as a table"),
        ("a.yaml", b"- a cat\n", r"ends in \.yaml"),
        ("a.txt", b"a cat\ra dog\r", "lone carriage returns"),
        ("a.txt", b"# only\n#comments\n", "holds no prompts"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_prompt_set(str(tmp_path / name))
    assert caught.value.hint


def test_endings_count_without_regard_to_case(tmp_path: Path) -> None:
    for name, content in (("a.JSON", '["a cat"]'), ("b.JsonL", '{"prompt": "a cat"}'), ("c.TXT", "a cat")):
        (tmp_path / name).write_text(content)
        assert list(read_prompt_set(str(tmp_path / name)).texts) == ["a cat"]


def test_comments_are_left_out_and_options_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file for kohya's scripts: `#` begins a comment, and options stand behind the prompt."""
    path = tmp_path / "kohya.txt"
    path.write_text("# portraits\na cat --w 512 --h 768\na dog -- asleep\n#end\n")
    assert list(read_prompt_set(str(path)).texts) == ["a cat --w 512 --h 768", "a dog -- asleep"]
    assert "2 lines begin with #" in caplog.text
    assert "1 of 2 prompts hold what looks like options (--w)" in caplog.text
