"""GenEval as a reward: an object detector, colours by CLIP, and a rule: strict, or with partial credit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rtdmd_cli.engine.judges import colours, detector
from rtdmd_cli.engine.judges.colours import ColourNamer
from rtdmd_cli.engine.judges.detector import CLASSES, Found, ObjectDetector
from rtdmd_cli.engine.judges.geneval import Detection, judge
from rtdmd_cli.engine.judges.geneval_soft import soft_score
from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.requirements import Metadata, read_requirement, shown, threshold_of
from rtdmd_cli.errors import DataError

DETECTOR_FOLDER, CLIP_FOLDER = "detector", "clip"


@dataclass(frozen=True)
class GenEval:
    """1.0 where a picture meets its requirement, else 0.0; with `soft` the partial credit. See `base.Reward`.

    metadata: the prompt's line of GenEval's file; `include`, `exclude` and `tag` are read.
    """

    objects: ObjectDetector
    colours: ColourNamer
    soft: bool
    differentiable: ClassVar[bool] = False

    @classmethod
    def load(cls, device: torch.device, path: str | None, soft: bool = False) -> GenEval:
        """path: a folder with two folders, `detector` (as facebook/mask2former-swin-small-coco-instance) and `clip`.

        Or the hub id of another such detector; openai/clip-vit-large-patch14 then names the colours, as usual.
        Errors as `ObjectDetector.load` and `ClipScorer.load`.
        """
        where, clip = path or detector.MODEL, colours.CLIP
        if path is not None and Path(path).is_dir():
            for name in (DETECTOR_FOLDER, CLIP_FOLDER):
                if not (Path(path) / name).is_dir():
                    raise DataError(
                        f"{path} has no folder `{name}`.",
                        f"Put {detector.MODEL} into {DETECTOR_FOLDER}/ and {colours.CLIP} into {CLIP_FOLDER}/.",
                    )
            where, clip = str(Path(path) / DETECTOR_FOLDER), str(Path(path) / CLIP_FOLDER)
        return cls(ObjectDetector.load(where, device), ColourNamer.load(clip, device), soft)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        pairs = self.look(images, prompts, metadata)
        scores = [soft_score(*pair) if self.soft else float(judge(*pair).correct) for pair in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def look(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[tuple[list[Detection], Mapping[str, Any]]]:
        """What each picture shows, and what its prompt asks for: the arguments of `judge` and `soft_score`."""
        check_batch(images, prompts, metadata)
        asked = [asked_of(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        return list(zip(self.detect(images, asked), asked, strict=True))

    @torch.no_grad()
    def detect(self, images: Tensor, requirements: Sequence[Mapping[str, Any]]) -> list[list[Detection]]:
        """The objects of each picture [B,3,H,W] (0..1), with colours for the classes whose clauses name one.

        Pictures are rounded to 8 bits first, so that a picture and its PNG get the same answer.
        """
        images = (images.detach().float().clamp(0, 1) * 255).round() / 255
        limits = [
            threshold_of(each, detector.THRESHOLD, detector.COUNTING_THRESHOLD) for each in requirements
        ]
        found = self.objects.detect(images, limits)
        return [self._coloured(*each) for each in zip(images, found, requirements, strict=True)]

    def _coloured(self, image: Tensor, found: list[Found], requirement: Mapping[str, Any]) -> list[Detection]:
        coloured = {clause["class"] for clause in requirement.get("include", []) if "color" in clause}
        rows = [row for row, each in enumerate(found) if each.detection.label in coloured]
        names = self.colours.name(image.to(self.objects.device), [found[row] for row in rows])
        named = dict(zip(rows, names, strict=True))
        return [replace(each.detection, color=named.get(row)) for row, each in enumerate(found)]


def asked_of(prompt: str, known: Metadata) -> Mapping[str, Any]:
    """The requirement; DataError also for a class that the detector can't find or a colour that can't be told."""
    requirement = read_requirement(prompt, known)
    clauses = [*requirement.get("include", []), *requirement.get("exclude", [])]
    unknown = [clause["class"] for clause in clauses if clause["class"] not in CLASSES]
    unknown += [each["color"] for each in clauses if "color" in each and each["color"] not in colours.COLOURS]
    if unknown:
        raise DataError(
            f"The requirement of {shown(prompt)} names {unknown[0]!r}, which GenEval's detector doesn't know.",
            f"It knows COCO's {len(CLASSES)} classes and the colours {', '.join(colours.COLOURS)}.",
        )
    return requirement
