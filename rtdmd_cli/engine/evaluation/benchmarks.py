"""The benchmarks as data: prompts, judge, rewards, protocol, and the published figures to be put beside.

A benchmark's own judge and its rewards are names of `judges.find_judge`. The prompts of the published ones are the set of
the same name of `prompts.public_sets`, which is no part of the package: `rtdmd data fetch NAME` brings it into the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from rtdmd_cli.engine.prompts.public_sets import DATA, PREFIX, DataSet
from rtdmd_cli.engine.prompts.reading import SUFFIXES
from rtdmd_cli.errors import UsageError
from rtdmd_cli.shapes.prompts import benchmark as captions

BUILT_IN = "builtin:"  # begins the names of the package's own prompt sets


@dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    judge: the name of its own judge, "" for none. rewards: measured where none are asked for. images: pictures of each
    prompt by the protocol, None for the preset's. file: a prompt file of one's own, or "". published: names of judges whose
    figures are published for it. note: how these compare.
    """

    name: str
    measures: str
    protocol: str
    judge: str = ""
    rewards: tuple[str, ...] = ()
    images: int | None = 1
    file: str = ""
    published: tuple[str, ...] = ()
    note: str = ""

    @property
    def built_in(self) -> bool:
        """Whether its prompts are those of the package's own world."""
        return self.judge == SHAPES

    @property
    def data(self) -> DataSet | None:
        """Its public prompt set; None where the prompts are built in or a file of one's own."""
        return None if self.built_in or self.file else DATA[self.name]

    @property
    def prompts(self) -> int | None:
        """The number of its prompts; None where that is the file's."""
        if self.built_in:
            return len(captions())
        return self.data.prompts if self.data else None


@dataclass(frozen=True)
class Published:
    """A row of a published table: what was measured, its network evaluations a picture, and figures by judge name."""

    model: str
    evaluations: int | None
    figures: Mapping[str, float]


SHAPES = "shapes"
_RELEASED = "The paper names no prompts; the released configuration takes the first 64 of these."

BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark(
            name="geneval",
            measures="Objects, counts, colours and places, judged by an object detector: strict.",
            protocol="553 prompts x 4 pictures, Mask2Former Swin-S and CLIP ViT-L/14 colours; "
            "the mean of the six tasks' strict accuracies",
            judge="geneval",
            images=4,
            published=("geneval",),
            note="Not comparable: the published GenEval is the partial-credit score, and its detector was given pictures "
            "with red and blue swapped; this one is strict.",
        ),
        Benchmark(
            name="geneval2",
            measures="Questions about every part of a prompt, answered by Qwen3-VL (soft-TIFA).",
            protocol="800 prompts, geometric mean over the questions of a prompt, mean over prompts",
            judge="geneval2",
            published=("geneval2",),
        ),
        Benchmark(
            name="drawbench",
            measures="Five learned rewards on DrawBench's prompts.",
            protocol="200 prompts; mean reward over prompts",
            rewards=("clipscore", "aesthetic", "pickscore", "hpsv2", "imagereward"),
            published=("clipscore", "aesthetic", "pickscore", "hpsv2", "imagereward"),
            note=f"{_RELEASED} Its CLIPScore resizes pictures bilinearly, this one bicubically, as CLIP does.",
        ),
        Benchmark(
            name="hpsv3",
            measures="HPSv3, a learned human rating, on its own test prompts.",
            protocol="1,024 prompts; mean score over prompts",
            rewards=("hpsv3",),
            published=("hpsv3",),
            note=_RELEASED,
        ),
        Benchmark(
            name="ocr",
            measures="How much of a prompt's quoted text can be read in the picture.",
            protocol="1,018 prompts; 1 - normalised edit distance, and the share read in full",
            judge="ocr",
            published=("ocr",),
            note="The published figures were read by PaddleOCR; this engine holds newer models of that family.",
        ),
        Benchmark(
            name="pickscore",
            measures="PickScore, a learned human choice, on its test prompts.",
            protocol="2,048 prompts; mean score over prompts, undivided",
            rewards=("pickscore",),
            note="No figure is published: the released configuration measures PickScore on DrawBench's prompts.",
        ),
        Benchmark(
            name=SHAPES,
            measures="The built-in world's held-out prompts, judged by GenEval's strict rule.",
            protocol="553 prompts, the world's analytic detector; the mean of the six tasks' strict accuracies",
            judge=SHAPES,
            images=None,
        ),
    )
}

SOURCE = "RTDMD, arXiv 2605.26108"
PUBLISHED_SIZE = 1024  # px, of the published pictures of every model
_FAMILY = (
    "imagereward",
    "clipscore",
    "aesthetic",
    "pickscore",
    "hpsv2",
    "hpsv3",
    "geneval",
    "geneval2",
    "ocr",
)
PUBLISHED = (
    Published(
        "SD3-M, teacher with guidance",
        100,
        {
            "clipscore": 0.2936,
            "aesthetic": 5.5711,
            "pickscore": 22.3236,
            "hpsv2": 0.2810,
            "imagereward": 1.0759,
        },
    ),
    Published(
        "SD3-M, RTDMD",
        4,
        {
            "clipscore": 0.3161,
            "aesthetic": 5.9642,
            "pickscore": 22.8593,
            "hpsv2": 0.3211,
            "imagereward": 1.3024,
        },
    ),
    Published(
        "FLUX.2-klein-4B, teacher",
        50,
        dict(
            zip(
                _FAMILY,
                (0.8538, 0.2834, 5.3333, 22.3938, 0.2771, 11.7025, 0.7631, 0.2207, 0.6133),
                strict=True,
            )
        ),
    ),
    Published(
        "FLUX.2-klein-4B, RTDMD",
        4,
        dict(
            zip(
                _FAMILY,
                (1.3712, 0.3219, 5.7746, 23.9642, 0.3516, 15.5772, 0.9046, 0.2755, 0.6858),
                strict=True,
            )
        ),
    ),
)
"""The figures of the method's paper: undivided PickScore, 1024 px; GenEval with partial credit."""


def find_benchmark(name: str) -> Benchmark:
    """The row of that name, or a row for prompts of one's own. UsageError for neither.

    Such are files (.txt, .json, .jsonl), folders with a slash in their name, and sets as data:NAME or builtin:NAME.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    sets = (BUILT_IN, PREFIX)
    if name.startswith(sets) or name.lower().endswith(SUFFIXES) or "/" in name:
        stem = name.partition(":")[2] if name.startswith(sets) else Path(name).stem
        return Benchmark(
            name=stem or "prompts",
            measures="Rewards on prompts of one's own.",
            protocol="mean over prompts",
            file=name,
        )
    close = max(BENCHMARKS, key=lambda known: SequenceMatcher(None, name.lower(), known).ratio())
    raise UsageError(
        f"There is no benchmark `{name[:80]}`; the nearest is `{close}`.",
        f"Run: rtdmd eval {close}, or list them: rtdmd eval list. A prompt file ends in {', '.join(SUFFIXES)}.",
    )
