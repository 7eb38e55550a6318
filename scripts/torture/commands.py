"""The commands that are broken off: all that write for long, on a random model so small that each takes a second or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

BASE = "base"  # the run of stage 1 that all but `distill` start from
PROMPTS = ("a ring", "two blue rings", "a red circle", "a green cross")  # of the small tokenizers' words
PRESET = """\
model: {{family: sd3, path: {model}, resolution: 16, text_length: 8, guidance: 4.0, teacher_steps: 1}}
distill:
  prompts: prompts.txt
  iterations: 3
  batch: 2
  fake_per_generator: 2
  lora: {{rank: 2, alpha: 4, targets: [to_q, to_out.0]}}
  eps: 0.001
  save_every: 1
  keep: 2
  log_every: 1
  sample_every: 2
tune_reward:
  prompts: prompts.txt
  epochs: 2
  images_per_epoch: 4
  images_per_prompt: 2
  lora: {{rank: 2, alpha: 2, targets: [to_q, to_out.0]}}
  rewards: [shapes-clip]
  held_out: []
  eval_images: 2
  save_every: 1
  keep: 1
  sample_every: 0
  watch: {{features: null}}
hardware: {{threads: 1}}
"""
MINE = {
    "exports/one.old/mine": "mine",
    "exports/old.old/mine": "mine",
    "pictures/notes": "mine",
    "runs/one.old/f": "mine",
}
"""Files of the user's that lie beside the program's."""


@dataclass(frozen=True)
class Command:
    """A command line. again: what is added to go on after it was broken off."""

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...] = ()


_DISTILL = ("distill", "--preset", "small.yaml", "--quiet")
_FROM = ("--from", f"runs/{BASE}")
_RESUME = ("--resume", "auto")
_EXPORT = ("export", BASE, "--format", "diffusers", "--no-check", "--quiet", "--out")
_EVAL = (
    "eval",
    "prompts.txt",
    "--rewards",
    "shapes-clip",
    *_FROM,
    "--images-per-prompt",
    "1",
    "--batch",
    "2",
)
_SAMPLE = ("sample", "--prompts", "prompts.txt", *_FROM, "--batch", "2", "--out", "pictures", "--grid")
COMMANDS = (
    Command("distill", (*_DISTILL, "--name", "one", *_RESUME)),
    Command("tune-reward", ("tune-reward", *_FROM, "--name", "two", *_RESUME, "--quiet")),
    Command("sample", (*_SAMPLE, "--quiet")),
    Command("eval", (*_EVAL, "--out", "evals/one", "--resume", "--quiet")),
    Command("export", (*_EXPORT, "exports/one"), ("--force",)),
    Command("export --force", (*_EXPORT, "exports/old", "--force")),
)
FIRST = ((*_DISTILL, "--name", BASE, "--set", "distill.iterations=1"), (*_EXPORT, "exports/old"))
"""What is run once, before any command."""


def prepare(folder: Path, model: Path, run: Callable[[Path, Sequence[str]], None]) -> None:
    """What every command starts from: prompts, a preset, a run, its export, and files of the user's.

    model: an empty folder for the model. run: runs a command line in a folder, and raises where it fails.
    """
    from tests.tiny_models import save_sd3

    save_sd3(model, layers=1)
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(PRESET.format(model=model), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for arguments in FIRST:
        run(folder, arguments)
    for name, text in MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
