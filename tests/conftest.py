"""What holds for every test."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # started by nohup, or in the background of a script
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The program sets variables for the libraries it loads, and --quiet silences our own warnings; each test finds both
    as the first did."""
    before, level = dict(os.environ), logging.getLogger("rtdmd_cli").level
    yield
    logging.getLogger("rtdmd_cli").setLevel(level)
    os.environ.clear()
    os.environ.update(before)
