"""What TAB offers, asked as bash asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd_cli.engine.storage.run_folder import PRESET


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with two runs, a folder that is none, and a run in another place."""
    for name in ("runs/first", "runs/first-tuned", "elsewhere/far"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / PRESET).touch()
    (tmp_path / "runs/fiasco").mkdir()
    return tmp_path


def complete(line: str, folder: Path) -> list[str]:
    """The values that `line`, ending in what has been typed of its last word, can be completed to."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    environ = os.environ | words | {"_RTDMD_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "rtdmd_cli"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rtdmd distill --preset sd3-4step-", ["sd3-4step-16gb", "sd3-4step-24gb", "sd3-4step-overnight"]),
        ("rtdmd distill --set distill.lora.", [f"distill.lora.{key}=" for key in ("alpha", "dtype", "rank", "targets")]),
        ("rtdmd sample --from fi", ["first", "first-tuned"]),
        ("rtdmd sample --from shapes-4step-l", ["shapes-4step-lora"]),
        ("rtdmd tune-reward --reward picks", ["pickscore"]),
        ("rtdmd tune-reward --out elsewhere --from f", ["far"]),
        ("rtdmd eval geneval", ["geneval", "geneval2"]),
        ("rtdmd eval shapes --rewards hpsv2,picks", ["hpsv2,pickscore"]),
        ("rtdmd export --out elsewhere fi", ["first", "first-tuned"]),
        ("rtdmd runs show first-", ["first-tuned"]),
        ("rtdmd fetch imager", ["imagereward"]),
        ("rtdmd data fetch geneval-t", ["geneval-train"]),
        ("rtdmd presets show nothing", []),
    ],
)  # fmt: skip
def test_values_are_completed(line: str, offered: list[str], folder: Path) -> None:
    assert sorted(complete(line, folder)) == offered
