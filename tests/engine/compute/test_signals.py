"""The first signal lets things come to an end, the second stops at once, and the handlers come back."""

import os
import signal

import pytest

from rtdmd_cli.engine.compute.signals import APART, Stopped, StopRequest, stop_on_signals

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_first_signal_says_what_is_finished_and_what_a_second_one_keeps(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop, stop.during("finishing this iteration (about 40 s)", "step 3 is kept"):
        assert (stop.received, stop.exit_code) == (None, 0)
        stop.check()
        send(number)
        assert (stop.received, stop.exit_code) == (number, code)
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert (caught.value.exit_code, caught.value.kept, caught.value.at_once) == (
        code,
        "step 3 is kept",
        False,
    )
    said = "finishing this iteration (about 40 s); once more to stop at once, then step 3 is kept\n"
    assert capfd.readouterr().err.lstrip() == said
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), CODES)
def test_where_nothing_is_lost_the_first_signal_stops_at_once(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped) as caught, stop_on_signals() as stop, stop.during("", "all is as before"):
        send(number)
    assert (caught.value.exit_code, caught.value.kept, caught.value.at_once) == (
        code,
        "all is as before",
        True,
    )
    assert capfd.readouterr().err == ""


def test_the_second_signal_stops_at_once_and_the_first_keeps_the_exit_code() -> None:
    before, clock = signal.getsignal(signal.SIGINT), Clock()
    with pytest.raises(Stopped) as caught, stop_on_signals(clock) as stop, stop.during("a", "b"):
        send(signal.SIGTERM)
        clock.now += APART
        send(signal.SIGINT)
    assert (caught.value.exit_code, caught.value.kept, caught.value.at_once) == (143, "b", True)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_signal_that_is_sent_twice_is_one() -> None:
    """`timeout` and systemd send SIGTERM to the process and to its group; shells and the kernel both send SIGHUP."""
    clock = Clock()
    with stop_on_signals(clock) as stop, stop.during("a", "b"):
        send(signal.SIGTERM)
        clock.now += APART / 2
        send(signal.SIGTERM)
        clock.now += 60
        send(signal.SIGHUP)
        assert stop.received == signal.SIGTERM


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            send(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_blocks_within_blocks_share_one_request() -> None:
    with stop_on_signals() as outer, stop_on_signals() as inner:
        assert inner is outer
    with stop_on_signals() as later:
        assert later is not outer


def test_quiet_says_nothing_and_phases_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals() as stop:
        stop.quiet = True
        with stop.during("a", "b"), stop.during("c", "d"):
            send(signal.SIGTERM)
        assert (stop.ending, stop.kept) == ("", "")
    assert capfd.readouterr().err == ""


def test_the_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
    assert StopRequest().exit_code == 0


@pytest.mark.parametrize("ending", ["", "finishing this iteration"])
def test_a_signal_that_asks_for_a_checkpoint_stops_nothing(
    ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals() as stop, stop.during(ending, ""):
        send(signal.SIGUSR1)
        stop.check()
        assert stop.save and stop.exit_code == 0
    assert capfd.readouterr().err == "" and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
