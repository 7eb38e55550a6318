"""`rtdmd doctor`: the lines, the JSON, the exit code."""

import json

import pytest

from rtdmd_cli.cli import app
from rtdmd_cli.engine.doctor import run
from rtdmd_cli.engine.doctor.check import Check


def test_every_check_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = app.main(["doctor"])
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.split()[1] for line in lines] == list(run.CHECKS)
    assert {line.split()[0] for line in lines} <= {"PASS", "WARN", "FAIL"}
    assert code == (3 if any(line.startswith("FAIL") for line in lines) else 0) and err


def test_a_failure_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Check("disk", "FAIL", "full", "rm something"), Check("hub", "PASS", "fine")
    monkeypatch.setattr(run, "CHECKS", {"disk": lambda: bad, "hub": lambda: good})
    assert app.main(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["FAIL", "disk", "full"] and "-> rm something" in out
    assert err == "fails: disk\n"
    assert app.main(["doctor", "--json", "--quiet"]) == 3
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["failed"] == ["disk"] and shown["warned"] == [] and err == ""
    assert shown["checks"][0] == {
        "name": "disk",
        "state": "FAIL",
        "found": "full",
        "fix": "rm something",
        "facts": {},
    }
