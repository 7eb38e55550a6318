"""What this machine's GPU does with rtdmd; see `scripts/gpu_check --help`."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rtdmd_cli.cli.quiet import quiet_libraries
from rtdmd_cli.engine.storage.files import write_json
from rtdmd_cli.engine.storage.run_folder import describe_environment
from rtdmd_cli.errors import RtdmdError
from scripts.gpu.report import agreement_lines, beyond, table

ROOT = Path(__file__).parents[2]
OUT = ROOT / "scripts/bench_results"
LIMIT = 520
"""Seconds after which nothing further is begun; what is expected to end later is passed over."""

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
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was measured.")
        return
    quiet_libraries()
    try:
        record = check(torch.device("cuda"), compiled)
    except RtdmdError as error:
        _say(f"error: {error.message}\nhint: {error.hint}")
        raise typer.Exit(error.exit_code) from error
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-{_slug(record['environment']['device'])}.json"
    write_json(path, record)
    _say(f"{record['seconds']:.0f} s; written to {path}")
    if record["beyond"]:
        raise typer.Exit(1)


def check(device: torch.device, compiled: bool) -> dict[str, Any]:
    """Everything, printed as it comes; the record."""
    from scripts.gpu.measure import STATED, agreement, measure, planned
    from scripts.gpu.models import CASES, COMPILED
    from scripts.gpu.small import FAMILIES, both_stages

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small = [both_stages(name, device, Path(folder)) for name in FAMILIES]
    for row in small:
        print(
            f"{row['family']}: stage 1 {row['distill_seconds']:.1f} s, stage 2 {row['tune_seconds']:.1f} s, in bf16"
        )
    found = agreement(device)
    print("\n".join(agreement_lines(found, STATED)))
    rows = []
    for case in (*CASES, *([COMPILED] if compiled else [])):
        _say(f"{time.monotonic() - began:.0f} s: {case.name}")
        late = time.monotonic() - began + case.seconds > LIMIT
        row = {"model": case.name, "note": "no time left"} if late else attempt(measure, case, device)
        rows.append(row | planned(case.settings(device)))
    print(table(rows))
    return {
        "environment": describe_environment(["scripts/gpu_check"], device),
        "small": small,
        "agreement": found,
        "stated": STATED,
        "beyond": beyond(found, STATED),
        "updates": rows,
        "seconds": time.monotonic() - began,
    }


def attempt(measure: Callable[..., dict[str, Any]], case: Any, device: torch.device) -> dict[str, Any]:
    """A row, or a note that the memory is too small; the memory is free again afterwards."""
    try:
        return measure(case, device)
    except torch.OutOfMemoryError:
        return {"model": case.name, "note": "out of memory"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
