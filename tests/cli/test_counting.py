"""Progress of making pictures: lines, bar, silence."""

import io

import pytest

from rtdmd_cli.cli.counting import counting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counted(stream: io.StringIO, quiet: bool, steps: list[tuple[float, int]]) -> str:
    """What is printed when n more of 8 pictures are done at each time (s)."""
    now = 0.0
    with counting(8, quiet, stream, lambda: now) as advance:
        for now, n in steps:  # noqa: B007
            advance(n)
    return stream.getvalue()


def test_lines_every_ten_seconds_and_at_the_end() -> None:
    lines = counted(io.StringIO(), False, [(0, 0), (4, 2), (12, 2), (15, 2), (24, 2)]).splitlines()
    assert lines == [
        "pictures 4/8  elapsed 0:12  left 0:12",
        "pictures 8/8  elapsed 0:24  left 0:00",
    ]


def test_a_bar_on_a_terminal_and_silence_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "100%" in counted(Terminal(), False, [(0, 4), (1, 4)])
    assert counted(Terminal(), True, [(0, 8)]) == "" == counted(io.StringIO(), True, [(0, 8)])


def test_nothing_to_do_says_so_once() -> None:
    assert counted(io.StringIO(), False, [(1, 8)]) == "pictures 8/8  elapsed 0:01  left 0:00\n"
