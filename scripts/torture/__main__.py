"""`python -m scripts.torture`: see `--help`."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from scripts.torture.commands import COMMANDS
from scripts.torture.trials import Reference, Trial, attempt, measure, prepare


def main() -> int:
    """Kill, run again, compare; 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="scripts/torture_kills",
        description="Kill the commands (SIGKILL) at random instants and at random calls of the disk, in turns; run each "
        "again to its end, and compare with an undisturbed run: nothing may be lost, nothing of the user's touched, "
        "nothing left behind.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how many, shared among the commands in turns")
    parser.add_argument("--seed", type=int, default=0, help="of instants and calls")
    parser.add_argument(
        "--work", type=Path, help="an empty folder to work in, kept; default: a temporary one"
    )
    given = parser.parse_args()
    load_modules()
    work = (given.work or Path(tempfile.mkdtemp(prefix="rtdmd-torture-"))).resolve()
    began = time.monotonic()
    prepare(work / "start")
    trials = torture(work, given.kills, given.seed)
    lost = [trial for trial in trials if trial.lost]
    summary = {
        "kills": sum(trial.killed for trial in trials),
        "ended_before": sum(not trial.killed for trial in trials),
        "lost": len(lost),
        "commands": dict(Counter(trial.command for trial in trials)),
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(summary | {"losses": [asdict(trial) for trial in lost]}, indent=2))
    if given.work is None and not lost:
        shutil.rmtree(work)
    return 1 if lost else 0


def load_modules() -> None:
    """Import what the commands import, once for all forks."""
    import rtdmd_cli.engine.distill.run
    import rtdmd_cli.engine.evaluation.run
    import rtdmd_cli.engine.export.run
    import rtdmd_cli.engine.sampling.pictures
    import rtdmd_cli.engine.tune_reward.run  # noqa: F401


def torture(work: Path, kills: int, seed: int) -> list[Trial]:
    """That many trials, command by command in turns; each command's first run is the one to compare with."""
    draw, references, trials = random.Random(seed), {}, []
    order = list(COMMANDS)
    draw.shuffle(order)
    for number in range(kills):
        command = order[number % len(order)]
        if command.name not in references:
            references[command.name] = measure(work / "start", work, command)
        reference: Reference = references[command.name]
        by_call = number // len(order) % 2 == 0
        instant = None if by_call else draw.uniform(0, reference.seconds)
        call = draw.randint(1, reference.calls) if by_call else None
        trial = attempt(work / "start", work, reference, instant, call)
        where = (
            f"at call {call} of {reference.calls}"
            if by_call
            else f"after {instant:.2f} of {reference.seconds:.2f} s"
        )
        print(
            f"{number + 1}/{kills} {command.name} {where}: {trial.lost or 'nothing lost'}",
            file=sys.stderr,
            flush=True,
        )
        trials.append(trial)
    return trials


if __name__ == "__main__":
    sys.exit(main())
