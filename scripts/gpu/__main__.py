"""What this machine's GPU does with rtdmd; see `scripts/gpu_check --help`."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from rtdmd_cli.cli.quiet import quiet_libraries
from rtdmd_cli.engine.compute.allocator import let_segments_grow
from rtdmd_cli.engine.compute.device import free_memory
from rtdmd_cli.engine.storage.files import write_json
from rtdmd_cli.engine.storage.run_folder import describe_environment
from rtdmd_cli.errors import is_out_of_memory
from scripts.gpu.report import agreement_lines, beyond, table

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts/bench_results"
LIMIT = 520
"""Seconds after which nothing further is begun; what is expected to end later is passed over."""

FULL = "out of memory"
"""Why a part failed that a card is merely too small for."""
T = TypeVar("T")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the JSON record.")] = OUT,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time compiled blocks too: minutes more.")
    ] = False,
) -> None:
    """Check and measure rtdmd on a CUDA device, in under 9 minutes: small models of every family through both stages
    in bf16, quantised and compiled bases against the plain one, and seconds and peak memory of an update at the
    published models' sizes, with random weights. Without such a device it says so and ends well.
    """
    let_segments_grow()
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was measured.")
        return
    quiet_libraries()
    record = check(torch.device("cuda"), compiled)
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-{_slug(record['environment']['device'])}.json"
    write_json(path, record)
    _say(f"{record['seconds']:.0f} s; written to {path}")
    if record["beyond"] or record["failed"]:
        raise typer.Exit(1)


def check(device: torch.device, compiled: bool) -> dict[str, Any]:
    """Everything, printed as it comes; the record."""
    from scripts.gpu.measure import STATED, agreement, measure, planned
    from scripts.gpu.models import CASES, COMPILED
    from scripts.gpu.small import FAMILIES, both_stages

    began, failed = time.monotonic(), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        tried = [
            attempt(name, partial(both_stages, name, device, Path(folder)), failed, device)
            for name in FAMILIES
        ]
    small = [row for row in tried if row]
    for row in small:
        print(
            f"{row['family']}: stage 1 {row['distill_seconds']:.1f} s, stage 2 {row['tune_seconds']:.1f} s, in bf16"
        )
    found = attempt("agreement", partial(agreement, device), failed, device) or {}
    print("\n".join(agreement_lines(found, STATED)))
    rows = []
    for case in (*CASES, *([COMPILED] if compiled else [])):
        _say(f"{time.monotonic() - began:.0f} s: {case.name}")
        late = time.monotonic() - began + case.seconds > LIMIT
        measured = None if late else attempt(case.name, partial(measure, case, device), failed, device)
        note = {"model": case.name, "note": failed.get(case.name, "no time left")}
        rows.append((measured or note) | planned(case.settings(device)))
    print(table(rows))
    return {
        "environment": describe_environment(["scripts/gpu_check"], device),
        "small": small,
        "agreement": found,
        "stated": STATED,
        "beyond": beyond(found, STATED),
        "updates": rows,
        "failed": {name: reason for name, reason in failed.items() if reason != FULL},
        "seconds": time.monotonic() - began,
    }


def attempt(name: str, part: Callable[[], T], failed: dict[str, str], device: torch.device) -> T | None:
    """What a part gives; None where it fails, which is shown and entered in `failed`: the others are worth having.

    The memory is free again afterwards.
    """
    try:
        return part()
    except Exception as error:
        if is_out_of_memory(error):
            failed[name] = FULL
        else:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        free_memory(device)
    return None


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
