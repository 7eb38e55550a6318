"""`python -m scripts.torture`: see `--help`."""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from scripts.torture.commands import COMMANDS, Command, prepare
from scripts.torture.trials import Reference, Trial, attempt, measure, run


def main() -> int:
    """Kill, run again, compare; 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="scripts/torture_kills",
        description="Kill the commands (SIGKILL) at random instants and at random calls of the disk, in turns; run each "
        "again to its end, and compare with an undisturbed run: nothing may be lost, nothing of the user's touched, "
        "nothing left behind.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how many, shared among the commands in turns")
    parser.add_argument(
        "--writes",
        type=int,
        help="how many more, each in the middle of a write to a file that stands alone; default: a quarter of --kills",
    )
    parser.add_argument("--seed", type=int, default=0, help="of commands' order, instants and calls")
    parser.add_argument(
        "--work", type=Path, help="an empty folder to work in, kept; default: a temporary one"
    )
    given = parser.parse_args()
    work = (given.work or Path(tempfile.mkdtemp(prefix="rtdmd-torture-"))).resolve()
    began = time.monotonic()
    say(f"seed {given.seed}")
    load_modules()
    require_one_thread()
    prepare(work / "start", work / "model", run)
    references = dict[str, Reference]()
    trials = torture(work, given.kills, given.seed, references)
    writes = given.kills // 4 if given.writes is None else given.writes
    trials += torture_writes(work, writes, given.seed, references)
    lost = [trial for trial in trials if trial.lost]
    used = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    summary = {
        "kills": sum(trial.killed for trial in trials),
        "ended_before": sum(not trial.killed for trial in trials),
        "lost": len(lost),
        "commands": dict(Counter(trial.command for trial in trials)),
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum(each.ru_utime + each.ru_stime for each in used)),
    }
    print(json.dumps(summary | {"losses": [asdict(trial) for trial in lost]}, indent=2))
    if given.work is None and not lost:
        shutil.rmtree(work)
    return 1 if lost else 0


def load_modules() -> None:
    """Import what the commands import, and as they do, once for all forks."""
    from rtdmd_cli.engine.compute.importing import quick_imports

    with quick_imports():
        import rtdmd_cli.cli.distill
        import rtdmd_cli.cli.eval
        import rtdmd_cli.cli.export
        import rtdmd_cli.cli.sample
        import rtdmd_cli.cli.tune_reward
        import rtdmd_cli.engine.distill.run
        import rtdmd_cli.engine.evaluation.report
        import rtdmd_cli.engine.evaluation.run
        import rtdmd_cli.engine.export.run
        import rtdmd_cli.engine.sampling.pictures
        import rtdmd_cli.engine.tune_reward.run  # noqa: F401


def require_one_thread() -> None:
    """RuntimeError where another one runs: a fork does not have it, but the locks that it held."""
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("More than one thread runs before the first fork: set OMP_NUM_THREADS=1")


def torture(work: Path, kills: int, seed: int, references: dict[str, Reference]) -> list[Trial]:
    """So many kills, command by command in turns; each command's first run is the one to compare with.

    A command that ends before its instant is no kill, and another instant is tried; twice as many trials at most.
    references: by the command's name; those that are missing are measured and put there.
    """
    draw = random.Random(seed)
    trials: list[Trial] = []
    order = list(COMMANDS)
    draw.shuffle(order)
    done = 0
    while done < kills and len(trials) < 2 * kills:
        command, by_call = order[done % len(order)], done // len(order) % 2 == 0
        reference = _reference(work, command, references)
        instant = None if by_call else draw.uniform(0, reference.seconds)
        call = draw.randint(1, reference.calls) if by_call else None
        trial = attempt(work / "start", work, reference, instant, call)
        trials.append(trial)
        done += trial.killed
        say(f"{done}/{kills} {command.name} {_where(reference, trial)}: {_outcome(trial)}")
    return trials


def torture_writes(work: Path, kills: int, seed: int, references: dict[str, Reference]) -> list[Trial]:
    """So many kills in the middle of a write to a file that stands alone, in turns of the commands that have such.

    Nearly all calls of the disk are of files in folders that get their names when they are whole, so that `torture` hardly
    meets one of these. references: as there.
    """
    draw, trials, order = random.Random(f"{seed} writes"), list[Trial](), list(COMMANDS)
    draw.shuffle(order)
    for number in range(2 * kills):
        reference = _reference(work, order[number % len(order)], references)
        if len(trials) == kills or not reference.writes:
            continue
        trial = attempt(work / "start", work, reference, write=draw.randint(1, reference.writes))
        trials.append(trial)
        say(f"{len(trials)}/{kills} {trial.command} {_where(reference, trial)}: {_outcome(trial)}")
    return trials


def _reference(work: Path, command: Command, references: dict[str, Reference]) -> Reference:
    if command.name not in references:
        references[command.name] = measure(work / "start", work, command)
    return references[command.name]


def _where(reference: Reference, trial: Trial) -> str:
    if trial.write is not None:
        return f"in write {trial.write} of {reference.writes} to a file that stands alone"
    if trial.call is not None:
        return f"at call {trial.call} of {reference.calls}"
    return f"after {trial.instant:.2f} of {reference.seconds:.2f} s"


def _outcome(trial: Trial) -> str:
    return (trial.lost or "nothing lost") if trial.killed else "had ended before"


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
