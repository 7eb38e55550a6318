"""scripts/sampler_modes.py: a line for each sampler and seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.sampler_modes import main
from tests.tiny_runs import make_run


def test_a_line_for_each_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    make_run(Path("runs"), "mine")
    monkeypatch.setattr("sys.argv", ["sampler_modes.py", "mine", "--seeds", "3", "4", "--limit", "6"])
    main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["seed"], line["eta"]) for line in lines] == [
        (seed, eta) for seed in (3, 4) for eta in (0.0, 0.9, 1.0)
    ]
    assert all(0 <= line["overall"] <= 1 and len(line["tasks"]) == 6 for line in lines)
