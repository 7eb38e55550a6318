"""A list of runs in which some files hold anything at all: each such run is one marked row."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rtdmd_cli.cli.app import app
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.report.run_compare import compare_runs
from rtdmd_cli.engine.storage.run_folder import RunFolder, create_run, find_newest_finished
from rtdmd_cli.engine.storage.runs import find_run, list_runs, recorded, saved

DEEP, LONG, HALF = "[" * 100_000, "9" * 400, r'"\ud83d"'
STATUS = '{{"state": "finished", "time": "2026-01-01T00:00:00.000000Z", "iteration": {}}}'
BAD = {
    "status.json": [
        DEEP,
        STATUS.format(LONG),
        STATUS.format("1e999"),
        STATUS.format(HALF),
        '{"state": 3, "time": 4}',
    ],
    "environment.json": [DEEP, "[]", f'{{"stage": {HALF}}}', "\0"],
    "preset.resolved.yaml": [DEEP, "model: 3", "&a [*a]", "\0"],
}
"""What makes a run a damaged one."""
ODD = {
    "metrics.jsonl": [
        f"{DEEP}\n",
        f'{{"iteration": {LONG}}}\n',
        '{"iteration": 5, "x": 1e999}\n',
        '{"iteration": "x"}\n',
    ],
    "samples/step-x.png": ["no picture"],
    "samples/step-99999999999999.png": ["no picture"],
    "samples/step-000020.png": ["no picture"],
}
"""What is left out, and leaves the run as it is."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    resolved, cpu = load_preset("shapes-4step", environ={}), torch.device("cpu")
    for name in ("good", "odd"):
        run = create_run(tmp_path, name, resolved, ["rtdmd"], cpu)
        run.metrics.append({"iteration": 3, "fake_loss": 0.5})
        run.set_status("finished", iteration=3)
    return tmp_path


def every_command(out: Path) -> None:
    """What looks at runs does so without an error that isn't foreseen."""
    for run in (RunFolder(out / "good"), find_run("odd", out)):
        recorded(run)
        saved(run)
    compare_runs(RunFolder(out / "good"), RunFolder(out / "odd"), out / "page.html", force=True)
    for arguments in (["list"], ["list", "--json"], ["show", "odd"], ["show", "odd", "--json"]):
        result = CliRunner().invoke(app, ["runs", *arguments, "--out", str(out)])
        assert result.exit_code == 0 and "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_a_bad_file_is_one_marked_row(out: Path, name: str) -> None:
    for content in (BAD | ODD)[name]:
        (out / "odd" / name).write_text(content)
        found = {each.name: each for each in list_runs(out)}
        assert found["good"].state == "finished" and found["good"].figures == {"fake_loss": 0.5}
        assert found["odd"].state == ("damaged" if name in BAD else "finished")
        assert bool(found["odd"].problem) == (name in BAD)
        every_command(out)


def test_what_cannot_be_read_is_one_marked_row(out: Path) -> None:
    """A folder and a pipe in the place of a file, and metrics that are too large."""
    odd = out / "odd"
    (odd / "metrics.jsonl").unlink()
    os.mkfifo(odd / "metrics.jsonl")
    (state,) = [each for each in list_runs(out) if each.name == "odd"]
    assert state.state == "damaged" and "metrics.jsonl is damaged: it is no regular file" in state.problem
    (odd / "status.json").unlink()
    (odd / "status.json").mkdir()
    every_command(out)
    assert {each.state for each in list_runs(out)} == {"finished", "damaged"}


def test_a_damaged_finished_run_is_no_obstacle_to_the_next(out: Path) -> None:
    RunFolder(out / "odd").set_status("finished", iteration=3)
    newest = find_newest_finished(out, "distill")
    assert newest is not None and newest.name == "odd"
    (out / "odd" / "environment.json").write_text("{")
    newest = find_newest_finished(out, "distill")
    assert newest is not None and newest.name == "good"


def test_what_files_hold_does_not_steer_the_terminal(out: Path) -> None:
    odd = out / "odd"
    environment = json.loads((odd / "environment.json").read_text())
    command = {"command": ["rtdmd", "\x1b]0;title\x07", "\x1b[2J"], "device": "\x1b[31mred", "rtdmd": "1\r2"}
    (odd / "environment.json").write_text(json.dumps(environment | command))
    RunFolder(odd).metrics.append({"iteration": 4, "\x1b[5mloss": 1.0})
    every_command(out)
    shown = CliRunner().invoke(app, ["runs", "show", "odd", "--out", str(out)]).stdout
    assert r"\x1b[31mred" in shown and r"1\r2" in shown and r"\x1b[5mloss" in shown


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
STATUSES = st.fixed_dictionaries(
    {"state": st.sampled_from(["running", "finished"]) | JSON, "time": st.text(max_size=4) | JSON},
    optional={"iteration": JSON, "seconds": JSON, "best": JSON},
)
ENVIRONMENTS = st.fixed_dictionaries(
    {}, optional={"stage": JSON, "command": JSON, "packages": JSON, "device": JSON}
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["iteration", "seconds", "fake_loss", "x"]), JSON), max_size=3
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATUSES, ENVIRONMENTS, ROWS, st.binary(max_size=40))
def test_whatever_the_files_of_a_run_hold(
    out: Path, status: object, environment: object, rows: list[object], rest: bytes
) -> None:
    odd = out / "odd"
    (odd / "status.json").write_text(json.dumps(status))
    (odd / "environment.json").write_text(json.dumps(environment))
    lines = [json.dumps(row).encode() for row in rows]
    (odd / "metrics.jsonl").write_bytes(b"\n".join([*lines, rest]))
    assert len(list_runs(out)) == 2
    every_command(out)
