"""`rtdmd eval` as a person types it, on a tiny model: the built-in benchmark."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rtdmd_cli.cli import eval_steps
from rtdmd_cli.cli.eval import eval_command
from rtdmd_cli.engine.backbones.loading import Loaded, Opener
from rtdmd_cli.engine.evaluation import generate_phase, score_phase
from rtdmd_cli.engine.storage.files import TMP_PREFIX
from rtdmd_cli.errors import DataError, UsageError
from rtdmd_cli.shapes.grammar import TASKS
from tests.tiny_runs import make_run, write_preset

app = typer.Typer()
app.command()(eval_command)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times."""
    timed = {"timing.jsonl", "report.html", "report.md", "results.json", "evaluation.json"}
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def untimed(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "seconds_per_picture")}


def test_json_on_stdout_the_table_on_stderr_and_files_in_the_folder() -> None:
    make_run(Path("runs"), "mine")
    result = run("shapes", "--limit", "7", "--steps", "2", "--json", "--out", "found")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert list(found["tasks"]) == list(TASKS) and found["limit"] == 7 and found["images"] == 7
    assert (found["benchmark"], found["steps"], found["evaluations"]) == ("shapes", 2, 2)
    for key in ("overall", "interval", "guidance", "seconds", "seconds_per_picture", "model", "model_hash"):
        assert key in found
    assert "color_attr" in result.stderr and "not comparable: 7 of 553 prompts" in result.stderr
    saved = json.loads(Path("found/results.json").read_text())
    assert {key: saved[key] for key in found} == found | {"prompts": saved["prompts"]}
    assert len(saved["pictures"]) == 7
    assert {"prompt", "tag", "correct", "reasons"} < set(saved["pictures"][0])
    for name in ("samples.png", "00000/metadata.jsonl", "00000/samples/0000.png", "scores/shapes.jsonl"):
        assert (Path("found") / name).is_file()
    again = run("shapes", "--limit", "6", "--steps", "1", "--json", "--quiet", "--out", "found")
    assert again.stderr == "" and json.loads(Path("found-2/results.json").read_text())["limit"] == 6
    assert json.loads(Path("found/results.json").read_text()) == saved


def test_the_table_is_data_where_no_json_is_asked_for() -> None:
    make_run(Path("runs"), "mine")
    result = run("shapes", "--limit", "6", "--steps", "1", "--quiet", "--images-per-prompt", "2")
    assert result.exit_code == 0, result.exception
    for words in ("mine/step-000010", "counting", "overall", "95% interval", "12 pictures", "more objects"):
        assert words in result.stdout
    assert result.stderr == "" and not Path("evals").exists()


@pytest.mark.parametrize("name", ["shape", "shapess", "SHAPES"])
def test_another_benchmark_is_refused_with_the_nearest(name: str) -> None:
    error = run(name).exception
    assert isinstance(error, UsageError) and "`shapes`" in error.message


def test_bad_options() -> None:
    for option in (("--limit", "0"), ("--images-per-prompt", "0"), ("--steps", "0"), ("--seed", "x")):
        assert run("shapes", *option).exit_code == 2
    Path("file").write_text("")
    assert isinstance(run("shapes", "--out", "file").exception, UsageError)


def test_the_built_in_model() -> None:
    if not (Path(str(files("rtdmd_cli"))) / "shapes/weights/sd3").is_dir():
        pytest.skip("the package has no trained models yet")
    result = run("shapes", "--from", "shapes-4step", "--limit", "12", "--steps", "10", "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["overall"] > 0.3 and 0 <= found["extra_objects"] < 0.5


def stop_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, which sends this process a real SIGINT at its call number `calls`."""
    left = [calls]

    def call(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **more)

    return call


ASKED = ("shapes", "--limit", "8", "--images-per-prompt", "2", "--steps", "2", "--batch", "5")


def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("runs"), "mine")
    assert run(*ASKED, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(generate_phase, "paint", stop_after(generate_phase.paint, 2))
        stopped = run(*ASKED, "--out", "cut")
    assert stopped.exit_code == 130 and "--resume" in stopped.stderr
    assert len(list(Path("cut").glob("*/samples/*.png"))) == 10 and not Path("cut/scores").exists()
    Path("cut/00000/samples/.tmp-0123abcd-0001.png").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(score_phase.ScoreFile, "add", stop_after(score_phase.ScoreFile.add, 1))
        patch.setattr("rtdmd_cli.engine.evaluation.metrics._OWN", small_batches(6))
        stopped = run(*ASKED, "--out", "cut", "--resume")
    assert stopped.exit_code == 130, stopped.exception
    lines = Path("cut/scores/shapes.jsonl").read_bytes()
    assert lines.count(b"\n") == 1 + 6
    Path("cut/scores/shapes.jsonl").write_bytes(lines[:-9])  # a line half written
    assert run(*ASKED, "--out", "cut", "--resume").exit_code == 0
    Path("cut/00000/samples/.tmp-0123abcd-0001.png").unlink(missing_ok=True)
    assert contents(Path("cut")) == contents(Path("whole"))
    assert untimed(Path("cut/results.json")) == untimed(Path("whole/results.json"))
    monkeypatch.setattr(generate_phase, "paint", None)  # neither is called any more
    monkeypatch.setattr(score_phase.ScoreFile, "add", None)
    assert run(*ASKED, "--out", "cut", "--resume").exit_code == 0


def small_batches(size: int) -> dict[str, Any]:
    from dataclasses import replace

    from rtdmd_cli.engine.evaluation.metrics import _OWN

    return {name: replace(own, batch=size) for name, own in _OWN.items()}


def test_a_folder_says_the_same_as_memory_and_lost_pictures_come_back() -> None:
    make_run(Path("runs"), "mine")
    memory = json.loads(run(*ASKED, "--json", "--quiet").stdout)
    assert not Path("evals").exists()
    assert run(*ASKED, "--out", "found").exit_code == 0
    saved = untimed(Path("found/results.json"))
    same = {key: value for key, value in memory.items() if key not in ("seconds", "seconds_per_picture")}
    assert {key: saved[key] for key in same} == same
    before = contents(Path("found"))
    Path("found/00000/samples/0001.png").unlink()
    assert run(*ASKED, "--out", "found", "--resume").exit_code == 0
    assert contents(Path("found")) == before


def test_what_was_changed_by_hand_is_not_counted() -> None:
    """Other pictures under the names, scores and times of one's own: named, or computed anew."""
    make_run(Path("runs"), "mine")
    assert run(*ASKED, "--out", "found").exit_code == 0
    before, saved = contents(Path("found")), untimed(Path("found/results.json"))
    one, other = sorted(Path("found").glob("*/samples/*.png"))[:3:2]
    mine = one.read_bytes()
    one.write_bytes(other.read_bytes())  # another prompt's
    error = run(*ASKED, "--out", "found", "--resume").exception
    assert isinstance(error, DataError) and f"{one} is not the one that was made" in error.message
    error = run("shapes", "--score-only", "found", "--limit", "2", "--out", "again").exception
    assert isinstance(error, DataError) and "is not the one that was made" in error.message
    one.write_bytes(mine)
    scores, times = Path("found/scores/shapes.jsonl"), Path("found/timing.jsonl")
    lines = scores.read_bytes()
    scores.write_bytes(lines.replace(b'"score": 0.0', b'"score": 1.0').replace(b'"image": 1', b'"image": 0'))
    assert scores.read_bytes() != lines
    times.write_bytes(
        times.read_bytes().replace(b'"seconds": ', b'"seconds": 9e9') + b'{"pictures": 1, "seconds": 3.0}\n'
    )
    assert run(*ASKED, "--out", "found", "--resume").exit_code == 0
    assert untimed(Path("found/results.json")) == saved
    assert json.loads(Path("found/results.json").read_text())["seconds_per_picture"] is None
    shutil.rmtree(one.parents[1] / "exact")  # what is judged is missing: it is made again
    assert run(*ASKED, "--out", "found", "--resume").exit_code == 0
    now = contents(Path("found"))
    score_lines = now.pop("scores/shapes.jsonl"), before.pop("scores/shapes.jsonl")
    assert now == before and sorted(score_lines[0].splitlines()) == sorted(score_lines[1].splitlines())


def test_resume_wants_the_same_evaluation() -> None:
    make_run(Path("runs"), "mine")
    assert run(*ASKED, "--out", "found").exit_code == 0
    error = run(*ASKED, "--out", "found", "--seed", "7", "--resume").exception
    assert isinstance(error, DataError) and "differs in seed" in error.message
    other = run(*ASKED, "--out", "found", "--seed", "7")
    assert other.exit_code == 0 and "writing to found-2" in other.stderr
    again = run(*ASKED, "--out", "found", "--seed", "7", "--resume")
    assert again.exit_code == 0 and "going on with found-2" in again.stderr


def test_pictures_first_and_scores_later() -> None:
    make_run(Path("runs"), "mine")
    first = run(*ASKED, "--images-only")
    assert first.exit_code == 0 and first.stdout.split()[1] == "evals/shapes-mine-step-000010"
    made = Path(first.stdout.split()[1])
    assert not (made / "scores").exists() and "--score-only" in first.stderr
    shutil.move(made / "00000", "aside")
    error = run("shapes", "--score-only", str(made)).exception
    assert isinstance(error, DataError) and "pictures of 7 of its 8 prompts" in error.message
    shutil.move("aside", made / "00000")
    assert run("shapes", "--score-only", str(made)).exit_code == 0
    assert run(*ASKED, "--out", "whole").exit_code == 0
    assert untimed(made / "results.json") == untimed(Path("whole/results.json"))


def test_pictures_of_anyone_are_scored() -> None:
    make_run(Path("runs"), "mine")
    assert run(*ASKED, "--images-only", "--out", "found").exit_code == 0
    theirs = Path("theirs")
    for folder in sorted(Path("found").glob("0*")):
        shutil.copytree(folder / "samples", theirs / folder.name / "samples")
        shutil.copy(folder / "metadata.jsonl", theirs / folder.name)
    before = contents(theirs)
    result = run("shapes", "--score-only", "theirs", "--json", "--quiet")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["model"] == "theirs" and found["images"] == 16 and found["steps"] is None
    assert found["departures"] == ["8 of 553 prompts", "judged from 8-bit pictures"]
    assert contents(theirs) == before and Path("evals/shapes-theirs/results.json").is_file()


@pytest.fixture(scope="module")
def six_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures in GenEval's layout, as anyone could have made it."""
    root = tmp_path_factory.mktemp("six")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("RTDMD_CACHE", str(root / "cache"))
        make_run(Path("runs"), "mine")
        assert run("shapes", "--limit", "6", "--steps", "1", "--images-only", "--out", "made").exit_code == 0
    for path in (root / "made").glob("*/exact"):
        shutil.rmtree(path)
    for name in ("evaluation.json", "pictures.jsonl"):
        (root / "made" / name).unlink()
    return root / "made"


def spoiled(pictures: Path, change: Callable[[Path], Any]) -> Any:
    shutil.copytree(pictures, "found")
    change(Path("found/00092"))
    return run("shapes", "--score-only", "found").exception


def black(size: int) -> Callable[[Path], None]:
    from PIL import Image

    return lambda folder: Image.new("RGB", (size, size)).save(folder / "samples/0000.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "metadata.jsonl").unlink(), "00092/metadata.jsonl is missing"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{"), "is not one JSON object"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"prompt": " "}'), "has no text `prompt`"),
        (lambda folder: (folder / "samples/0000.png").unlink(), "00092/samples holds 0 pictures"),
        (lambda folder: shutil.rmtree(folder / "samples"), "00092/samples is missing"),
        (lambda folder: (folder / "samples/0000.png").write_bytes(b"no"), "0000.png is damaged"),
        (lambda folder: cut(folder / "samples/0000.png"), "0000.png is damaged"),
        (black(64), "has 64 x 64 px, the ones before it 32 x 32"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"prompt": "a dog"}'), "no caption"),
    ],
)
def test_bad_pictures_are_named(six_pictures: Path, change: Callable[[Path], Any], message: str) -> None:
    error = spoiled(six_pictures, change)
    assert isinstance(error, DataError) and message in error.message and error.hint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_more_pictures_than_there_are_and_contradictions(six_pictures: Path) -> None:
    found = str(six_pictures)
    error = run("shapes", "--score-only", found, "--images-per-prompt", "2").exception
    assert isinstance(error, DataError) and "holds 1 pictures, not 2" in error.message
    for option in (("--from", "mine"), ("--steps", "3"), ("--seed", "1"), ("--images-only",)):
        assert isinstance(run("shapes", "--score-only", found, *option).exception, UsageError)
    assert isinstance(run("shapes", "--images-only", "--compare", "other").exception, UsageError)
    assert isinstance(run("shapes", "--score-only", "nowhere").exception, DataError)


def test_a_model_of_another_world_is_refused() -> None:
    error = run("shapes", "--from", str(write_preset(Path("big.yaml"), 64))).exception
    assert isinstance(error, DataError) and "makes 64 px" in error.message


def test_the_model_is_gone_before_the_judges_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    make_run(Path("runs"), "mine")
    loaded: list[Any] = []
    load, judged = eval_steps.load_model, eval_steps._judged

    def remember(*arguments: Any) -> Any:
        source, model = load(*arguments)
        loaded.append(weakref.ref(model.backbone.transformer))
        return source, model

    def look(*arguments: Any) -> Any:
        assert loaded[0]() is None, "the transformer is still in memory"
        return judged(*arguments)

    monkeypatch.setattr(eval_steps, "load_model", remember)
    monkeypatch.setattr(eval_steps, "_judged", look)
    result = run("shapes", "--limit", "6", "--steps", "1")
    assert result.exit_code == 0 and loaded, result.exception


def test_the_text_encoders_leave_before_the_transformer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("runs"), "mine")
    order: list[str] = []
    for holder, name in ((Loaded, "drop_encoders"), (Opener, "encoder"), (Opener, "transformer")):
        own = getattr(holder, name)

        def told(*given: Any, own: Callable[..., Any] = own, name: str = name) -> Any:
            order.append(name)
            return own(*given)

        monkeypatch.setattr(holder, name, told)
    assert run("shapes", "--limit", "7", "--steps", "1", "--out", "found").exit_code == 0
    first = {name: order.index(name) for name in set(order)}
    assert first["encoder"] < first["drop_encoders"] < first["transformer"]
    assert order.count("transformer") == 1 and order.index("transformer") > max(
        place for place, name in enumerate(order) if name == "encoder"
    )


def test_an_evaluation_killed_in_its_first_file_goes_on() -> None:
    """What a kill leaves of that file is no reason to refuse the folder."""
    make_run(Path("runs"), "mine")
    Path("found").mkdir()
    Path("found", f"{TMP_PREFIX}evaluation.json-1").write_text("{")
    done = run("shapes", "--limit", "7", "--steps", "1", "--out", "found", "--resume")
    assert done.exit_code == 0, done.exception
    assert Path("found/evaluation.json").is_file()
