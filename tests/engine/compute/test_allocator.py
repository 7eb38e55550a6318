"""The allocator's setting, and the user's own."""

from __future__ import annotations

import os
import sys

import pytest

from rtdmd_cli.cli.app import main
from rtdmd_cli.engine.compute.allocator import OLDER, SETTING


@pytest.mark.parametrize(
    ("platform", "before", "after"),
    [
        ("linux", {}, {SETTING: "expandable_segments:True"}),
        ("linux", {SETTING: "max_split_size_mb:64"}, {SETTING: "max_split_size_mb:64"}),
        ("linux", {OLDER: "backend:cudaMallocAsync"}, {OLDER: "backend:cudaMallocAsync"}),
        ("darwin", {}, {}),
    ],
)
def test_the_program_sets_it_where_the_user_has_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    before: dict[str, str],
    after: dict[str, str],
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in (SETTING, OLDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("rtdmd ")
    assert {name: os.environ[name] for name in (SETTING, OLDER) if name in os.environ} == after
