"""Every command that writes, on the tiny model, run in this process; and what must hold of what it leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rtdmd_cli.cli import app
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.disk import Disk
from scripts.torture import trials
from tests.commands import as_overrides
from tests.tiny_models import PROMPTS, TEXT_LENGTH, sd3_folder
from tests.tiny_runs import make_run

SEED = int(os.environ.get("RTDMD_FAULTS_SEED", "0"))
EVERY = os.environ.get("RTDMD_FAULTS") == "all"
"""Try every call and every moment, which takes an hour, and not a sample of them by SEED."""

_DISTILL = {"iterations": 3, "save_every": 1, "keep": 2, "log_every": 1, "sample_every": 2}
_TUNE = {
    "prompts": "tiny.txt",
    "epochs": 2,
    "images_per_epoch": 4,
    "images_per_prompt": 2,
    "lora.rank": 2,
    "lora.alpha": 2,
    "held_out": "[]",
    "watch.features": "null",
    "save_every": 1,
    "keep": 1,
    "sample_every": 0,
    "eval_images": 2,
}


@dataclass(frozen=True)
class Case:
    """A command. again: what is added to go on after it was broken off."""

    arguments: tuple[str, ...]
    again: tuple[str, ...] = ()


_FROM = ("--from", "runs/base")
_RESUME = ("--resume", "auto", "--quiet")
_EXPORT = ("export", "base", "--format", "diffusers", "--no-check", "--quiet", "--out")
CASES = {
    "distill": Case(
        ("distill", "--preset", "tiny.yaml", "--name", "one", *as_overrides("distill", _DISTILL), *_RESUME)
    ),
    "tune-reward": Case(
        (
            "tune-reward",
            *_FROM,
            "--name",
            "two",
            "--reward",
            "shapes-clip",
            *as_overrides("tune_reward", _TUNE),
        )
        + ("--set", "distill.eps=0.001", "--set", "hardware.threads=1", *_RESUME)
    ),
    "sample": Case(
        ("sample", "--prompts", "tiny.txt", *_FROM, "--batch", "2", "--out", "pictures", "--grid", "--quiet")
    ),
    "eval": Case(
        ("eval", "tiny.txt", "--rewards", "shapes-clip", *_FROM, "--images-per-prompt", "1", "--batch", "2")
        + ("--out", "evals/one", "--resume", "--quiet")
    ),
    "export": Case((*_EXPORT, "exports/one"), ("--force",)),
    "export --force": Case((*_EXPORT, "exports/old", "--force")),
    "data fetch": Case(("data", "fetch", "geneval-train", "--quiet")),
    "runs compare": Case(("runs", "compare", "base", "other", "--out", "page.html", "--force", "--quiet")),
}


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Within the block: this folder, a cache in it, one thread."""
    threads, before = torch.get_num_threads(), os.environ.get("RTDMD_CACHE")
    os.environ["RTDMD_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    try:
        with chdir(folder):
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("RTDMD_CACHE")
        if before is not None:
            os.environ["RTDMD_CACHE"] = before


def prepare(folder: Path) -> None:
    """What every case starts from: prompts, a preset, two finished runs, an export, and files of the user's."""
    folder.mkdir()
    (folder / "tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    where = f"family: sd3, path: {sd3_folder()}, resolution: 16, text_length: {TEXT_LENGTH}"
    (folder / "tiny.yaml").write_text(
        f"model: {{{where}, guidance: 4.0, teacher_steps: 1}}\n"
        "distill: {batch: 2, fake_per_generator: 2, prompts: tiny.txt, lora: {rank: 2, alpha: 4}, eps: 0.001}\n"
        "hardware: {threads: 1}\n",
        encoding="utf-8",
    )
    with working_in(folder):
        for name in ("base", "other"):
            make_run(Path("runs"), name)
        assert app.main([*_EXPORT, "exports/old"]) == 0
    for name, text in trials.MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def run(folder: Path, case: Case, disk: Disk | None = None, again: bool = False) -> int:
    """The command in `folder` on that disk; its exit code."""
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        if disk is not None:
            patch.setattr(files, "disk", disk)
        return app.main([*case.arguments, *(case.again if again else ())])


def whole(folder: Path) -> None:
    """AssertionError where something has its name and is not whole, or a file of the user's is gone."""
    assert trials.broken(folder) == ""


def left(folder: Path) -> dict[str, str]:
    """Names and contents without times; of the folders of the model's own, nothing."""
    return trials.contents(folder)


def fresh(start: Path, place: Path) -> Path:
    """A copy of the prepared folder."""
    return Path(shutil.copytree(start, place, symlinks=True))


def digest(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
