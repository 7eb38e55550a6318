"""Several rewards at once, as stage 2 uses them: trained on, held out, one after another where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rtdmd_cli.engine.algo.flow import move
from rtdmd_cli.engine.compute.device import free_memory
from rtdmd_cli.engine.prompts.reading import PromptSet
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry, require_metadata
from rtdmd_cli.engine.rewards.guard import Failed, load_reward, picture_gradient, scores_and_gradient
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.rewards.scoring import DEFAULT_LIMITS, Limits, Scores, Unjudged, score_all
from rtdmd_cli.errors import DataError, NumericalError, RewardFailure, UsageError


class RewardMixture:
    """See `tune_reward.rollouts.Rewards`.

    weights: of the rewards trained on. held_out: names of those that `measure` adds. paths: name -> folder or hub id
    instead of the published source. in_memory: "all" keeps loaded rewards, "one" loads each when its turn comes.
    limits: how many pictures may go unjudged, and how long one may take. Made by `open_mixture`, which checks all of it.
    """

    def __init__(
        self,
        entries: Mapping[str, RewardEntry],
        weights: Mapping[str, float],
        held_out: Sequence[str],
        paths: Mapping[str, str],
        prompts: PromptSet,
        device: torch.device,
        in_memory: str,
        limits: Limits,
    ) -> None:
        self.weights = dict(weights)
        self.held_out = tuple(held_out)
        self.prompts = prompts
        self._entries = dict(entries)
        self._paths = dict(paths)
        self._device = device
        self._keep = in_memory == "all"
        self._limits = limits
        self._loaded: dict[str, Reward] = {}

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the rewards trained on that have a gradient."""
        return tuple(name for name in self.weights if self._entries[name].differentiable)

    def check_loading(self, edge: int | None = None) -> None:
        """Load every reward once, so that one whose weights are missing is an error before anything is trained.

        edge: px of a random picture by which each gradient is tried, None to try none. DataError for a reward that says
        it is differentiable and gives no gradient, or fails.
        """
        for name in (*self.weights, *self.held_out):
            with self._held(name):
                if edge is not None and name in self.differentiable:
                    self._try_gradient(name, edge)

    def _try_gradient(self, name: str, edge: int) -> None:
        picture = torch.rand(1, 3, edge, edge, generator=torch.Generator().manual_seed(0)).to(self._device)
        first = self.prompts.pick([0])
        try:
            picture_gradient(self._loaded[name], picture, first.texts, first.metadata, self._limits.seconds)
        except Failed as failed:
            raise DataError(
                f"The reward {name} {failed}{failed.place}.",
                "Correct it and check it: rtdmd rewards check "
                f"{name}; or say `differentiable = False`, and it is followed without a gradient.",
            ) from failed

    def score(self, images: Tensor, prompts: Sequence[int]) -> Scores:
        """The rewards trained on, of images [N,3,H,W] in 0..1 on the CPU, and prompt indices [N]."""
        numbers = [index + 1 for index in prompts]
        return self._score(tuple(self.weights), images, self.prompts.pick(prompts), numbers)

    def measure(self, images: Tensor, prompts: PromptSet) -> Scores:
        """Every reward, those held out first, of one image [N,3,H,W] a prompt."""
        numbers = range(1, len(prompts) + 1)
        return self._score((*self.held_out, *self.weights), images, prompts, numbers)

    def _score(
        self, names: Sequence[str], images: Tensor, prompts: PromptSet, numbers: Sequence[int]
    ) -> Scores:
        scores, unjudged = {}, list[Unjudged]()
        for name in names:
            with self._held(name):
                scores[name], failures = score_all(
                    name, self._loaded[name], self._device, images, prompts, numbers, self._limits
                )
            unjudged += failures
        return Scores(scores, tuple(unjudged))

    def combined(self, rewards: Mapping[str, Tensor]) -> Tensor | None:
        """The values of `pull`, [N], from undivided rewards; None where none is differentiable."""
        parts = [self._scale(name) * rewards[name] for name in self.differentiable]
        return torch.stack(parts).sum(dim=0) if parts else None

    def _scale(self, name: str) -> float:
        return self.weights[name] / self._entries[name].divisor

    def pull(
        self, images: Tensor, rows: Sequence[int], prompts: Sequence[int], size: int
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum [r] of the differentiable rewards, each over its divisor, and its gradient [r,3,H,W] by the images.

        Of the `rows` of images [n,3,H,W], with a prompt for each row; all on the CPU, where the gradient is the only copy of
        that size that is made. One reward after another, on `size` pictures at a time. RewardFailure for a reward that
        fails, NumericalError for one whose value or gradient is not finite.
        """
        total, gradient = torch.zeros(len(rows)), images.new_zeros(len(rows), *images.shape[1:])
        for name in self.differentiable:
            with self._held(name):
                for start in range(0, len(rows), size):
                    part = slice(start, start + size)
                    given = move(images[list(rows[part])], self._device)
                    found = self._scores_and_gradient(name, given, prompts[part])
                    values, by_picture = found[0].float().cpu(), found[1].float().cpu()
                    self._require_finite(name, "", values, prompts[part])
                    self._require_finite(name, "'s gradient", by_picture.flatten(1).sum(dim=1), prompts[part])
                    total[part].add_(values, alpha=self._scale(name))
                    gradient[part].add_(by_picture, alpha=self._scale(name))
        return total, gradient

    def _scores_and_gradient(
        self, name: str, images: Tensor, prompts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        chosen = self.prompts.pick(prompts)
        try:
            values, gradient = scores_and_gradient(
                self._loaded[name], images, chosen.texts, chosen.metadata, self._limits.seconds
            )
        except Failed as failed:
            raise RewardFailure(
                f"The reward {name} {failed}{failed.place}, where its gradient is taken.",
                f"Check it, then go on with --resume: rtdmd rewards check {name}",
            ) from failed
        return values, torch.full_like(images, torch.nan) if gradient is None else gradient

    def _require_finite(self, name: str, what: str, values: Tensor, prompts: Sequence[int]) -> None:
        """NumericalError for the first of values [n] that is not."""
        for row in (~values.isfinite()).nonzero().flatten().tolist()[:1]:
            text = self.prompts.texts[prompts[row]]
            raise NumericalError(
                f"The reward {name}{what} is not finite for prompt {prompts[row] + 1} ({text!r}), "
                "where its gradient is taken.",
                f"Check it: rtdmd rewards check {name}",
            )

    @contextmanager
    def _held(self, name: str) -> Iterator[None]:
        """Within the block the reward of this name is in `_loaded`. Unless all are kept, one loaded here is freed afterwards.

        Keep it in no variable: that would outlive the block, and the next reward would be loaded beside it.
        """
        missing = name not in self._loaded
        try:
            if missing:
                self._loaded[name] = load_reward(self._entries[name], self._device, self._paths.get(name))
            yield
        finally:
            if missing and not self._keep:
                self._loaded.pop(name, None)
                free_memory(self._device)


def open_mixture(
    weights: Mapping[str, float],
    held_out: Sequence[str],
    paths: Mapping[str, str],
    prompts: PromptSet,
    device: torch.device,
    in_memory: str,
    find: Callable[[str], RewardEntry] = find_reward,
    limits: Limits = DEFAULT_LIMITS,
) -> RewardMixture:
    """The rewards of those names; nothing is loaded yet.

    UsageError for an unknown name (the nearest is named) or a path for a reward that is not used; DataError where a
    prompt lacks the metadata that a reward needs.
    """
    names = (*weights, *held_out)
    entries = {name: find(name) for name in names}
    unused = sorted(paths.keys() - entries.keys())
    if unused:
        raise UsageError(
            f"`tune_reward.reward_paths` names {unused[0]}, which is neither trained on nor held out.",
            f"Used: {', '.join(names)}.",
        )
    for entry in entries.values():
        require_metadata(entry, prompts.metadata)
    return RewardMixture(entries, weights, held_out, paths, prompts, device, in_memory, limits)
