"""`rtdmd sample` as a person types it, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from rtdmd_cli.cli.sample import _texts, sample, say_foreign
from rtdmd_cli.errors import DataError, EnvironmentFailure, RtdmdError, UsageError
from tests.tiny_runs import make_run, write_preset

app = typer.Typer()
app.command()(sample)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def refused(*arguments: str, stdin: str | bytes | None = None) -> RtdmdError:
    error = run(*arguments, stdin=stdin).exception
    assert isinstance(error, RtdmdError), error
    return error


def test_paths_on_stdout_and_the_choice_on_stderr() -> None:
    make_run(Path("runs"), "mine")
    result = run("a red circle", "-n", "2")
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines() == [f"samples/0000-000{i}-seed0.png" for i in (0, 1)]
    assert "using mine/step-000010" in result.stderr and "pictures 2/2" in result.stderr
    with Image.open("samples/0000-0001-seed0.png") as image:
        text = image.info
    wanted = {
        "prompt": "a red circle",
        "negative": "none",
        "steps": "4",
        "guidance": "1",
        "seed": "0",
        "eta": "0.9",
    }
    assert {key: text[key] for key in wanted} == wanted and text["version"]


def test_a_folder_whose_name_is_no_text() -> None:
    """A name of the disk that is not UTF-8: it is made as given, and written escaped."""
    make_run(Path("runs"), "mine")
    result = run("a red circle", "--out", os.fsdecode(b"\xff\xfe"), "--json")
    assert result.exit_code == 0, result.exception
    assert b"\xff\xfe" in os.listdir(b".") and "\\udcff\\udcfe/0000-0000-seed0.png" in result.stdout


def test_prompts_of_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--prompts - <&-`: Python has no standard input then."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="Standard input is closed"):
        _texts(None, "-")


def test_json_is_all_of_stdout_and_quiet_is_quiet() -> None:
    write_preset(Path("mine.yaml"))
    arguments = (
        "--from",
        "mine.yaml",
        "--prompts",
        "-",
        "-n",
        "2",
        "--steps",
        "3",
        "--guidance",
        "2",
        "--seed",
        "5",
    )
    result = run(
        *arguments, "--width", "48", "--grid", "--json", "--quiet", "--out", "x", stdin="a ring\n\na star\n"
    )
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert (found["steps"], found["evaluations"], found["folder"], found["kept"]) == (3, 6, "x", 0)
    pictures = found["pictures"]
    assert [(p["prompt"], p["image_index"]) for p in pictures] == [
        ("a ring", 0),
        ("a ring", 1),
        ("a star", 0),
        ("a star", 1),
    ]
    assert pictures[3]["path"] == "x/0001-0001-seed5.png" and pictures[0]["guidance"] == 2
    with Image.open(pictures[3]["path"]) as image:
        assert image.size == (48, 32)
    assert found["grid"] == "x/grid.png" and Path("x/grid.png").is_file()
    assert len(Path("x/index.jsonl").read_text().splitlines()) == 4


def test_nothing_is_lost_when_the_same_folder_is_used_again() -> None:
    write_preset(Path("mine.yaml"))
    common = ("--from", "mine.yaml", "--steps", "1")
    run("a ring", *common)
    first = Path("samples/0000-0000-seed0.png").read_bytes()
    other = run("a star", *common)
    assert other.stdout == "samples-2/0000-0000-seed0.png\n" and "writing to samples-2/" in other.stderr
    again = run("a ring", *common)
    assert again.stdout == "samples/0000-0000-seed0.png\n" and "1 of the pictures were there" in again.stderr
    assert Path("samples/0000-0000-seed0.png").read_bytes() == first
    assert Path("samples-2/0000-0000-seed0.png").read_bytes() != first


def test_mistakes_are_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr("rtdmd_cli.engine.sampling.model.load_backbone", never)
    make_run(Path("runs"), "mine")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("fine\ngrün\n".encode("latin-1"))
    usage = [
        ((), "no prompt"),
        (("a ring", "--prompts", "empty.txt"), "not both"),
        ((" ",), "is empty"),
        (("a ring", "--from", "nothing"), "no run or checkpoint folder"),
        (("a ring", "--guidance", "3"), "without guidance"),
        (("a ring", "--device", "tpu"), "no device `tpu`"),
        (("a ring", "--dtype", "fp8"), "no dtype `fp8`"),
    ]
    for arguments, expected in usage:
        error = refused(*arguments)
        assert isinstance(error, UsageError) and expected in error.message, (arguments, error)
    data = [
        (("--prompts", "empty.txt"), "holds no prompts"),
        (("--prompts", "latin.txt"), "latin.txt, line 2"),
        (("--prompts", "none.txt"), "no prompt file"),
    ]
    for arguments, expected in data:
        error = refused(*arguments)
        assert isinstance(error, DataError) and expected in error.message, (arguments, error)
    for option in (
        ("-n", "0"),
        ("--steps", "0"),
        ("--steps", "1001"),
        ("--guidance", "0.5"),
        ("--seed", "-1"),
    ):
        assert run("a ring", *option).exit_code == 2, option
    assert not Path("samples").exists()


def test_the_built_in_model_says_that_it_knows_shapes_only(capsys: pytest.CaptureFixture[str]) -> None:
    say_foreign(["a photo of two red circles", "a photo of a blue ring left of a white cross"], quiet=False)
    assert capsys.readouterr().err == ""
    say_foreign(["a photo of two red circles", "a cat", "a dog"], quiet=False)
    told = capsys.readouterr().err
    assert (
        "knows plain shapes only" in told and '"a cat" is none of its captions' in told and "dog" not in told
    )
    say_foreign(["a cat"], quiet=True)
    assert capsys.readouterr().err == ""


def test_a_size_the_model_cannot_make() -> None:
    write_preset(Path("mine.yaml"))
    for option in ("--width", "--height"):
        assert "can't make pictures" in refused("a ring", "--from", "mine.yaml", option, "36").message
    assert not Path("samples").exists()


def test_a_folder_that_cannot_be_made() -> None:
    write_preset(Path("mine.yaml"))
    Path("file").write_text("")
    assert isinstance(refused("a ring", "--from", "mine.yaml", "--out", "file"), UsageError)
    assert isinstance(refused("a ring", "--from", "mine.yaml", "--out", "file/x"), EnvironmentFailure)
    assert Path("file").read_text() == ""


def test_importing_the_commands_imports_no_torch() -> None:
    code = (
        "import sys, rtdmd_cli.cli.sample, rtdmd_cli.cli.eval; assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_built_in_model_where_there_is_no_run() -> None:
    if not (Path(str(files("rtdmd_cli"))) / "shapes/weights/sd3").is_dir():
        pytest.skip("the package has no trained models yet")
    result = run("a photo of a red circle", "--steps", "4")
    assert result.exit_code == 0, result.exception
    assert "built-in model" in result.stderr
