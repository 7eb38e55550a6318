"""Encoded prompts of a set that does not fit the cache: encoded in blocks, ahead of the iterations that need them.

The text encoders stay for it. A window of prompts is on disk at a time: the prompts of the coming iterations, in their order,
as many as the cache's bound takes; when an iteration asks for one beyond it, the next window is encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.prompts.embeddings import EmbeddingCache
from rtdmd_cli.errors import EnvironmentFailure

Order = Callable[[int], Sequence[int]]
"""Iteration (0-based) -> indices of its prompts."""


@dataclass
class AheadEncoder:
    """Encoded prompts by index. `prepare` an iteration first; what was not prepared is encoded on the spot.

    capacity: prompts on disk at a time. say: prints a line for people. free: called once the window reaches to the end of the
    run, from when on nothing is encoded. held: indices of the window.
    """

    cache: EmbeddingCache
    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Conditioning]
    capacity: int
    say: Callable[[str], None]
    free: Callable[[], None] = lambda: None
    held: frozenset[int] = field(default=frozenset())

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        """The rows of these prompts, in their order, on the CPU."""
        texts = [self.prompts[index] for index in indices]
        if self.held.issuperset(indices):
            return self.cache.fetch(texts)
        return self.encode(texts).to("cpu")

    def prepare(self, iteration: int, total: int, order: Order) -> None:
        """Have the prompts of an iteration on disk; if one is missing, also the prompts of the iterations that follow.

        EnvironmentFailure if the bound does not take the prompts of one iteration.
        """
        if self.held.issuperset(order(iteration)):
            return
        window, last = self._window(iteration, total, order)
        fresh = self.cache.renew([self.prompts[index] for index in window], self.encode)
        self.held = frozenset(window)
        if last == total:
            self.free()
        self.say(f"{len(window)} prompts of the iterations {iteration + 1} to {last}, {fresh} newly encoded")

    def _window(self, iteration: int, total: int, order: Order) -> tuple[list[int], int]:
        """Prompt indices in order of their first use, each once, and the last iteration (counted from 1) they serve."""
        window: dict[int, None] = {}
        texts: set[str] = set()
        for coming in range(iteration, total):
            indices = order(coming)
            wanted = texts | {self.prompts[index] for index in indices}
            if len(wanted) > self.capacity:
                if coming == iteration:
                    raise EnvironmentFailure(
                        f"The encoded prompts of one iteration ({len(wanted)}) need more than the cache's bound.",
                        "Raise hardware.cache_gb, or use a smaller batch.",
                    )
                return list(window), coming
            texts = wanted
            window |= dict.fromkeys(indices)
        return list(window), total
