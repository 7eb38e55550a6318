"""`rtdmd presets`: data on stdout, everything else on stderr, no file overwritten."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rtdmd_cli.cli.presets import app
from rtdmd_cli.config import keys, list_presets, load_preset, preset_text
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.errors import UsageError


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None, result.exception
    return result


def failed(*arguments: str) -> UsageError:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UsageError)
    assert result.stdout == ""
    return result.exception


def test_list() -> None:
    result = run("list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == [info.name for info in list_presets()]
    assert "shapes-4step" in result.stdout and result.stderr == ""
    figures = {info.name: info.planned for info in list_presets()}["sd3-4step-24gb"]
    assert figures and f"; {figures.peak:.1f} GiB, " in result.stdout


def test_list_json() -> None:
    found = json.loads(run("list", "--json").stdout)
    assert {entry["name"] for entry in found} == {info.name for info in list_presets()}
    assert all(Path(entry["path"]).is_file() for entry in found)
    assert {entry["family"] for entry in found} == set(FAMILIES)
    planned = {entry["name"]: entry["planned"] for entry in found}
    assert planned["shapes-4step"] is None and len(planned["sd3-4step-24gb"]["card"]) == 2


def test_show_prints_the_file() -> None:
    result = run("show", "sd3-4step")
    assert result.stdout == preset_text("sd3-4step")
    assert "Stability AI Community License" in result.stdout
    assert json.loads(run("show", "sd3-4step", "--json").stdout)["text"] == preset_text("sd3-4step")


def test_show_a_file_without_a_last_line_end(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("distill: nonsense")  # shown as it is, valid or not
    assert run("show", str(file)).stdout == "distill: nonsense\n"


def test_show_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_SET_DISTILL__BATCH", "4")
    result = run("show", "shapes-4step", "--resolved", "--set", "distill.seed=1", "--set", "distill.keep=9")
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert "    checkpoints kept, newest first" in result.stdout.splitlines()
    assert rows["distill.seed"] == ["1", "--set"] and rows["distill.keep"] == ["9", "--set"]
    assert rows["distill.batch"] == ["4", "environment"]
    assert rows["model.resolution"] == ["32", "preset shapes-4step"]
    assert rows["distill.eps"] == ["1e-08", "default"]
    assert set(rows) == set(load_preset("shapes-4step").sources)


def test_keys_are_listed_with_default_range_and_sentence() -> None:
    text = run("keys").stdout
    names = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert names == [".".join(path) for path in keys()] and all(
        len(line) <= 200 for line in text.splitlines()
    )
    assert (
        "distill.batch  (default: 72)\n    images per optimiser step. Takes a whole number from 1 to 65536."
        in text
    )
    assert "model.path  (default: none, it must be given)" in text
    found = json.loads(run("keys", "warm-up", "--json").stdout)
    assert [each["key"] for each in found] == [
        "distill.lr_warmup",
        "tune_reward.lr_warmup",
        "hardware.compile",
    ]
    assert found[0]["default"] == 0 and found[0]["allowed"].startswith("a whole number")
    assert "rtdmd presets keys" in failed("keys", "nonsense").hint


def test_show_resolved_json() -> None:
    shown = json.loads(run("show", "shapes-4step", "--resolved", "--json", "--set", "distill.seed=1").stdout)
    expected = load_preset("shapes-4step", ["distill.seed=1"])
    assert (shown["name"], shown["sha256"]) == ("shapes-4step", expected.sha256)
    assert shown["values"]["distill.seed"]["value"] == 1
    assert shown["values"]["distill.batch"] == {
        "value": expected.preset.distill.batch,
        "source": "preset shapes-4step",
        "allowed": "a whole number from 1 to 65536",
        "description": "images per optimiser step",
    }


def test_show_set_without_resolved() -> None:
    assert "--resolved" in failed("show", "shapes-4step", "--set", "distill.seed=1").hint


def test_show_bad_input() -> None:
    assert (
        "`distill.iterations`"
        in failed("show", "shapes-4step", "--resolved", "--set", "distill.iter=1").message
    )
    assert "`shapes-4step`" in failed("show", "shapes-4stp").message


def test_copy(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    result = run("copy", "shapes-4step", str(file))
    assert file.read_text(encoding="utf-8") == preset_text("shapes-4step")
    assert result.stdout == "" and str(file) in result.stderr
    assert load_preset(str(file)).sha256 == load_preset("shapes-4step").sha256
    other = str(tmp_path / "other.yaml")
    assert json.loads(run("copy", str(file), other, "--json").stdout) == {"path": other}


def test_what_is_said_of_a_copy_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "my presets"
    made = shlex.split(failed("copy", "shapes-4step", str(folder / "a.yaml")).hint.partition(": ")[2])
    assert made == ["mkdir", "-p", str(folder)]
    folder.mkdir()
    named = shlex.split(failed("copy", "shapes-4step", str(folder)).hint.partition(": ")[2])
    assert named[-1] == str(folder / "shapes-4step.yaml")
    told = run("copy", "shapes-4step", str(folder / "a.yaml")).stderr
    assert shlex.split(told.partition("with: ")[2])[-1] == str(folder / "a.yaml")


def test_copy_never_overwrites(tmp_path: Path) -> None:
    file, link = tmp_path / "mine.yaml", tmp_path / "link.yaml"
    file.write_text("kept")
    link.symlink_to(tmp_path / "nothing")
    assert "exists already" in failed("copy", "shapes-4step", str(file)).message
    assert "exists already" in failed("copy", "shapes-4step", str(link)).message
    assert file.read_text() == "kept" and not (tmp_path / "nothing").exists()


def test_copy_to_a_folder_or_a_missing_one(tmp_path: Path) -> None:
    error = failed("copy", "shapes-4step", str(tmp_path))
    assert "is a folder" in error.message and str(tmp_path / "shapes-4step.yaml") in error.hint
    assert "mkdir -p" in failed("copy", "shapes-4step", str(tmp_path / "no" / "x.yaml")).hint
    assert list(tmp_path.iterdir()) == []


def test_copy_of_an_unknown_preset_writes_nothing(tmp_path: Path) -> None:
    failed("copy", "shapes", str(tmp_path / "x.yaml"))
    assert list(tmp_path.iterdir()) == []


def test_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: shapes-4step\ndistill: {seed: 3}\n")
    monkeypatch.setenv("RTDMD_SET_DISTILL__BATCH", "nonsense")  # the file is checked by itself
    assert run("validate", str(file)).stdout.startswith(f"{file}: valid, ")
    answer = json.loads(run("validate", str(file), "--json").stdout)
    assert answer == {
        "file": str(file),
        "valid": True,
        "name": "mine",
        "sha256": load_preset(str(file), environ={}).sha256,
    }


def test_validate_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: shapes-4step\ndistill:\n  iteration: 3\n")
    error = failed("validate", str(file), "--json")
    assert "line 3" in error.message and "`distill.iterations`" in error.message


def test_the_module_is_light() -> None:
    code = "import sys, rtdmd_cli.cli.presets; print({'torch', 'pydantic', 'yaml'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
