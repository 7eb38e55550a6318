"""How well a picture shows the text its prompt asks for, read by RapidOCR (PP-OCR models on ONNX, on the CPU).

The rule is that of Flow-GRPO's OCR reward (Liu et al. 2025): with all spaces removed and in lower case, for the
wanted text w of n characters and everything read r,

    score = 1 - min(d, n) / n,   d = 0 where w is a part of r, else the edit distance of r and w.

The published numbers were read by PaddleOCR; the engine here holds newer models of the same family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.requirements import Metadata, shown
from rtdmd_cli.errors import DataError, EnvironmentFailure

if TYPE_CHECKING:
    from rapidocr import RapidOCR

KEY = "text"  # of the metadata
QUOTED = (
    re.compile(r'"([^"]+)"'),
    re.compile("\u201c([^\u201d]+)\u201d"),
    re.compile(r"(?<!\w)'(.+?)'(?!\w)"),
)
"""The text of a prompt: straight or curly double quotes, or else single ones that are no apostrophes."""
SHORTEST_SIDE = 320  # px, to which smaller pictures are enlarged before text is looked for


@dataclass(frozen=True)
class OcrReward:
    """0 where nothing of the text can be read, 1 where all of it can, whatever else is. See `base.Reward`.

    metadata: the wanted text as `text`; without it, the first quoted text of the prompt.
    """

    engine: RapidOCR
    differentiable: ClassVar[bool] = False

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> OcrReward:
        """The models come with the package `rapidocr`. DataError for a path, EnvironmentFailure without the package."""
        if path is not None:
            raise DataError(
                f"The models of `ocr` come with its package; nothing is loaded from {path}.",
                "Leave the path out.",
            )
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise EnvironmentFailure(
                f"The reward `ocr` needs a package that can't be imported: {error}.",
                "pip install 'rtdmd[ocr]'",
            ) from error
        settings: dict[str, Any] = {
            "Global.use_cls": False,  # pictures are upright
            "Global.log_level": "critical",  # it warns of every picture without text
            "Det.limit_side_len": SHORTEST_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
        return cls(RapidOCR(params=settings))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Float32 [B] in 0..1. DataError for a prompt without a text to be read."""
        check_batch(images, prompts, metadata)
        wanted = [wanted_text(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        pairs = zip(images, wanted, strict=True)
        scores = [text_score(self.read(image), text) for image, text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, image: Tensor) -> str:
        """All text of a picture [3,H,W] (0..1), line by line from the top, without anything between the lines."""
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
        out: Any = self.engine(np.ascontiguousarray(pixels[..., ::-1]))  # it takes arrays for BGR
        return "".join(out.txts or ())


def wanted_text(prompt: str, known: Metadata) -> str:
    """The text a picture of the prompt has to show. DataError where there is none, or one of spaces only."""
    if KEY in known:
        text: object = known[KEY]
        if not isinstance(text, str):
            raise DataError(f"The `{KEY}` of the prompt {shown(prompt)} is {text!r}, not a text.", "")
    else:
        found = [match for pattern in QUOTED if (match := pattern.search(prompt))]
        text = found[0][1] if found else ""
    if not plain(text):
        raise DataError(
            f"The prompt {shown(prompt)} names no text to be read.",
            f'Put the text into quotes, as in: a sign that says "Open", or into its metadata as `{KEY}`.',
        )
    return text


def text_score(read: str, wanted: str) -> float:
    """The formula of the module's docstring, 0..1. wanted: with at least one character that is no space."""
    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """Without white space, in lower case."""
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """The fewest characters to insert, delete or replace to make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
