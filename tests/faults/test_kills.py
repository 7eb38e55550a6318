"""Real SIGKILLs at random instants and calls of the disk, as scripts/torture_kills does them."""

import json
import os
import random
from pathlib import Path

from tests.commands import LIMIT, Done, fork, wait
from tests.faults import planted
from tests.faults.cases import EVERY

KILLS, WRITES = (200, 50) if EVERY else (9, 3)


def torture(folder: Path, program: str, kills: int, writes: int, seed: str) -> Done:
    given = ("--kills", str(kills), "--writes", str(writes), "--seed", seed, "--work", str(folder / "work"))
    return wait(fork(folder, *given, program=program), 20 * LIMIT)


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Others each time; what fails says its seed."""
    seed = os.environ.get("RTDMD_FAULTS_SEED") or str(random.randrange(10**6))
    done = torture(tmp_path, "scripts.torture.__main__", KILLS, WRITES, seed)
    assert done.code == 0, done.out + done.err[-3000:]
    told = json.loads(done.out)
    assert told["lost"] == 0 and told["kills"] >= KILLS + WRITES - 1 and len(told["commands"]) == 6, told


def test_a_write_that_is_not_atomic_is_found(tmp_path: Path) -> None:
    """Planted: pictures, status.json and the like are written where they lie."""
    done = torture(tmp_path, planted.__name__, 0, 1, "0")
    assert done.code == 1, done.out + done.err[-3000:]
    (loss,) = json.loads(done.out)["losses"]
    assert loss["killed"] and loss["write"] and "pictures" in loss["lost"], loss
