"""The public sets of prompts, as data. No torch, nothing is fetched here.

A sha256 that could be checked is pinned; where it could not, it is None and the first download records its own.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from rtdmd_cli.engine.prompts.geneval_train import PROMPTS, VALIDATION_PROMPTS
from rtdmd_cli.errors import UsageError

PREFIX = "data:"
"""Begins the name of such a set where prompts are asked for, as in data:geneval."""


@dataclass(frozen=True)
class DataSet:
    """One row. url: "" for a set that is made on this machine.

    file: the name under which it is kept; its ending says how it is read. sha256: of the file as published; also:
    of other files that hold the same prompts. size in bytes and number of prompts, None where not known. distinct:
    the file repeats its prompts; each is taken once, sorted. ends: the first 16 digits of the sha256 of the first and the
    last prompt, by which a set without a pinned sum is known.
    """

    name: str
    use: Literal["training", "validation", "benchmark"]
    what: str
    file: str
    url: str
    sha256: str | None
    size: int | None
    prompts: int | None
    licence: str
    source: str
    distinct: bool = False
    also: tuple[str, ...] = ()
    ends: tuple[str, str] | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every sha256 that is this set; empty where none is pinned yet."""
        return (self.sha256, *self.also) if self.sha256 else ()


_GITHUB = "https://raw.githubusercontent.com"
_FLOW_GRPO = f"{_GITHUB}/yifan123/flow_grpo/main/dataset"
_RTDMD = f"{_GITHUB}/Harahan/RTDMD/bdfabaa97adaf883ee22178bd14ae2ac27938093/dataset"

DATA = {
    each.name: each
    for each in (
        DataSet(
            name="pickscore-train",
            use="training",
            what="Prompts people typed into Pick-a-Pic; the published stage 1 trains on them.",
            file="train.txt",
            url=f"{_FLOW_GRPO}/pickscore/train.txt",
            sha256=None,
            size=None,
            prompts=None,
            licence="see Pick-a-Pic (yuvalkirstain/pickapic_v1)",
            source="yifan123/flow_grpo, dataset/pickscore/train.txt",
            ends=("44221b46651c6cd3", "5d9707843517858c"),
        ),
        DataSet(
            name="geneval-train",
            use="training",
            what="GenEval's grammar, made on this machine, no scene of test or validation set; for the geneval-soft reward.",
            file="train.jsonl",
            url="",
            sha256="c30534eddf1d8fd368950e87ef357db93d9de13c8b6a08ed123d7e0a440299dd",
            size=8_501_572,
            prompts=PROMPTS,
            licence="Apache-2.0 (made by rtdmd; the grammar is GenEval's, MIT)",
            source="made here, seed 0",
        ),
        DataSet(
            name="geneval-val",
            use="validation",
            what="The same grammar, scenes of neither the training nor the test set; measured while a run trains.",
            file="val.jsonl",
            url="",
            sha256="2bdd351169afc6f280fe9b065d7f7b8fe649dd1efcbe812dde898a4f07b5b788",
            size=86_468,
            prompts=VALIDATION_PROMPTS,
            licence="Apache-2.0 (made by rtdmd; the grammar is GenEval's, MIT)",
            source="made here, seed 1",
        ),
        DataSet(
            name="geneval",
            use="benchmark",
            what="GenEval: objects, numbers, colours and places, with requirements.",
            file="test.jsonl",
            url=f"{_GITHUB}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
            sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            size=85_209,
            prompts=553,
            licence="MIT",
            source="djghosh13/geneval, prompts/evaluation_metadata.jsonl",
        ),
        DataSet(
            name="geneval2",
            use="benchmark",
            what="GenEval2: up to ten things a prompt, with questions about the picture.",
            file="test.jsonl",
            url=f"{_RTDMD}/geneval2/test.jsonl",
            sha256="09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
            size=423_220,
            prompts=800,
            licence="CC BY-NC 4.0",
            source="facebookresearch/GenEval2, as in Harahan/RTDMD, dataset/geneval2/test.jsonl",
        ),
        DataSet(
            name="drawbench",
            use="benchmark",
            what="DrawBench: 200 prompts on what models find hard.",
            file="test.txt",
            url=f"{_RTDMD}/drawbench/test.txt",
            sha256="9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0",
            size=None,
            prompts=200,
            licence="as published with Imagen",
            source="Harahan/RTDMD, dataset/drawbench/test.txt (each prompt five times)",
            distinct=True,
            also=("18cef96e28e1b3b6b529dc5b8ade0d7f55e65939797fd8af49ef702e9119c2a7",),
        ),
        DataSet(
            name="hpsv3",
            use="benchmark",
            what="HPSv3's test prompts: long descriptions.",
            file="test.txt",
            url=f"{_RTDMD}/hpsv3/test.txt",
            sha256="31592ea9af348610c0c840147bc5bc5eeac34d4dfd831c62a298c04e7ec4b65d",
            size=90_278,
            prompts=1_024,
            licence="see HPSv3 (MizzenAI/HPSv3)",
            source="Harahan/RTDMD, dataset/hpsv3/test.txt",
        ),
        DataSet(
            name="ocr",
            use="benchmark",
            what="Pictures with a text in them, which the prompt quotes.",
            file="test.txt",
            url=f"{_FLOW_GRPO}/ocr/test.txt",
            sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
            size=217_565,
            prompts=1_018,
            licence="see Flow-GRPO (yifan123/flow_grpo)",
            source="yifan123/flow_grpo, dataset/ocr/test.txt",
        ),
        DataSet(
            name="pickscore",
            use="benchmark",
            what="The test prompts of Pick-a-Pic.",
            file="test.txt",
            url=f"{_FLOW_GRPO}/pickscore/test.txt",
            sha256="d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262",
            size=None,
            prompts=2_048,
            licence="see Pick-a-Pic (yuvalkirstain/pickapic_v1)",
            source="yifan123/flow_grpo, dataset/pickscore/test.txt",
        ),
    )
}


def find_data(name: str) -> DataSet:
    """The row of that name, with or without "data:". UsageError, with the nearest name, for none."""
    short = name.removeprefix(PREFIX)
    if short in DATA:
        return DATA[short]
    near = get_close_matches(short, DATA, n=1)
    raise UsageError(
        f"There is no prompt set `{short}`.",
        f"Did you mean `{near[0]}`?" if near else "List them: rtdmd data list",
    )
