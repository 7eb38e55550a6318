"""The first phase of an evaluation: make the pictures that aren't there yet. No judge is in memory meanwhile.

A batch is always made of the same keys, whole or not at all, so that a picture's bytes don't depend on where an
earlier process was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rtdmd_cli import __version__
from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, Key
from rtdmd_cli.engine.evaluation.sums import fits, with_check
from rtdmd_cli.engine.sampling.model import Model
from rtdmd_cli.engine.sampling.pictures import DTYPE_NAMES, batched, encode_to_cache, paint, text_chunks
from rtdmd_cli.engine.sampling.sample import SamplingPlan
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import append_line

TIMES = "times"


class WritablePictures(Protocol):
    """Where pictures go; see `picture_store`."""

    def has(self, key: Key) -> bool: ...

    def write(self, key: Key, image: Tensor, chunks: Mapping[str, str]) -> None: ...


@dataclass(frozen=True)
class Generation:
    """What is made: `keys` of `prompts` by `model`, width x height px, in batches of `batch`."""

    model: Model
    plan: SamplingPlan
    prompts: EvalPrompts
    keys: Sequence[Key]
    seed: int
    width: int
    height: int
    batch: int

    def conditions(self) -> dict[str, Any]:
        """How the pictures are made, as results name it."""
        return {
            "model": self.model.label,
            "model_hash": self.model.model_hash,
            "kind": self.plan.kind,
            "steps": self.plan.steps,
            "evaluations": self.plan.evaluations,
            "guidance": self.plan.guidance,
            "eta": self.plan.eta,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "dtype": DTYPE_NAMES[self.model.backbone.dtype],
            "device": self.model.backbone.device.type,
            "version": __version__,
        }


@dataclass(frozen=True)
class Timing:
    """Seconds of each batch that was made, one JSON line each, or kept in memory where there is no file."""

    path: Path | None
    lines: list[tuple[int, float]]

    @classmethod
    def open(cls, path: Path | None) -> Timing:
        """What earlier processes noted; a line that is damaged or was changed is passed over."""
        lines = []
        if path is not None:
            entries = [entry for _, entry in strict_json.read_lines(path) if entry is not None]
            entries = [entry for entry in entries if fits(entry, TIMES)]
            lines = [(each["pictures"], each["seconds"]) for each in entries if _is_timing(each)]
        return cls(path, lines)

    def add(self, pictures: int, seconds: float) -> None:
        """Note a batch."""
        self.lines.append((pictures, seconds))
        if self.path is not None:
            entry = with_check({"pictures": pictures, "seconds": round(seconds, 6)}, TIMES)
            append_line(self.path, json.dumps(entry))

    @property
    def seconds_per_picture(self) -> float | None:
        """None where no batch was noted."""
        total = sum(pictures for pictures, _ in self.lines)
        return sum(seconds for _, seconds in self.lines) / total if total else None


def _is_timing(entry: Mapping[str, Any]) -> bool:
    """Whether a line says a number of pictures and their seconds."""
    pictures, seconds = entry.get("pictures"), entry.get("seconds")
    counted = isinstance(pictures, int) and not isinstance(pictures, bool) and pictures > 0
    return counted and isinstance(seconds, float) and seconds >= 0


def generate_phase(
    job: Generation,
    pictures: WritablePictures,
    timing: Timing,
    stop: StopRequest,
    on_pictures: Callable[[int], None],
) -> bool:
    """Make what is missing; False where a stop was asked for before the end. Errors as `pictures.paint`.

    Stop and progress come after each batch. Prompts are encoded first, by way of the cache, and the text encoders freed.
    """
    parts = list(batched(job.keys, job.batch))
    missing = [part for part in parts if not all(pictures.has(key) for key in part)]
    on_pictures(sum(len(part) for part in parts) - sum(len(part) for part in missing))
    if not missing:
        return True
    cache, uncond = encode_to_cache(job.model, list(job.prompts.texts.values()), job.plan)
    shape = job.model.backbone.latent_shape(job.height, job.width)
    conditions = job.conditions()
    for part in missing:
        if stop.received is not None:
            return False
        began = time.monotonic()
        cond = cache.fetch([job.prompts.texts[prompt] for prompt, _ in part])
        rows = list(range(len(part)))
        images = paint(job.model, job.plan, cond, uncond, part, shape=shape, seed=job.seed, rows=rows)
        seconds = time.monotonic() - began
        for key, image in zip(part, images, strict=True):
            if not pictures.has(key):
                pictures.write(key, image, text_chunks(_record(job, key) | conditions))
        timing.add(len(part), seconds)
        on_pictures(len(part))
    return True


def _record(job: Generation, key: Key) -> dict[str, Any]:
    return {"prompt": job.prompts.texts[key[0]], "prompt_index": key[0], "image_index": key[1]}
