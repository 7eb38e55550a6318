"""GenEval2 with Qwen3-VL as the judge: `soft_tifa`'s questions about a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.qwen_vl import QwenVL
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.judges.soft_tifa import geometric_mean, question, read_atoms, spellings


@dataclass(frozen=True)
class GenEval2:
    """Soft-TIFA with the geometric mean, 0..1. See `base.Reward`.

    metadata: the prompt's line of GenEval2's file; `vqa_list` is read: [[question, answer], ...].
    """

    judge: QwenVL
    differentiable: ClassVar[bool] = False

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> GenEval2:
        """As `QwenVL.load`."""
        return cls(QwenVL.load(device, path))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        atoms = self.atom_scores(images, prompts, metadata)
        return torch.stack([geometric_mean(scores) for scores in atoms]).to(images.device)

    @torch.no_grad()
    def atom_scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[Tensor]:
        """For each picture the score of each of its prompt's questions, float32 [questions] in 0..1."""
        check_batch(images, prompts, metadata)
        atoms = [read_atoms(known, prompt) for known, prompt in zip(metadata, prompts, strict=True)]
        return [
            self.judge.probabilities(
                image, [question(text) for text, _ in pairs], [spellings(answer) for _, answer in pairs]
            )
            for image, pairs in zip(images, atoms, strict=True)
        ]
