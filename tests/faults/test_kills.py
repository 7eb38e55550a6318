"""Real SIGKILLs at random instants and calls of the disk: a sample of what scripts/torture_kills does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import LIMIT, environment
from tests.faults.cases import EVERY, SEED

KILLS = 200


@pytest.mark.skipif(not EVERY, reason="takes many minutes: RTDMD_FAULTS=all")
def test_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.torture", "--kills", str(KILLS), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        env=environment(tmp_path) | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20 * LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["lost"] == 0 and told["kills"] + told["ended_before"] == KILLS
    assert told["kills"] >= KILLS * 3 // 4 and len(told["commands"]) == 6
