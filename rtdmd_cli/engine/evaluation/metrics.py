"""Who scores the pictures of an evaluation: a benchmark's own judge, or any reward of `rewards.registry`.

A judge gives a score a picture, and what explains it. Every judge stands on a reward's loader: `--reward-path` and the
hub's cache serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation.benchmarks import SHAPES
from rtdmd_cli.engine.evaluation.figures import (
    Lines,
    Measured,
    geneval2_figures,
    geneval_figures,
    ocr_figures,
    plain_figures,
)
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts
from rtdmd_cli.engine.judges.geneval import judge as strict
from rtdmd_cli.engine.judges.geneval_soft import soft_score
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.rewards.base import Reward, RewardEntry, require_metadata
from rtdmd_cli.engine.rewards.guard import Failed, answer, load_reward, seconds_of
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError

Details = dict[str, Any]
"""What a judge says of a picture, as JSON: "score", and more."""


class Judge(Protocol):
    """A loaded judge."""

    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Details]:
        """A score, higher is better, and details of each picture: images [B,3,H,W] in 0..1."""
        ...


@dataclass(frozen=True)
class JudgeEntry:
    """One row: how a judge is called and loaded, what it needs of a prompt, how many pictures it sees at once.

    label: of its headline figure. family: names of rewards that, trained on, make this judge no held-out one.
    """

    name: str
    label: str
    reward: RewardEntry
    wrap: Callable[[Any], Judge]
    check: Callable[[EvalPrompts], None]
    measure: Callable[[str, str, Lines, EvalPrompts], Measured]
    batch: int
    family: tuple[str, ...]

    def open(self, device: torch.device, path: str | None) -> Judge:
        """Load it; path: a folder or hub id in place of the usual source. Errors as the reward's loader."""
        return self.wrap(load_reward(self.reward, device, path))

    def figures(self, lines: Lines, prompts: EvalPrompts) -> Measured:
        """What the lines of all pictures say."""
        return self.measure(self.name, self.label, lines, prompts)


@dataclass(frozen=True)
class RewardJudge:
    """A reward's score and nothing else. seconds: the longest time for a picture, None for any."""

    name: str
    reward: Reward
    seconds: float | None

    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Details]:
        """DataError where the reward fails. It may change `images`."""
        try:
            scores = answer(self.reward, images, prompts, metadata, self.seconds)
        except Failed as failed:
            raise DataError(
                f"The reward {self.name} {failed}{failed.place} for {len(prompts)} pictures from {prompts[0]!r} on.",
                f"Check it: rtdmd rewards check {self.name}; what is scored is kept: go on with --resume.",
            ) from failed
        return [{"score": score} for score in scores.tolist()]


@dataclass(frozen=True)
class RuleJudge:
    """GenEval's strict rule, with the reasons of a failure and the partial credit. reward: with a method `look`."""

    reward: Any

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Details]:
        found = []
        for detections, asked in self.reward.look(images, prompts, metadata):
            verdict = strict(detections, asked)
            found.append(
                {
                    "score": float(verdict.correct),
                    "correct": verdict.correct,
                    "reasons": verdict.reasons,
                    "soft": soft_score(detections, asked),
                }
            )
        return found


@dataclass(frozen=True)
class AtomJudge:
    """GenEval2: the score of each question, and their geometric mean."""

    reward: Any

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Details]:
        from rtdmd_cli.engine.judges.soft_tifa import geometric_mean

        atoms = [each.float().cpu() for each in self.reward.atom_scores(images, prompts, metadata)]
        return [{"score": float(geometric_mean(each)), "atoms": each.tolist()} for each in atoms]


@dataclass(frozen=True)
class TextJudge:
    """OCR: what was read, and whether that is the wanted text and nothing else."""

    reward: Any

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Details]:
        from rtdmd_cli.engine.rewards.ocr import plain, text_score, wanted_text

        found = []
        for image, prompt, known in zip(images, prompts, metadata, strict=True):
            wanted, read = wanted_text(prompt, known), self.reward.read(image)
            score, exact = text_score(read, wanted), plain(read) == plain(wanted)
            found.append({"score": float(score), "exact": exact, "read": read, "wanted": wanted})
        return found


def _check_geneval(prompts: EvalPrompts) -> None:
    from rtdmd_cli.engine.rewards.geneval import asked_of

    for row, text in prompts.texts.items():
        asked_of(text, prompts.metadata[row])


def _check_shapes(prompts: EvalPrompts) -> None:
    from rtdmd_cli.engine.rewards.shapes import asked_of

    for row, text in prompts.texts.items():
        asked_of(text, {})  # a caption of the world
        asked_of(text, prompts.metadata[row])


def _check_geneval2(prompts: EvalPrompts) -> None:
    from rtdmd_cli.engine.judges.soft_tifa import read_atoms

    for row, text in prompts.texts.items():
        read_atoms(prompts.metadata[row], text)


def _check_ocr(prompts: EvalPrompts) -> None:
    from rtdmd_cli.engine.rewards.ocr import wanted_text

    for row, text in prompts.texts.items():
        wanted_text(text, prompts.metadata[row])


@dataclass(frozen=True)
class _Own:
    """A judge that says more than its reward. reward: whose loader it stands on."""

    label: str
    reward: str
    wrap: Callable[[Any], Judge]
    check: Callable[[EvalPrompts], None]
    measure: Callable[[str, str, Lines, EvalPrompts], Measured]
    batch: int
    family: tuple[str, ...]


_OWN = {
    "geneval": _Own(
        "GenEval, strict",
        "geneval",
        RuleJudge,
        _check_geneval,
        geneval_figures,
        4,
        ("geneval", "geneval-soft"),
    ),
    "geneval2": _Own(
        "GenEval2, soft-TIFA", "geneval2", AtomJudge, _check_geneval2, geneval2_figures, 1, ("geneval2",)
    ),
    "ocr": _Own("OCR", "ocr", TextJudge, _check_ocr, ocr_figures, 4, ("ocr",)),
    SHAPES: _Own(
        "strict score",
        "shapes-geneval",
        RuleJudge,
        _check_shapes,
        geneval_figures,
        256,
        ("shapes-geneval", "shapes-geneval-soft"),
    ),
}
REWARD_BATCH = 16
"""Pictures a plain reward sees at once."""


def find_judge(name: str, seconds: float | None = None) -> JudgeEntry:
    """The judge of that name: a benchmark's own or a reward. UsageError, with the nearest name, for neither.

    seconds: the longest time a reward may take for one picture; 0 for any, None for `guard.seconds_of`.
    """
    if name in _OWN:
        own = _OWN[name]
        reward = find_reward(own.reward)
        return JudgeEntry(name, own.label, reward, own.wrap, own.check, own.measure, own.batch, own.family)
    reward = find_reward(name)

    def wrap(loaded: Reward) -> Judge:
        return RewardJudge(name, loaded, seconds_of(name) if seconds is None else seconds or None)

    def check(prompts: EvalPrompts) -> None:
        require_metadata(reward, list(prompts.metadata.values()))

    return JudgeEntry(name, name, reward, wrap, check, plain_figures, REWARD_BATCH, (name,))


def check_prompts(entry: JudgeEntry, prompts: EvalPrompts) -> None:
    """DataError, naming the judge, where a prompt lacks what it needs."""
    try:
        entry.check(prompts)
    except DataError as error:
        raise DataError(f"`{entry.name}` can't judge these prompts. {error.message}", error.hint) from error
