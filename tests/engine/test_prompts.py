"""Prompt files: what is read, and what is refused with which line."""

import io
from pathlib import Path

import pytest

from rtdmd_cli.engine.prompts import builtin_prompts, check_prompt, read_prompts
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
