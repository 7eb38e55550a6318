"""`rtdmd eval` on the published benchmarks, from prompts to report, offline on small random models."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

from rtdmd_cli.cli.eval import eval_command
from rtdmd_cli.engine.judges import detector
from rtdmd_cli.engine.rewards.local import extra_installed
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from tests.public_data import benchmark_file
from tests.tiny_clip import save_clip as save_pickscore
from tests.tiny_geneval import save_clip, save_detector
from tests.tiny_runs import make_run
from tests.tiny_vlm import save_qwen3

app = typer.Typer()
app.command()(eval_command)
NASTY = 'a <script>alert("1")</script> & | `dog`'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(detector, "SHORT", 96)
    monkeypatch.setattr(detector, "THRESHOLD", 0.15)
    return tmp_path


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """geneval/, geneval2/ and pickscore/: random weights in the published layouts."""
    root = tmp_path_factory.mktemp("judges")
    for name in ("geneval/detector", "geneval/clip", "geneval2", "pickscore"):
        (root / name).mkdir(parents=True)
    save_detector(root / "geneval/detector")
    save_clip(root / "geneval/clip")
    save_qwen3(root / "geneval2")
    save_pickscore(root / "pickscore")
    return root


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_geneval_from_prompts_to_report(judges: Path) -> None:
    make_run(Path("runs"), "mine")
    prompts = str(benchmark_file("geneval.jsonl"))
    asked = ["geneval", "--prompts-file", prompts, "--limit", "2", "--steps", "1", "--json"]
    result = run(*asked, "--reward-path", f"geneval={judges / 'geneval'}")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["images"] == 8 and found["images_per_prompt"] == 4 and found["limit"] == 2
    keys = [figure["key"] for figure in found["figures"]]
    assert keys == ["geneval", "geneval-any", "geneval-soft"]
    assert all(
        figure["stamp"].startswith("2 of 553 prompts; geneval with weights") for figure in found["figures"]
    )
    assert {row["stamp"] for row in found["breakdowns"][0]["rows"]} == {found["figures"][0]["stamp"]}
    assert found["published"]["rows"][0]["figures"] == {"geneval": 0.7631}
    assert "Not comparable" in found["published"]["note"] and "Not comparable" in result.stderr

    out = Path("evals/geneval-mine-step-000010")
    assert sorted(path.name for path in out.iterdir() if path.name.isdecimal()) == ["00000", "00276"]
    metadata = json.loads(
        (out / "00276/metadata.jsonl").read_text()
    )  # one object, as the original scripts read it
    assert metadata["include"] and metadata["prompt"] and metadata["tag"]
    assert [path.name for path in sorted((out / "00276/samples").iterdir())] == [
        f"000{n}.png" for n in range(4)
    ]
    scores = lines(out / "scores/geneval.jsonl")
    assert scores[0]["judge"] == "geneval" and len(scores) == 9
    assert all(line["correct"] or line["reasons"] for line in scores[1:])
    check_page((out / "report.html").read_text(), "2 of 553 prompts")
    text = (out / "report.md").read_text()
    assert "0.7631" in text and "(<00276/samples/0000.png>)" in text


def check_page(page: str, *words: str) -> None:
    """Self-contained, without a script, under a strict policy, and it holds the words."""
    assert "<script" not in page and "javascript:" not in page
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    outside = [
        url for url in re.findall(r'(?:src|href)="([^"]*)"', page) if not url.startswith(("data:", "#"))
    ]
    assert outside == []
    for word in words:
        assert word in unescape(page)


def test_geneval_without_metadata_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("plain.txt").write_text("a photo of a dog\n")
    monkeypatch.setattr("rtdmd_cli.cli.eval_steps.load_model", None)
    error = run("geneval", "--prompts-file", "plain.txt").exception
    assert isinstance(error, DataError) and "needs the metadata `include`" in error.message
    error = run("geneval").exception
    assert isinstance(error, EnvironmentFailure) and error.hint == "Fetch it: rtdmd data fetch geneval"
    error = run("plain.txt").exception
    assert isinstance(error, UsageError) and "nothing to measure" in error.message
    error = run("plain.txt", "--rewards", "clipscor").exception
    assert isinstance(error, UsageError) and "`clipscore`" in error.hint
    Path("empty.jsonl").write_text('{"prompt": ""}\n')
    error = run("empty.jsonl", "--rewards", "clipscore").exception
    assert isinstance(error, DataError) and "prompt 1 has no text" in error.message


def test_geneval2_by_skill(judges: Path) -> None:
    make_run(Path("runs"), "mine")
    prompts = str(benchmark_file("geneval2.jsonl"))
    asked = ["geneval2", "--prompts-file", prompts, "--limit", "2", "--steps", "1", "--json", "--quiet"]
    result = run(*asked, "--reward-path", f"geneval2={judges / 'geneval2'}", "--out", "found")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert [figure["key"] for figure in found["figures"]] == ["geneval2", "geneval2-atoms"]
    assert all(0 < figure["value"] < 1 for figure in found["figures"])
    assert [part["title"] for part in found["breakdowns"]][1] == "Questions by skill"
    questions = json.loads(Path("found/00000/metadata.jsonl").read_text())["vqa_list"]
    assert len(lines(Path("found/scores/geneval2.jsonl"))[1]["atoms"]) == len(questions)


def test_rewards_on_prompts_of_ones_own_trained_on_or_not(judges: Path) -> None:
    make_run(Path("runs"), "mine", stage="tune-reward")  # whose preset trains on pickscore, among others
    Path("mine.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (NASTY, "b", "c")))
    Path("redness.py").write_text(
        "class Redness:\n    differentiable = True\n"
        "    def score(self, images, prompts, metadata):\n        return images[:, 0].mean((1, 2))\n"
    )
    weights = f"pickscore={judges / 'pickscore'}"
    result = run("mine.jsonl", "--rewards", "pickscore,redness:Redness", "--reward-path", weights, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["trained_on"] == ["pickscore"]
    assert [(each["key"], each["trained_on"]) for each in found["figures"]] == [
        ("redness:Redness", False),
        ("pickscore", True),
    ]
    assert found["published"] is None and "trained on: pickscore" in result.stderr
    out = Path("evals/mine-mine-step-000010")
    page = (out / "report.html").read_text()
    check_page(page, NASTY, "trained on")
    assert "<script>" not in (out / "report.md").read_text()
    assert lines(out / "scores/redness-Redness.jsonl")[0] == {
        "judge": "redness:Redness",
        "weights": "published",
    }
    other = run("mine.jsonl", "--rewards", "pickscore", "--reward-path", "pickscore=elsewhere", "--resume")
    assert isinstance(other.exception, DataError) and "other weights" in other.exception.message


def drawn(path: Path, text: str) -> None:
    picture = Image.new("RGB", (256, 256), "#f0e8d0")
    ImageDraw.Draw(picture).text((16, 100), text, "#102080", ImageFont.load_default(size=36))
    path.parent.mkdir(parents=True)
    picture.save(path)


def test_text_is_read_for_real() -> None:
    if not extra_installed("ocr"):
        pytest.skip("rapidocr is not installed")
    for number, text in enumerate(("Open Daily", "Closed")):
        drawn(Path(f"signs/0000{number}/samples/00000.png"), text)
        line = {"prompt": 'a shop sign that says "Open Daily"'}
        Path(f"signs/0000{number}/metadata.jsonl").write_text(json.dumps(line))
    result = run("ocr", "--score-only", "signs", "--json", "--quiet")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert {each["key"]: each["value"] for each in found["figures"]} == pytest.approx(
        {"ocr": (1 + 1 / 9) / 2, "ocr-exact": 0.5}
    )
    assert found["departures"] == ["2 of 1,018 prompts", "prompts not checked against the published file"]
    saved = lines(Path("evals/ocr-signs/scores/ocr.jsonl"))
    assert [line["read"].replace(" ", "") for line in saved[1:]] == ["OpenDaily", "Closed"]


def test_pictures_of_a_size(tmp_path: Path) -> None:
    """As asked, else as `evaluate.resolution` says, else as the model was trained."""
    made = make_run(Path("runs"), "mine")
    Path("own.txt").write_text("a ring\n")
    common = ("own.txt", "--rewards", "shapes-clip", "--from", "mine", "--images-only")
    for name, options, side in (("asked", ("--size", "16"), 16), ("preset", (), 24), ("trained", (), 32)):
        if name == "preset":
            text = made.preset.read_text()
            made.preset.write_text(
                text.replace("evaluate:\n  resolution: null", "evaluate:\n  resolution: 24")
            )
        if name == "trained":
            made.preset.write_text(text)
        assert run(*common, *options, "--out", name).exit_code == 0
        with Image.open(f"{name}/00000/samples/0000.png") as image:
            assert image.size == (side, side), name


def test_two_models_compared_at_equal_seeds() -> None:
    make_run(Path("runs"), "mine")
    make_run(Path("runs"), "other", steps=(20,))
    asked = ["shapes", "--limit", "12", "--steps", "1", "--json"]
    result = run(*asked, "--from", "mine", "--compare", "other", "--out", "both")
    assert result.exit_code == 0, result.exception
    compare = json.loads(result.stdout)["compare"]
    (pair,) = compare["pairs"]
    assert compare["other"]["model"] == "other/step-000020" and compare["other"]["steps"] == 4
    assert pair["wins"] + pair["ties"] + pair["losses"] == 12
    assert pair["difference"] == pytest.approx(pair["here"] - pair["there"])
    assert "compared with other/step-000020" in result.stderr
    check_page(Path("both/report.html").read_text(), "win rate", "12 of 553 prompts")
    # The other's folder is an evaluation like any other, and names itself in a comparison.
    (theirs,) = [path for path in Path("both").iterdir() if path.name.startswith("compared-")]
    again = run(*asked, "--from", "mine", "--compare", str(theirs), "--out", "again")
    assert json.loads(again.stdout)["compare"]["pairs"] == compare["pairs"]
    same = run(*asked, "--from", "mine", "--compare", "both", "--out", "same")
    assert json.loads(same.stdout)["compare"]["pairs"][0]["ties"] == 12
    error = run(*asked, "--from", "mine", "--seed", "5", "--compare", "both", "--out", "seeded").exception
    assert isinstance(error, DataError) and "its seed is another one" in error.message


def test_the_list() -> None:
    result = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["geneval", "geneval2", "drawbench", "hpsv3", "ocr", "pickscore", "shapes"]
    assert rows["geneval"]["images"] == 4 and rows["drawbench"]["prompts"] == 200
    shown = run("list")
    assert "geneval2" in shown.stdout and "prompt file" in shown.stderr
