"""Soft-TIFA, the score of GenEval2 (arXiv 2512.16853), free of any model.

A prompt is a list of atoms: a question about the picture and the answer that is right. An atom's score is the
probability that the judge's answer begins with the right answer, however spelt; the prompt's is the geometric mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rtdmd_cli.errors import DataError

KEY = "vqa_list"  # of a prompt's metadata: [[question, answer], ...]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def question(text: str) -> str:
    """What the judge is asked for an atom."""
    return f"{text} Answer in one word."


def spellings(answer: str) -> list[str]:
    """The spellings that count as `answer`: small, with a capital, a number also in digits; each also after a space."""
    words = [answer.lower(), answer.capitalize()]
    if answer.lower() in NUMBERS:
        words.append(str(1 + NUMBERS.index(answer.lower())))
    return [space + word for space in ("", " ") for word in words]


def read_atoms(metadata: Mapping[str, Any], prompt: str) -> list[tuple[str, str]]:
    """The prompt's questions and right answers. DataError, naming `vqa_list`, where they are missing or no text."""
    hint = "Use prompts that come with questions, such as those of GenEval2."
    if KEY not in metadata:
        raise DataError(f"The prompt `{prompt}` has no `{KEY}` in its metadata.", hint)
    atoms = metadata[KEY]
    if not isinstance(atoms, (list, tuple)) or not atoms:
        raise DataError(f"`{KEY}` of the prompt `{prompt}` is no list of questions and answers.", hint)
    for number, atom in enumerate(atoms):
        texts = (
            isinstance(atom, (list, tuple)) and len(atom) == 2 and all(isinstance(t, str) and t for t in atom)
        )
        if not texts:
            raise DataError(
                f"`{KEY}[{number}]` of the prompt `{prompt}` is {atom!r}, not a question and an answer.", hint
            )
    return [(atom[0], atom[1]) for atom in atoms]


def geometric_mean(scores: Tensor) -> Tensor:
    """exp(mean(log scores)) of the scores [N] in 0..1, a scalar; 0 if one of them is."""
    return scores.log().mean().exp()
