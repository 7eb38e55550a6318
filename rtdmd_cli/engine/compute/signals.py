"""Ctrl-C, termination and a closed terminal: SIGINT, SIGTERM and SIGHUP, in every command alike.

Where something would be lost, the first signal lets it come to its end and says so; a second one stops at once. Elsewhere
the first one stops at once. Exit codes are 130, 143 and 129. SIGUSR1 stops nothing: it asks a training for a checkpoint.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE = signal.SIGUSR1
"""Batch systems can send it some time before they end a job."""
APART = 0.5
"""Seconds. A signal that follows sooner is the same one: `timeout`, systemd and shells send theirs twice."""


class Stopped(KeyboardInterrupt):
    """A signal ends the command here. number: of the first signal; kept: what is left of the work, half a sentence.

    at_once: whether something was cut off.
    """

    def __init__(self, number: int, kept: str, at_once: bool) -> None:
        super().__init__(kept)
        self.number = number
        self.kept = kept
        self.at_once = at_once

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


@dataclass
class StopRequest:
    """What a signal does just now.

    received: the number of the first signal, None before it. ending: what the first one lets come to its end, as in
    "finishing this iteration"; "" where it stops at once. kept: what is left then, as in "the last checkpoint is kept".
    save: whether SAVE has come and no checkpoint was written for it yet. quiet: say nothing.
    """

    received: int | None = None
    save: bool = False
    ending: str = ""
    kept: str = ""
    quiet: bool = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    @contextmanager
    def during(self, ending: str, kept: str) -> Iterator[None]:
        """Within the block, `ending` and `kept` are these."""
        before = self.ending, self.kept
        self.ending, self.kept = ending, kept
        try:
            yield
        finally:
            self.ending, self.kept = before

    def check(self) -> None:
        """Raise Stopped if a signal has come: here is a good place to end."""
        if self.received is not None:
            raise Stopped(self.received, self.kept, at_once=False)


_running: list[StopRequest] = []
"""The request of the outermost `stop_on_signals`, as a process has one set of handlers."""


@contextmanager
def stop_on_signals(clock: Callable[[], float] = time.monotonic) -> Iterator[StopRequest]:
    """Within the block, signals do what the request that is given says; within another such block it is that one's.

    Signals that were ignored stay so, as `nohup` wants it. The earlier handlers come back at the end. Main thread only
    (ValueError elsewhere, from Python).
    """
    if _running:
        yield _running[-1]
        return
    request, since = StopRequest(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if number == SAVE:
            request.save = True
        elif request.received is None:
            request.received, since = number, clock()
            if not request.ending:
                raise Stopped(number, request.kept, at_once=True)
            if not request.quiet:
                _say(f"{request.ending}; once more to stop at once, then {request.kept}")
        elif number != signal.SIGHUP and clock() - since >= APART:
            raise Stopped(request.received, request.kept, at_once=True)

    heard = [number for number in (*SIGNALS, SAVE) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in heard}
    _running.append(request)
    try:
        yield request
    finally:
        _running.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """A line on stderr, past Python's buffers, in which the signal may have come."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
