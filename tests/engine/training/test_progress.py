"""Progress goes to stderr: lines, a bar, or nothing."""

import io

import pytest

from rtdmd_cli.engine.training.clock import duration
from rtdmd_cli.engine.training.heartbeat import COLUMNS
from rtdmd_cli.engine.training.progress import training_progress


class Clock:
    """A clock that moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_come_after_the_first_iteration_then_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with training_progress(130, 100, False, stream, clock) as update:
        for iteration in range(101, 131):
            clock.now += 1.0
            update(iteration, {"fake": 0.123456, "generator": 2.0, "third": 3.0})
            if iteration == 101:
                assert (
                    stream.getvalue() == "iteration 101/130  left 0:29  1.00 it/s  fake 0.123  generator 2\n"
                )
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("iteration")]
    assert [line.split()[1] for line in lines] == ["101/130", "111/130", "121/130", "130/130"]
    assert "left 0:00" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "total", "said"),
    [
        (2.0, 100, "about 3:00 more on this machine, at 2 s an iteration"),  # after ten iterations
        (25.0, 100, "about 40:25 more on this machine, at 25 s an iteration"),  # after more than a minute
        (2.0, 10, ""),  # nothing is left to be told
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_the_whole_time_is_told_once_after_the_first_iterations(
    seconds: float, total: int, said: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal() if terminal else io.StringIO(), Clock()
    with training_progress(total + 50, 50, False, stream, clock) as update:
        for iteration in range(51, min(total, 30) + 51):
            clock.now += seconds
            update(iteration, {})
    assert stream.getvalue().count("more on this machine") == (1 if said else 0)
    assert said in stream.getvalue()


def test_the_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with training_progress(10, 0, False) as update:
        update(1, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("iteration 1/10")


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for stream in (None, terminal):
        with training_progress(10, 0, True, stream) as update:
            update(10, {"fake": 1.0})
    captured = capsys.readouterr()
    assert (captured.out, captured.err, terminal.getvalue()) == ("", "", "")


def test_a_terminal_gets_a_bar_with_everything_on_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with training_progress(60, 20, False, stream, clock) as update:
        clock.now += 10.0
        update(40, {"fake": 0.5})
        print("data")
    shown = stream.getvalue()
    for part in ("40/60", "left 0:10", "2.00 it/s", "fake 0.5"):
        assert part in shown, part
    assert capsys.readouterr().out == "data\n"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with training_progress(10, 0, False, stream) as update:
        update(1, {})
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("iteration 1/10")


def test_duration() -> None:
    assert [duration(s) for s in (0, 61.4, 3599.6, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]


def test_the_most_telling_figures_stand_in_a_line_of_eighty_columns() -> None:
    stream, clock = io.StringIO(), Clock()
    metrics = {
        "fake_loss": 1.0,
        "gap": 0.25,
        "dmd_loss": 0.5,
        "previews/strict_score": 0.8125,
        "memory_gib": 23.46,
    }
    with training_progress(1_000_000, 0, False, stream, clock) as update:
        clock.now += 14.2
        update(1, metrics)
    line = stream.getvalue()
    assert "strict_score 0.812" in line and "fake_loss" not in line and "gap" not in line
    assert len(line) <= COLUMNS + 1
    stream = io.StringIO()
    with training_progress(96, 0, False, stream, clock) as update:
        clock.now += 1.0
        update(1, metrics)
    assert (
        stream.getvalue()
        == "iteration 1/96  left 1:35  1.00 it/s  strict_score 0.812  dmd_loss 0.5  23.5 GiB\n"
    )
