"""`rtdmd eval` as a person types it, on a tiny model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rtdmd_cli.cli.eval import eval_command
from rtdmd_cli.errors import UsageError
from rtdmd_cli.shapes.grammar import TASKS
from tests.tiny_runs import make_run

app = typer.Typer()
app.command()(eval_command)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def test_json_on_stdout_the_table_on_stderr_and_files_in_the_folder() -> None:
    make_run(Path("runs"), "mine")
    result = run("shapes", "--limit", "7", "--steps", "2", "--json", "--out", "found")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert list(found["tasks"]) == list(TASKS) and found["limit"] == 7 and found["images"] == 7
    assert (found["benchmark"], found["steps"], found["evaluations"]) == ("shapes", 2, 2)
    for key in ("overall", "interval", "guidance", "seconds", "seconds_per_picture", "model", "model_hash"):
        assert key in found
    assert "color_attr" in result.stderr and "limited to 7 prompts" in result.stderr
    saved = json.loads(Path("found/results.json").read_text())
    assert {key: saved[key] for key in found} == found | {"prompts": saved["prompts"]}
    assert len(saved["pictures"]) == 7
    assert {"prompt", "tag", "correct", "reasons"} < set(saved["pictures"][0])
    assert Path("found/samples.png").is_file()
    again = run("shapes", "--limit", "6", "--steps", "1", "--json", "--quiet", "--out", "found")
    assert again.stderr == "" and json.loads(Path("found-2/results.json").read_text())["limit"] == 6
    assert json.loads(Path("found/results.json").read_text()) == saved


def test_the_table_is_data_where_no_json_is_asked_for() -> None:
    make_run(Path("runs"), "mine")
    result = run("shapes", "--limit", "6", "--steps", "1", "--quiet", "--images-per-prompt", "2")
    assert result.exit_code == 0, result.exception
    for words in ("mine/step-000010", "counting", "overall", "95% interval", "12 pictures"):
        assert words in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["shape", "geneval", "SHAPES", ""])
def test_another_benchmark_is_refused_with_the_nearest(name: str) -> None:
    error = run(name).exception
    assert isinstance(error, UsageError) and "`shapes`" in error.message


def test_bad_options() -> None:
    for option in (("--limit", "0"), ("--images-per-prompt", "0"), ("--steps", "0"), ("--seed", "x")):
        assert run("shapes", *option).exit_code == 2
    Path("file").write_text("")
    assert isinstance(run("shapes", "--out", "file").exception, UsageError)


def test_the_built_in_model() -> None:
    if not (Path(str(files("rtdmd_cli"))) / "shapes/weights/sd3").is_dir():
        pytest.skip("the package has no trained models yet")
    result = run("shapes", "--from", "shapes-4step", "--limit", "12", "--steps", "10", "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["overall"] > 0.3
