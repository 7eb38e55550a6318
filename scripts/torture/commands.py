"""The commands that are killed, on the built-in model, each short enough to be run hundreds of times."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "base"  # the run of stage 1 that all but `distill` start from
PROMPTS = (
    "a photo of a red ring\na photo of two blue circles\na photo of a white cross\na photo of a green star\n"
)
PRESET = """\
extends: shapes-4step-lora
distill:
  iterations: 6
  batch: 2
  fake_per_generator: 2
  lora: {rank: 2, alpha: 4}
  save_every: 2
  keep: 2
  log_every: 1
  sample_every: 3
  prompts: prompts.txt
tune_reward:
  epochs: 3
  prompts: prompts.txt
  eval_prompts: prompts.txt
  images_per_epoch: 4
  images_per_prompt: 2
  lora: {rank: 2, alpha: 2}
  rewards: [shapes-clip]
  held_out: [shapes-clip-heldout]
  eval_images: 2
  save_every: 1
  keep: 2
  sample_every: 2
  watch: {features: null}
model: {teacher_steps: 1}
hardware: {threads: 1}
"""


@dataclass(frozen=True)
class Command:
    """A command line. again: what is added to go on after a kill; made: the folders that it makes or changes."""

    name: str
    arguments: tuple[str, ...]
    made: tuple[str, ...]
    again: tuple[str, ...] = ()


DISTILL = ("distill", "--preset", "torture.yaml", "--quiet")
_SAMPLE = (
    "sample",
    "--prompts",
    "prompts.txt",
    "-n",
    "2",
    "--batch",
    "2",
    "--from",
    f"runs/{BASE}",
    "--grid",
)
_EVAL = (
    "eval",
    "shapes",
    "--from",
    f"runs/{BASE}",
    "--limit",
    "4",
    "--images-per-prompt",
    "1",
    "--batch",
    "2",
)
_EXPORT = ("export", BASE, "--format", "diffusers", "--no-check", "--quiet")
COMMANDS = (
    Command("distill", (*DISTILL, "--name", "one", "--resume", "auto"), ("runs/one",)),
    Command(
        "tune-reward",
        ("tune-reward", "--from", f"runs/{BASE}", "--name", "two", "--resume", "auto", "--quiet"),
        ("runs/two",),
    ),
    Command("sample", (*_SAMPLE, "--out", "pictures", "--quiet"), ("pictures",)),
    Command("eval", (*_EVAL, "--out", "evals/one", "--resume", "--quiet"), ("evals/one",)),
    Command("export", (*_EXPORT, "--out", "exports/one"), ("exports/one",), ("--force",)),
    Command("export --force", (*_EXPORT, "--out", "exports/old", "--force"), ("exports/old",)),
)
FIRST = (
    (*DISTILL, "--name", BASE, "--set", "distill.iterations=2"),
    (*_EXPORT, "--out", "exports/old"),
)
"""What is run once, before any command."""
