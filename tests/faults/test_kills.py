"""Real SIGKILLs at random instants and calls of the disk, as scripts/torture_kills does them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.commands import LIMIT, environment
from tests.faults.cases import EVERY

KILLS = 200 if EVERY else 20


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Others each time; what fails says its seed."""
    seed = os.environ.get("RTDMD_FAULTS_SEED") or str(random.randrange(10**6))
    command = [sys.executable, "-m", "scripts.torture", "--kills", str(KILLS), "--seed", seed]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        env=environment(tmp_path) | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20 * LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["lost"] == 0 and told["kills"] >= KILLS - 1 and len(told["commands"]) == 6, told
