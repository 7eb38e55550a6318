"""Where the prints of libraries and of their child processes go."""

import subprocess
import sys

import pytest

from rtdmd_cli.engine.rewards.printing import prints_nowhere, prints_on_stderr


def chatter() -> None:
    print("printed")
    subprocess.run([sys.executable, "-S", "-c", "print('by a child')"], check=True)
    print("an error", file=sys.stderr)


@pytest.mark.parametrize("quiet", [False, True])
def test_stdout_is_kept_for_results(quiet: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with (prints_nowhere if quiet else prints_on_stderr)():
        chatter()
    print("the result")
    told = capfd.readouterr()
    assert told.out == "the result\n"
    lines = sorted(told.err.splitlines())
    assert lines == (["an error"] if quiet else ["an error", "by a child", "printed"])
