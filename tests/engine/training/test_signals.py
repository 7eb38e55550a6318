"""The first signal asks, the second stops, and the handlers come back."""

import os
import signal

import pytest

from rtdmd_cli.engine.training.signals import stop_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_sets_a_mark(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.received is None
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_the_second_signal_stops_at_once_and_the_first_keeps_the_exit_code() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
