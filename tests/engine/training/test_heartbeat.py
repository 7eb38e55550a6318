"""Signs of life between two lines: rewritten on a terminal, seldom in a log, none when quiet or beside a bar."""

from __future__ import annotations

import io
import time

import pytest

from rtdmd_cli.engine.training.heartbeat import CLEAR, COLUMNS, Heartbeat, heartbeat, resting, under_way
from rtdmd_cli.engine.training.progress import training_progress
from tests.engine.training.test_progress import Clock, Terminal


def heart(stream: io.StringIO, clock: Clock) -> Heartbeat:
    return Heartbeat(lambda text: print(text, file=stream), stream, clock)


def beats(made: Heartbeat, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        made.beat()


def test_a_terminal_shows_from_the_third_second_on_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    made = heart(stream, clock)
    beats(made, clock, 9)
    assert stream.getvalue() == ""  # nothing was said yet
    made.say("loading the model x")
    beats(made, clock, 2)
    assert stream.getvalue() == "loading the model x\n"
    beats(made, clock, 2)
    assert stream.getvalue().endswith(
        f"{CLEAR}0:03 since: loading the model x{CLEAR}0:04 since: loading the model x"
    )
    made.say("y" * 200)
    assert stream.getvalue().endswith(f"{CLEAR}{'y' * 200}\n")  # in the line's place
    beats(made, clock, 3)
    assert len(stream.getvalue().rpartition(CLEAR)[2]) == COLUMNS


def test_a_log_has_a_line_after_half_a_minute_and_then_ever_fewer() -> None:
    stream, clock = io.StringIO(), Clock()
    made = heart(stream, clock)
    made.say("encoding")
    beats(made, clock, 400)
    told = [line.partition(" ")[0] for line in stream.getvalue().splitlines()[1:]]
    assert told == ["0:30", "1:00", "2:00", "4:00"]
    assert "0:30 since: encoding" in stream.getvalue() and CLEAR not in stream.getvalue()


def test_the_heart_rests_beside_a_bar_and_tells_of_an_iteration_in_a_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with heartbeat(lambda text: print(text, file=stream), False, stream, clock, every=9) as say:
        say("loading")
        with resting():
            clock.now += 100
            beats(_current(), clock, 2)
        assert stream.getvalue() == "loading\n"
        under_way("iteration 1/9")
        beats(_current(), clock, 3)
        assert stream.getvalue().endswith(f"{CLEAR}0:03 since: iteration 1/9")
    assert stream.getvalue().endswith(CLEAR)
    log, clock = io.StringIO(), Clock()
    with (
        heartbeat(lambda text: print(text, file=log), False, log, clock, every=9),
        training_progress(5, 0, False, log, clock) as update,
    ):
        beats(_current(), clock, 31)
        assert log.getvalue() == "0:30 since: iteration 1/5\n"
        update(1, {})
        beats(_current(), clock, 31)
    assert log.getvalue().endswith("\n0:30 since: iteration 2/5\n")


def _current() -> Heartbeat:
    from rtdmd_cli.engine.training import heartbeat as module

    return module._beating[-1]


def test_it_beats_by_itself_and_stops() -> None:
    stream = io.StringIO()
    clock = Clock()
    with heartbeat(lambda text: print(text, file=stream), False, stream, clock, every=0.005) as say:
        say("loading")
        clock.now += 31
        deadline = time.monotonic() + 20
        while "since: loading" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        with heartbeat(print, False) as inner:
            inner("the same heart")
    assert stream.getvalue().splitlines() == ["loading", "0:31 since: loading", "the same heart"]
    quiet = io.StringIO()
    with heartbeat(lambda text: None, True, quiet, clock) as say:
        say("nothing")
        under_way("nothing either")
    assert quiet.getvalue() == ""
