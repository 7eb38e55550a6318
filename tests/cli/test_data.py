"""`rtdmd data`: list, fetch from a file, path; and a preset that names a set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from rtdmd_cli.cli import failures
from rtdmd_cli.cli.app import app
from tests.public_data import benchmark_file


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_list_fetch_and_path(tmp_path: Path) -> None:
    absent = failures.explain(call("data", "path", "geneval").exception)
    assert absent.exit_code == 3 and "rtdmd data fetch geneval" in absent.hint
    offline = failures.explain(call("data", "fetch", "geneval").exception)
    assert offline.exit_code == 3 and "5c48e0813e81" in offline.hint
    file = str(benchmark_file("geneval.jsonl"))
    first = call("data", "fetch", "geneval", "--file", file, "--json")
    assert first.exit_code == 0 and "licence: MIT" in first.stderr
    result = json.loads(first.stdout)
    assert (result["prompts"], result["fetched"], result["pinned"]) == (553, True, True)
    again = call("data", "fetch", "geneval", "--json")
    assert json.loads(again.stdout) == result | {"fetched": False} and "already here" in again.stderr
    assert call("data", "path", "geneval").stdout == f"{result['path']}\n"
    rows = {each["name"]: each for each in json.loads(call("data", "list", "--json").stdout)}
    assert (rows["geneval"]["here"], rows["ocr"]["here"]) == ("yes", "no")
    Path(result["path"]).write_text("x")
    rows = {each["name"]: each for each in json.loads(call("data", "list", "--json").stdout)}
    assert rows["geneval"]["here"] == "damaged"
    assert "geneval2" in call("data", "list").stdout


def test_a_set_without_a_pinned_hash_says_so(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("a dog\na cat\n")
    result = call("data", "fetch", "pickscore-train", "--file", str(file), "--json")
    assert result.exit_code == 0 and "kept as your own" in result.stderr
    found = json.loads(result.stdout)
    assert not found["pinned"] and found["own"]
    rows = {each["name"]: each for each in json.loads(call("data", "list", "--json").stdout)}
    assert rows["pickscore-train"]["here"] == "yes, your own file"
    plan = call("distill", "--preset", "sd3-4step", "--dry-run", "--json", "--out", str(tmp_path))
    assert json.loads(plan.stdout)["prompts"] == 2


def test_a_preset_names_what_has_to_be_fetched(tmp_path: Path) -> None:
    arguments = ("distill", "--preset", "sd3-4step", "--out", str(tmp_path / "runs"))
    failure = failures.explain(call(*arguments).exception)
    assert failure.exit_code == 3 and "rtdmd data fetch pickscore-train" in failure.hint
    dry = call(*arguments, "--dry-run", "--json")
    planned = json.loads(dry.stdout)
    assert planned["prompts"] is None and "pickscore-train" in planned["findings"][0]
    ended = failures.explain(dry.exception)
    assert ended.exit_code == 3 and "rtdmd data fetch pickscore-train" in ended.hint
    assert not (tmp_path / "runs").exists()
