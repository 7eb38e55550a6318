"""Ctrl-C and termination: the first ends the iteration and saves, the second stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """received: the number of the first signal, None before it."""

    received: int | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 without a signal."""
        return 0 if self.received is None else 128 + self.received


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only sets `.received`; a second raises KeyboardInterrupt.

    The earlier handlers come back at the end. Main thread only (ValueError elsewhere, from Python).
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.received is not None:
            raise KeyboardInterrupt
        request.received = number

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
