"""The allocator's setting, and the user's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rtdmd_cli.cli.app import main
from rtdmd_cli.cli.quiet import attention_left_out
from rtdmd_cli.engine.compute import allocator
from rtdmd_cli.engine.compute.allocator import OLDER, SETTING


@pytest.mark.parametrize(
    ("platform", "before", "after", "kernel"),
    [
        ("linux", {}, {SETTING: "expandable_segments:True"}, "6.8.0-generic"),
        ("linux", {SETTING: "max_split_size_mb:64"}, {SETTING: "max_split_size_mb:64"}, "6.8.0-generic"),
        ("linux", {OLDER: "backend:cudaMallocAsync"}, {OLDER: "backend:cudaMallocAsync"}, "6.8.0-generic"),
        ("darwin", {}, {}, ""),
        ("linux", {}, {}, "5.15.167.4-microsoft-standard-WSL2"),
    ],
)
def test_the_program_sets_it_where_the_user_has_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    before: dict[str, str],
    after: dict[str, str],
    kernel: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "osrelease").write_text(kernel + "\n")
    monkeypatch.setattr(allocator, "KERNEL", tmp_path / "osrelease")
    monkeypatch.setattr(sys, "platform", platform)
    for name in (SETTING, OLDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("rtdmd ")
    assert {name: os.environ[name] for name in (SETTING, OLDER) if name in os.environ} == after


def test_the_program_computes_attention_by_torchs_own_function(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the shell says: diffusers reads the variable when it is imported, and Sage has no backward pass."""
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    assert main(["--version"]) == 0 and os.environ["DIFFUSERS_ATTN_BACKEND"] == "native"
    assert attention_left_out().startswith("DIFFUSERS_ATTN_BACKEND=sage is left out")
    assert main(["--version"]) == 0 and not attention_left_out()
