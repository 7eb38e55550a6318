"""VQAScore (Lin et al. 2024, arXiv 2404.01291) with Qwen3-VL: does the picture show the prompt?

Its question and answers are those of GenEval2's code. Scores of different judges can't be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.qwen_vl import QwenVL
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.judges.soft_tifa import spellings

QUESTION = 'Does this image show "{}"? Answer the question with Yes or No.'


@dataclass(frozen=True)
class VqaScore:
    """P(Yes), 0..1. See `base.Reward`."""

    judge: QwenVL
    differentiable: ClassVar[bool] = True

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> VqaScore:
        """As `QwenVL.load`."""
        return cls(QwenVL.load(device, path))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """One picture after the other, so that a batch needs no more memory than its graphs."""
        check_batch(images, prompts, metadata)
        yes = [spellings("Yes")]
        scores = [
            self.judge.probabilities(image, [QUESTION.format(prompt)], yes)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.cat(scores).to(images.device)
