"""The second phase of an evaluation: each judge in its turn looks at the pictures, one JSON line a picture.

    <folder>/scores/geneval.jsonl
      {"judge": "geneval", "weights": "published"}
      {"prompt": 0, "image": 0, "score": 1.0, "reasons": [], "sha256": ..., "check": ...}

Lines are appended in order and flushed batch by batch. A score that is there is not computed again,
unless its line is damaged (a kill leaves the last one so) or was changed, or its picture is another one by now (`sums`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.evaluation.metrics import JudgeEntry
from rtdmd_cli.engine.evaluation.picture_store import Pictures
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, Key
from rtdmd_cli.engine.evaluation.sums import CHECK, fits, with_check
from rtdmd_cli.engine.sampling.pictures import batched
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import append_lines, write_bytes
from rtdmd_cli.errors import DataError, NumericalError

Line = dict[str, Any]
"""A picture's score: prompt, image, score, and what the judge adds."""


@dataclass(frozen=True)
class ScoreFile:
    """The scores of one judge, by key, and the file they are kept in (None: nowhere)."""

    path: Path | None
    lines: dict[Key, Line] = field(default_factory=dict)
    judge: str = ""

    @classmethod
    def open(cls, path: Path | None, judge: str, weights: str) -> ScoreFile:
        """Read what is there, dropping what is damaged; begin the file where there is none.

        weights: where the judge's come from. DataError for a file of another judge or of other weights.
        """
        if path is None:
            return cls(None)
        header = {"judge": judge, "weights": weights}
        raw, kept = _load(path, header)
        whole = b"".join([_bytes(header), *(line for line, _ in kept.values())])
        if whole != raw:
            write_bytes(path, whole)
        return cls(path, {key: entry for key, (_, entry) in kept.items()}, judge)

    @classmethod
    def read_only(cls, path: Path, judge: str, weights: str) -> ScoreFile:
        """As `open`, for another evaluation's file, which is left as it is."""
        _, kept = _load(path, {"judge": judge, "weights": weights})
        return cls(None, {key: entry for key, (_, entry) in kept.items()})

    def add(self, lines: Sequence[Line]) -> None:
        """Append lines; one of the same picture counts no longer."""
        for line in lines:
            self.lines[(line["prompt"], line["image"])] = line
        if self.path is not None:
            checked = [with_check(line, self.judge) for line in lines]
            append_lines(self.path, [json.dumps(line, ensure_ascii=False) for line in checked])

    def has(self, key: Key, sums: Mapping[Key, str]) -> bool:
        """Whether there is a score of the picture as it is now. sums: of the pictures that have files."""
        return key in self.lines and self.lines[key].get("sha256") == sums.get(key)


def score_phase(
    entry: JudgeEntry,
    source: str | None,
    scores: ScoreFile,
    prompts: EvalPrompts,
    keys: Sequence[Key],
    pictures: Pictures,
    sums: Mapping[Key, str],
    device: torch.device,
    stop: StopRequest,
    on_pictures: Callable[[int], None],
) -> bool:
    """Score what isn't scored yet; False where a stop was asked for before the end.

    sums: of the pictures that have files. source: where the judge's weights are, None for the usual place.
    The judge is loaded only if there is something to do, and is gone at the end. NumericalError for a score that is not
    finite; other errors as the judge's.
    """
    parts = list(batched(keys, entry.batch))
    missing = [part for part in parts if not all(scores.has(key, sums) for key in part)]
    on_pictures(sum(len(part) for part in parts) - sum(len(part) for part in missing))
    if not missing:
        return True
    judge = entry.open(device, source)
    for part in missing:
        if stop.received is not None:
            return False
        images = torch.stack([pictures.read(key) for key in part]).to(device)
        texts, metadata = [prompts.texts[p] for p, _ in part], [prompts.metadata[p] for p, _ in part]
        found = judge.judge(images, texts, metadata)
        lines = [{"prompt": p, "image": i, **more} for (p, i), more in zip(part, found, strict=True)]
        _require_finite(entry.name, lines)
        for key, line in zip(part, lines, strict=True):
            line |= {"sha256": sums[key]} if key in sums else {}
        scores.add([line for key, line in zip(part, lines, strict=True) if not scores.has(key, sums)])
        on_pictures(len(part))
    return True


def _require_finite(judge: str, lines: Sequence[Line]) -> None:
    for line in lines:
        if not math.isfinite(line["score"]):
            raise NumericalError(
                f"The score of {judge} is not finite for prompt {line['prompt']}, picture {line['image']}.",
                f"Check it: rtdmd rewards check {judge}",
            )


def _load(path: Path, header: Line) -> tuple[bytes, dict[Key, tuple[bytes, Line]]]:
    """The bytes of a score file, and its good lines by key. DataError for another header."""
    entries = strict_json.read_lines(path)
    if entries and entries[0][1] not in (header, None):
        raise DataError(
            f"{path} holds the scores of another judge or of other weights than {header['judge']} "
            f"({header['weights']}).",
            "Give the same --reward-path as before, or another folder with --out.",
        )
    kept: dict[Key, tuple[bytes, Line]] = {}
    for line, entry in entries:
        if entry is not None and fits(entry, header["judge"]) and (key := _key(entry)) is not None:
            kept[key] = line, {name: value for name, value in entry.items() if name != CHECK}
    return b"".join(line for line, _ in entries), kept


def _bytes(entry: Line) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _key(entry: Line) -> Key | None:
    prompt, image = entry.get("prompt"), entry.get("image")
    if type(prompt) is int and type(image) is int and isinstance(entry.get("score"), float):
        return prompt, image
    return None
