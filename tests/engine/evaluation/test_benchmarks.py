"""The table of benchmarks, their prompts, and the stamps on figures that depart from the protocol."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from rtdmd_cli.engine.evaluation.benchmarks import BENCHMARKS, PUBLISHED, find_benchmark
from rtdmd_cli.engine.evaluation.metrics import check_prompts, find_judge
from rtdmd_cli.engine.evaluation.prompts import choose_prompts, spread
from rtdmd_cli.engine.evaluation.run import Ask, choose_judges, judge_paths
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from rtdmd_cli.shapes.grammar import TASKS
from tests.public_data import benchmark_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_row_names_judges_that_exist(name: str) -> None:
    row = BENCHMARKS[name]
    judges = [*([row.judge] if row.judge else []), *row.rewards]
    assert judges and [find_judge(each).name for each in judges] == judges
    assert set(row.published) <= set(judges)
    for published in row.published:
        assert any(published in each.figures for each in PUBLISHED)


@pytest.mark.parametrize(
    ("file", "name"),
    [(f"{n}.jsonl", n) for n in ("geneval", "geneval2")]
    + [(f"{n}.txt", n) for n in ("drawbench", "hpsv3", "ocr", "pickscore")],
)
def test_the_published_prompts_pass_every_check(file: str, name: str, cache: Path) -> None:
    path, row = benchmark_file(file), BENCHMARKS[name]
    given = choose_prompts(row, str(path), None)
    judges = choose_judges(row, ["clipscore"] if not row.judge else [])
    for judge in judges:
        check_prompts(judge, given)
    if name == "pickscore":  # the file here is a part of it
        assert given.departures == ("512 of 2,048 prompts", "not the published prompt file")
        return
    assert given.departures == () and len(given) == row.prompts
    part = choose_prompts(row, str(path), 7)
    assert len(part) == 7 and part.departures == (f"7 of {row.prompts:,} prompts",)
    assert all(given.texts[index] == text for index, text in part.texts.items())
    assert part.sha256 == given.sha256
    (cache / "data" / name).mkdir(parents=True)
    shutil.copy(path, cache / "data" / name / f"test{path.suffix}")  # as `rtdmd data fetch` leaves it
    assert choose_prompts(row, None, None) == given


def test_a_limit_spreads_over_all_tasks() -> None:
    assert spread(553, None) == spread(553, 9999) == list(range(553))
    for limit in (6, 7, 12, 60, 552):
        found = choose_prompts(BENCHMARKS["shapes"], None, limit)
        counts = Counter(known["tag"] for known in found.metadata.values())
        assert sum(counts.values()) == limit and set(counts) == set(TASKS)
        assert max(counts.values()) - min(counts.values()) <= limit * 0.05 + 1


def test_prompts_that_are_not_here() -> None:
    with pytest.raises(EnvironmentFailure, match="not on this machine") as caught:
        choose_prompts(BENCHMARKS["geneval"], None, None)
    assert caught.value.hint == "Fetch it: rtdmd data fetch geneval"
    with pytest.raises(UsageError, match="built in"):
        choose_prompts(BENCHMARKS["shapes"], "mine.txt", None)


def test_a_file_is_a_benchmark_of_its_own() -> None:
    row = find_benchmark("some/where/mine.jsonl")
    assert (row.name, row.file, row.judge, row.prompts) == ("mine", "some/where/mine.jsonl", "", None)
    assert find_benchmark("data:geneval").name == "geneval" and find_benchmark("data:geneval").judge == ""
    Path("mine.txt").write_text("a dog\na cat\n")
    found = choose_prompts(find_benchmark("mine.txt"), None, 1)
    assert found.departures == ("1 of 2 prompts",)
    with pytest.raises(UsageError, match="nothing to measure on mine"):
        choose_judges(row, [])
    for name in ("geneva", "GENEVAL", "genneval"):
        with pytest.raises(UsageError, match="nearest is `geneval`"):
            find_benchmark(name)


def test_prompts_without_what_a_judge_needs_are_named() -> None:
    Path("plain.txt").write_text("a photo of a dog\n")
    lines = [{"prompt": "a dog", "include": [{"class": "dragon", "count": 1}], "tag": "single_object"}]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("empty.jsonl").write_text('{"prompt": " "}')
    for name, file, words in (
        ("geneval", "plain.txt", "needs the metadata `include`"),
        ("geneval", "bad.jsonl", "names 'dragon'"),
        ("geneval2", "plain.txt", "has no `vqa_list`"),
        ("ocr", "plain.txt", "names no text to be read"),
    ):
        prompts = choose_prompts(BENCHMARKS[name], file, None)
        with pytest.raises(DataError, match=words) as caught:
            check_prompts(find_judge(name), prompts)
        assert f"`{name}` can't judge" in caught.value.message
    with pytest.raises(DataError, match="prompt 1 has no text"):
        choose_prompts(BENCHMARKS["geneval"], "empty.jsonl", None)


def test_departures_are_all_named() -> None:
    Path("mine.txt").write_text('a sign that says "Open"\n')
    row = BENCHMARKS["ocr"]
    judges = choose_judges(row, ["clipscore"])
    paths = judge_paths(judges, ["clipscore=/weights"])
    ask = Ask(row, choose_prompts(row, "mine.txt", None), 3, None, judges, paths)
    assert ask.departures == (
        "1 of 1,018 prompts",
        "not the published prompt file",
        "3 instead of 1 pictures a prompt",
        "clipscore with weights of /weights",
    )
    with pytest.raises(UsageError, match="names hpsv2, which is not measured"):
        judge_paths(judges, ["hpsv2=/weights"])
    with pytest.raises(UsageError, match="--reward-path must name"):
        judge_paths(judges, ["clipscore"])
