"""The program on the pretend device, in a process of its own: `tests.commands.fork(..., program="tests.pretend_program")`.

Each argument is a whole command line, and the commands follow one another. What the turns of their trainings asked of the
device is written to turns.json.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rtdmd_cli.cli import app
from rtdmd_cli.engine.compute import device as devices
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.distill import run as distill_run
from rtdmd_cli.engine.tune_reward import stage as tune_stage
from tests import pretend_device

TURNS = Path("turns.json")


def replace_everywhere(original: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Put `other` in the place of a function of the product, also where it was imported by its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rtdmd_cli"):
            for key in [key for key, value in vars(module).items() if value is original]:
                setattr(module, key, other)


def install() -> torch.device:
    """Let every command compute on the pretend device, which it treats like CUDA."""
    device = pretend_device.register()
    # torch refuses to give a parameter of the CPU the data of another device unless it knows that device well.
    torch.__future__.set_swap_module_params_on_conversion(True)
    replace_everywhere(devices.resolve_device, lambda name: device)
    replace_everywhere(devices.wait, lambda device: pretend_device.wait())
    optim._FUSED = (*optim._FUSED, device.type)
    return device


def watched(turns: list[Counter[str]], turn: Callable[..., None]) -> Callable[..., None]:
    """`turn`, with what it asked of the device noted."""

    def watching(*arguments: Any) -> None:
        before = len(pretend_device.LOG)
        turn(*arguments)
        turns.append(Counter(str(each) for each in pretend_device.LOG[before:]))

    return watching


def main() -> int:
    """The exit code of the first command that fails, else 0."""
    install()
    turns: dict[str, list[Counter[str]]] = {"distill": [], "tune": []}
    replace_everywhere(distill_run.iterate, watched(turns["distill"], distill_run.iterate))
    replace_everywhere(tune_stage.tune, watched(turns["tune"], tune_stage.tune))
    codes = (app.main(shlex.split(line)) for line in sys.argv[1:])
    failed = next((code for code in codes if code), 0)
    TURNS.write_text(json.dumps(turns), encoding="utf-8")
    return failed
