"""`python -m scripts.rehearsal.measured RECORD ARGUMENTS`: the program with these arguments, and what each phase took.

Seconds, processor seconds, FLOPs and the peak of the process's memory, by phase, as JSON in the file RECORD. Phases may
stand inside one another: decoding inside the generator's turn, say; each has its own whole figures.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtdmd_cli.cli import app
from rtdmd_cli.engine.planning.account import Account

GIB = 2**30
STATUS = Path("/proc/self/status")
EVERY = 0.02
"""Seconds between two looks at the process's memory."""
PHASES = {
    "load": (
        ("rtdmd_cli.engine.backbones.loading", "Opener", "vae"),
        ("rtdmd_cli.engine.backbones.loading", "Opener", "encoder"),
        ("rtdmd_cli.engine.backbones.loading", "Opener", "transformer"),
    ),
    "encode prompts": (("rtdmd_cli.engine.backbones.common", "PipelineBackbone", "encode_in_parts"),),
    "decode": (("rtdmd_cli.engine.backbones.common", "PipelineBackbone", "pictures"),),
    "pictures": (
        ("rtdmd_cli.engine.training.previews", "", "make_previews"),
        ("rtdmd_cli.engine.training.previews", "", "save_sample_grid"),
        ("rtdmd_cli.engine.training.health", "Health", "lag"),
        ("rtdmd_cli.engine.training.health", "Health", "save_panel"),
    ),
    "fake turn": (
        ("rtdmd_cli.engine.distill.recipe", "", "update_fake_score"),
        ("rtdmd_cli.engine.tune_reward.recipe", "", "update_fake_score"),
    ),
    "generator turn": (
        ("rtdmd_cli.engine.distill.recipe", "", "update_generator"),
        ("rtdmd_cli.engine.tune_reward.recipe", "", "update_generator"),
    ),
    "rollout": (("rtdmd_cli.engine.tune_reward.recipe", "", "roll_out"),),
    "rewards": (("rtdmd_cli.engine.rewards.mixture", "RewardMixture", "score"),),
    "gradient of rewards": (("rtdmd_cli.engine.rewards.mixture", "RewardMixture", "pull"),),
    "gradient of decode": (("rtdmd_cli.engine.tune_reward.pull", "", "latent_gradient"),),
    "save": (
        ("rtdmd_cli.engine.training.session", "", "save"),
        ("rtdmd_cli.engine.training.loop", "", "save"),
    ),
}
"""Phase -> module, class ("" for none) and name of the functions that are it."""
PART_OF = {"decode": "gradient of decode"}
"""Phase -> another within which it is no phase of its own: there it also holds what its backward pass needs."""


@dataclass
class Phase:
    """What the calls of one phase took together; GiB are the peaks of the whole process meanwhile: resident, of that not
    file-backed, and of tensors that are alive (a file of weights that is mapped counts as one)."""

    phase: str
    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: int = 0
    peak_rss_gib: float = 0.0
    peak_anonymous_gib: float = 0.0
    peak_live_gib: float = 0.0


class Live(Account):
    """Bytes of live tensors and operations, told to whoever asks at each new tensor."""

    def __init__(self, told: Callable[[int], None]) -> None:
        super().__init__()
        self._told = told

    def _count(self, tensor: Tensor) -> None:
        super()._count(tensor)
        self._told(self.live)


class Meter:
    """The phases of this process."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.live = Live(self.hold)
        self._open: list[Phase] = []
        self._ended = threading.Event()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within the block belongs to a phase, and counts once where the phase is entered again inside."""
        record = self.phases.setdefault(name, Phase(name))
        if record in self._open or any(each.phase == PART_OF.get(name) for each in self._open):
            yield
            return
        self._open.append(record)
        before = time.monotonic(), time.process_time(), self.live.flops
        try:
            yield
        finally:
            self.look()
            self._open.remove(record)
            record.calls += 1
            record.seconds += time.monotonic() - before[0]
            record.cpu_seconds += time.process_time() - before[1]
            record.flops += self.live.flops - before[2]

    def look(self) -> None:
        """Take the memory of this moment into the phases that are open."""
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        rss, anonymous = (int(lines[key].split()[0]) * 1024 / GIB for key in ("VmRSS", "RssAnon"))
        for record in list(self._open):
            record.peak_rss_gib = max(record.peak_rss_gib, rss)
            record.peak_anonymous_gib = max(record.peak_anonymous_gib, anonymous)

    def hold(self, live: int) -> None:
        """So many bytes of tensors are alive."""
        for record in self._open:
            record.peak_live_gib = max(record.peak_live_gib, live / GIB)

    def watch(self) -> None:
        """Look again and again until `stop`."""

        def again() -> None:
            while not self._ended.wait(EVERY):
                self.look()

        threading.Thread(target=again, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the functions of PHASES report here."""
        before = []
        for name, places in PHASES.items():
            for module, owner, function in places:
                there = importlib.import_module(module)
                holder = vars(there)[owner] if owner else there
                before.append((holder, function, vars(holder)[function]))
                setattr(holder, function, self._measured(name, vars(holder)[function]))
        try:
            yield
        finally:
            for holder, function, own in before:
                setattr(holder, function, own)

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inside(*args: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*args, **named)

        return inside


def main(record: Path, arguments: list[str]) -> int:
    """Run the program; its exit code. The record is written however it ends."""
    meter = Meter()
    meter.watch()
    code = 1
    try:
        with meter.attached(), meter.phase("all"), meter.live:
            code = app.main(arguments)
    finally:
        meter.stop()
        phases = [asdict(phase) for phase in meter.phases.values()]
        found = {"arguments": arguments, "exit_code": code, "threads": torch.get_num_threads()}
        record.write_text(json.dumps(found | {"phases": phases}, indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
