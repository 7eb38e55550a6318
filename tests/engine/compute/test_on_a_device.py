"""What holds on a device that is not the CPU, and that the pretend one is strict enough to show it."""

from __future__ import annotations

from pathlib import Path

from tests.commands import fork, wait
from tests.engine.compute.on_a_device import CHECKS


def test_every_check_holds(tmp_path: Path) -> None:
    done = wait(fork(tmp_path, program="tests.engine.compute.on_a_device"))
    assert done.code == 0, done.err
    assert done.out.split() == [check.__name__ for check in CHECKS]
