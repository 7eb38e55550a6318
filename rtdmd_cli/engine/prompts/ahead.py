"""Encoded prompts of a set that does not fit the cache: encoded in blocks, ahead of the iterations that need them.

The text encoders stay for it. A window of prompts has its place on disk at a time: the prompts of the coming iterations, in
their order, as many as the cache's bound takes. Its blocks are encoded as the iterations come to them; a window that
reaches to the end of the run when training begins is encoded as a whole, and the encoders are freed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.prompts.embeddings import EmbeddingCache
from rtdmd_cli.errors import EnvironmentFailure

Order = Callable[[int], Sequence[int]]
"""Iteration (0-based) -> indices of its prompts."""
TOLD_SECONDS = 10.0
"""Between two lines on the encoding of prompts."""
TOLD_SECONDS_IN_TRAINING = 1800.0
"""Where training has a line of progress of its own."""


def told(
    encode: Callable[[Sequence[str]], Conditioning],
    say: Callable[[str], None],
    every: float = TOLD_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[Sequence[str]], Conditioning]:
    """`encode`, which says before each block of prompts how far it is, at most once in `every` seconds."""
    done, last = 0, clock() - every

    def encoding(prompts: Sequence[str]) -> Conditioning:
        nonlocal done, last
        if clock() - last >= every:
            last = clock()
            say(f"encoding prompts: {done} done, {len(prompts)} under way")
        encoded = encode(prompts)
        done += len(prompts)
        return encoded

    return encoding


@dataclass
class AheadEncoder:
    """Encoded prompts by index. `prepare` an iteration first; what was not prepared is encoded on the spot.

    capacity: prompts on disk at a time. encode: called for one block after another. say: prints a line for people. free:
    called once all prompts are there up to the end of the run, from when on nothing is encoded. held: prompts of the
    window that are there.
    """

    cache: EmbeddingCache
    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Conditioning]
    capacity: int
    say: Callable[[str], None]
    free: Callable[[], None] = lambda: None
    held: set[str] = field(default_factory=set)
    _window: frozenset[str] = frozenset()
    _coming: Iterator[Sequence[str]] | None = None
    _last: bool = False
    """Whether the window reaches to the end of the run."""
    _whole: bool = False
    """Whether all of it is encoded at once."""

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        """The rows of these prompts, in their order, on the CPU."""
        texts = [self.prompts[index] for index in indices]
        if self.held.issuperset(texts):
            return self.cache.fetch(texts)
        return self.encode(texts).to("cpu")

    def prepare(
        self, iteration: int, total: int, order: Order, stopping: Callable[[], bool] = lambda: False
    ) -> bool:
        """Have the prompts of an iteration on disk, and in the first window the coming ones where all fit.

        stopping: asked before each block; whether to leave it there. Returns whether the iteration's prompts are there.
        EnvironmentFailure if the bound does not take the prompts of one iteration.
        """
        wanted = {self.prompts[index] for index in order(iteration)}
        if not self._window.issuperset(wanted):
            self._open(iteration, total, order)
        while self._coming is not None and (self._whole or not self.held.issuperset(wanted)):
            if stopping():
                return False
            self._next_block()
        return True

    def _open(self, iteration: int, total: int, order: Order) -> None:
        """Begin the window of an iteration and those that follow."""
        first = not self._window
        texts, last = self._planned(iteration, total, order)
        self._window, self._last, self.held = frozenset(texts), last == total, set()
        self._whole = first and self._last
        every = TOLD_SECONDS if self._whole else TOLD_SECONDS_IN_TRAINING
        self._coming = self.cache.renew(texts, told(self.encode, self.say, every))
        when = "before training" if self._whole else "as they are needed"
        self.say(f"{len(texts)} prompts of the iterations {iteration + 1} to {last}: encoded {when}")

    def _next_block(self) -> None:
        assert self._coming is not None
        try:
            for texts in self._coming:
                self.held.update(texts)
                if len(self.held) < len(self._window):
                    return
        except BaseException:
            # an iterator that has failed would seem to be at its end
            self._window, self._coming = frozenset(), None
            raise
        self._coming = None
        if self._last:
            self.free()

    def _planned(self, iteration: int, total: int, order: Order) -> tuple[list[str], int]:
        """Prompts in order of their first use, each once, and the last iteration (counted from 1) they serve."""
        window: dict[str, None] = {}
        for coming in range(iteration, total):
            wanted = window | dict.fromkeys(self.prompts[index] for index in order(coming))
            if len(wanted) > self.capacity:
                if coming == iteration:
                    raise EnvironmentFailure(
                        f"The encoded prompts of one iteration ({len(wanted)}) need more than the cache's bound.",
                        "Raise hardware.cache_gb, or use a smaller batch.",
                    )
                return list(window), coming
            window = wanted
        return list(window), total
