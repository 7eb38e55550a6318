"""The colour of an object by GenEval's classifier: zero-shot CLIP on the object, cut out of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rtdmd_cli.engine.judges.detector import Found
from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.judges.vocabulary import COLOURS

CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = (
    "a photo of a {colour} {label}",
    "a photo of a {colour}-colored {label}",
    "a photo of a {colour} object",
)
BACKGROUND = 0x99 / 255  # a grey, in place of what isn't the object
BATCH = 16  # objects


@dataclass(frozen=True)
class ColourNamer:
    """Ten colours, three templates. Texts are encoded once for each class."""

    clip: ClipScorer
    texts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str | Path, device: torch.device | str) -> ColourNamer:
        """From a folder or hub id that holds a CLIP; errors as `ClipScorer.load`."""
        return cls(ClipScorer.load(source, device))

    @torch.no_grad()
    def name(self, image: Tensor, objects: Sequence[Found]) -> list[str]:
        """The colour of each object of a picture: image [3,H,W] in 0..1, on the device of the masks."""
        names: list[str] = []
        for start in range(0, len(objects), BATCH):
            part = objects[start : start + BATCH]
            cut = [self.clip.preprocess(cut_out(image, found)[None]) for found in part]
            pixels = torch.cat(cut).to(self.clip.device)
            features = F.normalize(
                self.clip.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1
            )
            for feature, found in zip(features, part, strict=True):
                best = (self.classifier(found.detection.label) @ feature).argmax()
                names.append(COLOURS[int(best)])
        return names

    @torch.no_grad()
    def classifier(self, label: str) -> Tensor:
        """[10,D], rows of length 1: for each colour the mean of the templates' features of length 1."""
        if label not in self.texts:
            rows = [
                self.clip.text_features([t.format(colour=colour, label=label) for t in TEMPLATES]).mean(0)
                for colour in COLOURS
            ]
            self.texts[label] = F.normalize(torch.stack(rows), dim=-1)
        return self.texts[label]


def cut_out(image: Tensor, found: Found) -> Tensor:
    """The object's box of a picture [3,H,W], grey outside of the mask: [3,h,w]."""
    left, top, right, bottom = (int(edge) for edge in found.detection.box)
    inside = found.mask[top:bottom, left:right]
    return torch.where(inside, image[:, top:bottom, left:right], BACKGROUND)
