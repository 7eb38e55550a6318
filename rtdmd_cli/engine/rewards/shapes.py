"""GenEval's rules in the shapes world: the same judge and partial credit, with the analytic detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rtdmd_cli.engine.judges.geneval import Detection, judge
from rtdmd_cli.engine.judges.geneval_soft import soft_score
from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.requirements import KEY, Metadata, read_requirement, shown, threshold_of
from rtdmd_cli.errors import DataError
from rtdmd_cli.shapes.detector import COUNTING_THRESHOLD, THRESHOLD, detect
from rtdmd_cli.shapes.grammar import parse, requirement
from rtdmd_cli.shapes.render import PICTURE


@dataclass(frozen=True)
class ShapesGenEval:
    """1.0 where a picture of the shapes world shows its caption, else 0.0; with `soft` the partial credit.

    See `base.Reward`. metadata: a requirement as GenEval's lines have it, if the prompt is no caption of the world.
    """

    soft: bool
    differentiable: ClassVar[bool] = False

    @classmethod
    def load(cls, device: torch.device, path: str | None, soft: bool = False) -> ShapesGenEval:
        """Nothing is loaded, and the detector computes on the CPU. DataError for a path."""
        if path is not None:
            raise DataError(
                f"The detector of the shapes world has no weights to load from {path}.", "Leave it out."
            )
        return cls(soft)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Float32 [B], on the images' device. DataError for pictures that aren't 32 px, or a prompt without meaning."""
        pairs = self.look(images, prompts, metadata)
        scores = [soft_score(*pair) if self.soft else float(judge(*pair).correct) for pair in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def look(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[tuple[list[Detection], Mapping[str, Any]]]:
        """As `GenEval.look`."""
        check_batch(images, prompts, metadata)
        if images.shape[-2:] != (PICTURE, PICTURE):
            raise DataError(
                f"The shapes rewards read pictures of {PICTURE} px, not {images.shape[-1]} x {images.shape[-2]}.",
                "They are for models of the built-in world.",
            )
        asked = [asked_of(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        return list(zip(_detect(images, asked), asked, strict=True))


def _detect(images: Tensor, asked: Sequence[Mapping[str, Any]]) -> list[list[Detection]]:
    """The detections of each picture, one call of the detector for each threshold."""
    pictures = images.detach().float().clamp(0, 1).cpu().numpy()
    limits = np.array([threshold_of(each, THRESHOLD, COUNTING_THRESHOLD) for each in asked])
    found: dict[int, list[Detection]] = {}
    for limit in np.unique(limits):
        rows = np.flatnonzero(limits == limit)
        found.update(zip(rows.tolist(), detect(pictures[rows], float(limit)), strict=True))
    return [found[row] for row in range(len(asked))]


def asked_of(prompt: str, known: Metadata) -> Mapping[str, Any]:
    if KEY in known:
        return read_requirement(prompt, known)
    try:
        return requirement(parse(prompt))
    except ValueError as error:
        raise DataError(
            f"The prompt {shown(prompt)} is no caption of the shapes world: {error}.",
            'Its captions read "a photo of a red circle" or "a photo of a ring left of a cross".',
        ) from error
