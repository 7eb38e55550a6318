"""`rtdmd rewards`: tables and JSON on stdout, everything else on stderr, exit codes 0, 2, 3 and 4."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd_cli.cli.app import main
from rtdmd_cli.engine.rewards.registry import REWARDS

ROOT = Path(__file__).resolve().parents[2]
OWN = """
class Redness:
    differentiable = True

    def score(self, images, prompts, metadata):
        return images[:, 0].mean((1, 2))

class Zero(Redness):
    def score(self, images, prompts, metadata):
        return 0 * images[:, 0].mean((1, 2))

class Needy(Redness):
    def __init__(self, a, b): ...

class Leaver(Redness):
    def score(self, images, prompts, metadata):
        import os, sys
        print("I am on stderr")
        sys.exit(0)

class Sleeper(Redness):
    def score(self, images, prompts, metadata):
        import time
        print("I am on stderr")
        time.sleep(30)
"""


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache and current directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["rewards", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list")
    assert code == 0
    for name in REWARDS:
        assert name in out
    (line,) = (line for line in out.splitlines() if "│ geneval " in line)
    assert "0 to 1" in line and "│ no " in line and "facebook/mask2former" in line
    assert "276.7 MB, CC BY-NC 4.0" in out and "openai/clip-vit-large-patch14, 1.7 GB, MIT" in out
    (line,) = (line for line in out.splitlines() if "│ shapes-geneval " in line)
    assert line.count("built in") == 2
    (line,) = (line for line in out.splitlines() if "│ ocr " in line)
    assert "installed" in line and "rtdmd[ocr]" in line
    assert "module:Class" in err
    assert run(capsys, "list", "--quiet") == (0, out, "")


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and err == "" and list(rows) == list(REWARDS)
    geneval = rows["geneval"]
    assert geneval["range"] == [0, 1] and geneval["metadata"] == "include"
    assert (geneval["differentiable"], geneval["available"]) == (False, False)
    assert [need["here"] for need in geneval["needs"]] == [False, False]
    assert geneval["needs"][0]["licence"] == "CC BY-NC 4.0"
    assert geneval["get"][0].startswith("hf download facebook/mask2former-swin-small-coco-instance ")
    assert (rows["ocr"]["available"], rows["ocr"]["extra"], rows["ocr"]["missing"]) == (True, "ocr", [])


def test_list_is_light() -> None:
    code = (
        "import sys; from rtdmd_cli.cli.app import main; main(['rewards', 'list', '-q']); "
        "print({'torch', 'transformers', 'diffusers'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert answer.stdout.endswith("set()\n") and answer.stderr == ""


def test_check_of_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "shapes-geneval", "shapes-geneval-soft", "shapes-geneval")
    assert code == 0 and out.count("passed") == 2 and out.count("7 of 7") == 2
    assert err == "checking shapes-geneval on cpu\nchecking shapes-geneval-soft on cpu\n" or "on cuda" in err


def test_check_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "shapes-geneval", "--json", "-q", "--device", "cpu")
    (found,) = json.loads(out)
    assert code == 0 and err == ""
    assert found.pop("seconds") >= 0
    assert found == {
        "name": "shapes-geneval", "status": "passed", "reason": "", "hint": "", "pairs": 7, "ordered": 7,
        "low": 0.0, "high": 1.0, "gradient": None,
    }  # fmt: skip
    code, out, err = run(capsys, "check", "shapes-geneval", "--json")
    assert json.loads(out)[0]["status"] == "passed" and "passed" in err  # the table


def test_what_is_not_here_matters_only_where_it_was_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(REWARDS) - {"geneval", "shapes-geneval"}:
        monkeypatch.delitem(REWARDS, name)
    code, out, err = run(capsys, "check", "-q")
    assert code == 0 and err == ""
    assert "not available" in out and "passed" in out and "is not in the local cache" in " ".join(out.split())
    code, _, err = run(capsys, "check", "shapes-geneval", "geneval", "-q")
    assert code == 3
    assert err.startswith(
        "error: `geneval` is not available: facebook/mask2former-swin-small-coco-instance (276"
    )
    assert "hint: hf download facebook/mask2former-swin-small-coco-instance --include config.json" in err


def test_a_reward_of_the_users_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cli_own_reward.py").write_text(OWN)
    code, out, _ = run(capsys, "check", "cli_own_reward:Redness", "--json", "-q")
    (found,) = json.loads(out)
    assert (code, found["status"], found["ordered"]) == (0, "passed", None)
    assert found["gradient"] > 0


def test_one_that_leaves_the_program_or_hangs_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cli_own_leaver.py").write_text(OWN)
    for name, reason in {"Leaver": "it raised SystemExit: 0", "Sleeper": "it took more than"}.items():
        code, out, err = run(
            capsys, "check", f"cli_own_leaver:{name}", "--json", "-q", "--reward-seconds", "0.02"
        )
        (found,) = json.loads(out)  # what it prints is not on stdout
        assert (code, found["status"]) == (4, "failed") and found["reason"].startswith(reason)
        assert "I am on stderr" in err and f"error: 1 of 1 rewards failed: `cli_own_leaver:{name}`" in err


def test_one_that_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cli_own_zero.py").write_text(OWN)
    code, out, err = run(capsys, "check", "cli_own_zero:Zero", "shapes-geneval", "geneval", "-q")
    assert code == 4 and "failed" in out and "passed" in out
    assert "error: 1 of 3 rewards failed: `cli_own_zero:Zero`: every picture scores 0." in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genevl"], "hint: Did you mean `geneval`?"),
        (["cli_absent:Redness"], "No module named 'cli_absent'"),
        (["cli_own_needy:Needy"], "can't be built: missing a required argument: 'a'"),
        (["--path", "x"], "`--path` is for a single reward."),
        (["geneval", "ocr", "--path", "x"], "hint: Name it: rtdmd rewards check NAME --path FOLDER"),
        (["ocr", "--device", "tpu"], "There is no device `tpu`"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "cli_own_needy.py").write_text(OWN)
    code, out, err = run(capsys, "check", *arguments)
    assert code == 2 and out == "" and message in err


def test_a_path_takes_the_place_of_the_sources(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "models/clip").mkdir(parents=True)
    code, out, err = run(capsys, "check", "geneval", "--path", str(tmp_path / "models"), "-q")
    assert code == 4 and "failed" in out and "has no folder `detector`" in err
    code, _, err = run(capsys, "check", "ocr", "--path", "models", "-q")
    assert code == 4 and "come with its package" in err
