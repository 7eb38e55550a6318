"""How long a step takes; see `scripts/bench --help`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from rtdmd_cli.cli.quiet import quiet_libraries
from rtdmd_cli.engine.compute.device import resolve_device
from rtdmd_cli.engine.storage.files import write_json, write_text
from rtdmd_cli.engine.storage.run_folder import describe_environment
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.errors import EnvironmentFailure
from scripts.benchmark.bare import Evaluation, recorded, replay
from scripts.benchmark.baseline import Baseline
from scripts.benchmark.cases import CASES, Case, step_of, trainer_of

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts/bench_results"
BASELINE = "baseline: three copies"
BARE = "the network's evaluations alone"
Clock = Callable[[], float]

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Step:
    """What is timed, given the number of a round, and what is done before the clock starts."""

    run: Callable[[int], None]
    prepare: Callable[[int], None] = lambda number: None


@app.command()
def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each step is measured.")] = 9,
    only: Annotated[str, typer.Option(help="Rows whose name holds this, beside the published step.")] = "",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time compiled blocks too: minutes more.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the table and the JSON record.")] = OUT,
) -> None:
    """Time a step of stage 1 on the built-in model: against the network's evaluations that it contains, against a
    baseline that does what the published code does, and with every option that is about time or memory.

    One step of each row in turn, again and again, so that a busy machine is busy for all; medians and their ratios. The
    seconds are the process's own, which other programs change little, on a CPU; on CUDA those of the clock.
    """
    quiet_libraries()
    where = resolve_device(device)
    cases = [case for case in CASES if (compiled or not case.slow_to_start) and (only in case.name)]
    cases = [CASES[0], *(case for case in cases if case is not CASES[0])]
    steps, notes = prepared(cases, where, batch)
    load = os.getloadavg()
    seconds = interleaved(steps, rounds, clock_of(where))
    record = {
        "environment": describe_environment(["scripts/bench"], where),
        "load_before": load,
        "load_after": os.getloadavg(),
        "batch": batch,
        "rounds": rounds,
        "left_out": notes,
        "seconds": seconds,
    }
    text = table(record, cases)
    print(text)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-bench-{where.type}"
    write_json(out / f"{stem}.json", record)
    write_text(out / f"{stem}.md", text + "\n")


def prepared(cases: list[Case], device: torch.device, batch: int) -> tuple[dict[str, Step], dict[str, str]]:
    """A step by the name of each row, the bare evaluations and the baseline among them; rows that can't be, and why."""
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for case in cases:
        say(f"preparing: {case.name}")
        try:
            trainer = trainer_of(case, device, batch)
        except EnvironmentFailure as error:
            notes[case.name] = error.message
            continue
        steps[case.name] = Step(step_of(trainer))
        if case is CASES[0]:
            steps[BARE] = bare_step(trainer_of(case, device, batch))
            steps[BASELINE] = Step(Baseline(trainer).step)
    return steps, notes


def bare_step(trainer: Trainer) -> Step:
    """Replays the evaluations that a step of this number contains; recording them is not timed."""
    step, known = step_of(trainer), dict[int, list[Evaluation]]()

    def prepare(number: int) -> None:
        known.clear()
        known[number] = recorded(trainer, step, number)

    return Step(lambda number: replay(trainer, known[number]), prepare)


def interleaved(steps: Mapping[str, Step], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each step, round by round: one of each in turn, all with the same number. The first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            step.prepare(number)
            began = clock()
            step.run(number)
            taken = clock() - began
            if number:
                seconds[name].append(taken)
        say(f"round {number} of {rounds}")
    return seconds


def clock_of(device: torch.device) -> Clock:
    """Seconds: of the process's threads together on a CPU; of the clock, after the device has finished, on CUDA."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def table(record: Mapping[str, Any], cases: list[Case]) -> str:
    """Markdown: median seconds, the ratio to the row it is compared with (median of the rounds' ratios), and the machine."""
    seconds: Mapping[str, list[float]] = record["seconds"]
    against = {BARE: CASES[0].name, BASELINE: CASES[0].name} | {case.name: case.against for case in cases}
    lines = ["| step | seconds | ratio | to |", "| --- | ---: | ---: | --- |"]
    for name, taken in seconds.items():
        other = seconds.get(against[name])
        ratio = "" if other is None or other is taken else f"{ratio_of(taken, other):.3f}"
        lines.append(f"| {name} | {median(taken):.4f} | {ratio} | {against[name] if ratio else ''} |")
    lines += [f"| {name} | {reason} | | |" for name, reason in record["left_out"].items()]
    outside = 1 - ratio_of(seconds[BARE], seconds[CASES[0].name])
    environment = record["environment"]
    return "\n".join(
        [
            f"A step of stage 1 (both turns, batch {record['batch']}) on the built-in model, "
            f"medians of {record['rounds']} rounds.",
            "",
            *lines,
            "",
            f"Outside the network's own evaluations: {outside:.1%}.",
            f"{environment['device']}, {environment['cpus']} cores, {environment['threads']} threads, "
            f"torch {environment['packages']['torch']}, load {record['load_before'][0]:.1f} to {record['load_after'][0]:.1f}.",
        ]
    )


def ratio_of(taken: list[float], other: list[float]) -> float:
    """Median of the rounds' ratios: both steps of a round met the same machine."""
    return median(one / two for one, two in zip(taken, other, strict=True))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
