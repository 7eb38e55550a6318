"""The times of a run in progress: what its distances in minutes and its time left are counted from."""

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Times of this process, s by `time.monotonic`: when and at which iteration it began to train, and when it last made
    a grid, wrote the report and saved a checkpoint. grid_of: the iteration of that grid.
    """

    began: float = field(default_factory=time.monotonic)
    first: int = 0
    grid: float = field(default_factory=time.monotonic)
    grid_of: int | None = None
    report: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def start(self, iteration: int) -> None:
        """Begin to count here."""
        self.began = self.grid = self.saved = time.monotonic()
        self.first = iteration

    def seconds_each(self, iteration: int) -> float | None:
        """Of an iteration with all that belongs to it, on the mean of this process; None before the first one."""
        done = iteration - self.first
        return (time.monotonic() - self.began) / done if done else None


def duration(seconds: float) -> str:
    """Whole seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
