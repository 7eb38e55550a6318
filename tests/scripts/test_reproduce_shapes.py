"""The table of the shapes world: real commands once, on a tiny matrix, and the book-keeping around them."""

from __future__ import annotations

import json
import os
import signal
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.compute.mixed import products_of
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.errors import UsageError
from scripts.reproduce import __main__ as reproduce
from scripts.reproduce import runner
from scripts.reproduce.matrix import Cell, Request, Row, chosen_rows, make_cell, table_cells, table_rows
from scripts.reproduce.runner import CommandFailed, Runner
from tests.commands import fork, wait

PRESET = "shapes-4step"
ROWS = [
    "teacher",
    "teacher-equal-cost",
    "stage1",
    "stage2",
    "stage1-consistency",
    "stage1-interval",
    "stage1-boundaries",
    "stage1-normaliser",
    "stage1-backprop",
    "stage1-batched",
    "stage2-grpo-only",
    "stage2-all-steps",
    "stage2-backprop-only",
    "stage2-tilt-only",
    "stage2-matching",
    "stage2-no-reward",
    "stage2-matching-last",
    "stage2-matching-steps",
]
PROMPTS = [
    {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]},
    {"prompt": "two rings", "tag": "counting", "include": [{"class": "ring", "count": 2}]},
]


def rows_of(*overrides: str) -> dict[str, Row]:
    return {row.name: row for row in table_rows(load_preset(PRESET, overrides, {}).preset)}


def cell_of(name: str, seed: int = 0, *overrides: str, limit: int | None = None) -> Cell:
    request, rows = Request(PRESET, overrides, limit), rows_of(*overrides)
    return make_cell(request, rows[name], seed, list(rows.values()))


def call(*options: str) -> Result:
    return CliRunner().invoke(reproduce.app, list(options))


def table_of(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first one."""
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def evaluation(overall: float, **values: Any) -> dict[str, Any]:
    clip = {"score": 0.75, "frechet": 0.01, "diversity": 0.125}
    facts = {"evaluations": 4, "seconds_per_picture": 0.01, "steps": 4, "guidance": 1.0}
    return {"overall": overall, "clip": clip, "device": "cpu", "dtype": "fp32", **facts, **values}


class Forking(Runner):
    """Runs the real commands in processes that are forked with all imports, but for `sample`."""

    def command(self, arguments: list[str], fixed: dict[str, str] | None = None) -> dict[str, Any]:
        if arguments[0] == "sample":
            return super().command(arguments, fixed)
        self.ran.append(arguments)
        done = wait(
            fork(runner.ROOT, *arguments, **{"RTDMD_CACHE": os.environ["RTDMD_CACHE"], **(fixed or {})})
        )
        assert done.code == 0, done.err
        result: dict[str, Any] = json.loads(done.out)
        return result


class Pretended(Runner):
    """Runs no process: trainings finish at once, and an evaluation scores 0.5 and a tenth of its noise seed."""

    fails: str | None = None
    teachers = {"4": 0.4, "2": 0.3, "50": 0.9}

    def command(self, arguments: list[str], fixed: dict[str, str] | None = None) -> dict[str, Any]:
        self.ran.append(arguments)
        if arguments[0] == self.fails:
            raise CommandFailed(arguments, 5)
        options = dict(zip(arguments, arguments[1:], strict=False))
        if arguments[0] == "sample":
            return self.draw(Path(options["--out"]), Path(options["--prompts"]).read_text().splitlines())
        if arguments[0] != "eval":
            run = RunFolder(Path(options["--out"]) / options["--name"])
            (run.checkpoints / "step-000001").mkdir(parents=True)
            (run.path / "environment.json").write_text('{"device": "cpu (trained here)"}')
            run.set_status("finished", seconds=90.0)
            return {"finished": True}
        if "--steps" not in options:
            return evaluation(0.5 + int(options["--seed"]) / 10)
        guidance = float(options["--guidance"])
        return evaluation(self.teachers[options["--steps"]], steps=int(options["--steps"]), guidance=guidance)

    def draw(self, folder: Path, prompts: list[str]) -> dict[str, Any]:
        folder.mkdir()
        paths = [folder / f"{number}.png" for number in range(len(prompts))]
        for path in paths:
            Image.new("RGB", (8, 8), "red").save(path)
        return {"pictures": [{"path": str(path)} for path in paths]}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Pretended]:
    """The runners of the calls of a test."""
    made: list[Pretended] = []

    def make(out: Path, cells: Path, say: Callable[[str], None]) -> Pretended:
        made.append(Pretended(out, cells, say))
        return made[-1]

    monkeypatch.setattr(reproduce, "Runner", make)
    return made


def kinds(one: Runner) -> list[str]:
    return [arguments[0] for arguments in one.ran]


@contextmanager
def stop_when(there: Callable[[], bool]) -> Iterator[None]:
    """Within the block, this process gets a SIGTERM as soon as something is there, however long that takes."""
    over = threading.Event()

    def watch() -> None:
        while not there():
            if over.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def no_default_action() -> Iterator[None]:
    """A SIGTERM that nobody waits for is lost, and does not end the tests."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_real_commands_stopped_in_the_middle_go_on(tmp_path: Path) -> None:
    """Stage 1 is broken off; the same command finishes it, starts stage 2 from it and fills the table."""
    prompts, cache = tmp_path / "prompts.jsonl", tmp_path / "cache"
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    values = ["distill.iterations=6", "distill.batch=2", f"distill.prompts={prompts}", "distill.log_every=1"]
    values += ["tune_reward.epochs=1", "tune_reward.images_per_epoch=4", "tune_reward.images_per_prompt=2"]
    values += [f"tune_reward.prompts={prompts}", f"tune_reward.eval_prompts={prompts}"]
    values += ["tune_reward.eval_images=0", "evaluate.images_per_prompt=2", "distill.sample_every=0"]
    values += ["tune_reward.watch.features=null", "model.teacher_steps=8"]
    options = [word for value in values for word in ("--set", value)]
    options += ["--out", str(tmp_path / "out"), "--limit", "6", "--seeds", "1", "--only", "stage2", "--json"]
    first = cell_of("stage2", 0, *reproduce.OWN[PRESET], *values, limit=6)
    assert first.stage_1 is not None
    folder = tmp_path / "out/runs" / first.stage_1.run_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RTDMD_CACHE", str(cache))
        with no_default_action(), stop_when(lambda: (folder / "metrics.jsonl").exists()):
            stopped = call(*options)
        assert stopped.exit_code == 143 and RunFolder(folder).status()["state"] == "interrupted"
        reached = RunFolder(folder).status()["iteration"]
        assert 0 < reached < 6 and not list((tmp_path / "out").glob("cells/*.json"))
        patch.setattr(reproduce, "Runner", Forking)
        result = call(*options)
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    done = [row["row"] for row in table["rows"] if row["done"]]
    assert done == ["stage1", "stage2"]
    iterations = [line["iteration"] for line in RunFolder(folder).metrics.read()]
    assert iterations == list(range(1, 7))
    assert f"at iteration {reached}" in (folder / "log.txt").read_text()
    for name, cell in (("stage1", first.stage_1), ("stage2", first)):
        record = json.loads((tmp_path / "out/cells" / f"{cell.name}.json").read_text())
        row = next(each for each in table["rows"] if each["row"] == name)
        shown = record["evaluation"]
        assert shown["limit"] == 6 and shown["images"] == 12 and shown["model"].startswith(cell.run_name)
        assert row["score"] == {**dict.fromkeys(("mean", "min", "max"), shown["overall"]), "n": 1}
        assert record["diversity"] == shown["clip"]["diversity"] > 0
        assert record["training_seconds"] > 0 and len(record["machines"]) == 1
        hardware = cell.resolved.preset.hardware
        assert hardware.mixed_precision == ("none" if name == "stage1" else "auto")
        assert record["products"] == [products_of(hardware, torch.device("cpu"))]
        assert str(tmp_path / "out") not in json.dumps(record)
    with Image.open(tmp_path / "out/samples.png") as grid:  # of both stages; the teacher's cell is not made
        assert grid.width > 8 * 128 and 2 * 128 < grid.height < 3 * 128 + 100
        assert len(grid.convert("L").crop((30, 100, 150, 210)).getcolors() or []) > 10
    text = (tmp_path / "out/table.md").read_text()
    assert table_of(text)["stage 2"][7] == "1 of 1" and table["note"] in text and "Limited to 6" in text
    assert f"trainings: stage 1 in float32, stage 2 in {record['products'][0]}." in text


def test_a_table_from_end_to_end_and_again(tmp_path: Path, pretended: list[Pretended]) -> None:
    options = ["--out", str(tmp_path)]
    first = call(*options)
    assert first.exit_code == 0 and "Nothing is missing." in first.stdout
    assert first.stdout == (tmp_path / "table.md").read_text()
    lines = table_of(first.stdout)
    assert len(lines) == len(ROWS)
    assert lines["teacher at equal cost, 4 steps without guidance"][0] == "0.400 (0.400 to 0.400)"
    assert lines["stage 1"] == [
        "0.600 (0.500 to 0.700)",
        "0.750 (0.750 to 0.750)",
        "0.0100 (0.0100 to 0.0100)",
        "0.125 (0.125 to 0.125)",
        "4",
        "0.0100 (0.0100 to 0.0100)",
        "1.5 (1.5 to 1.5)",
        "3 of 3",
    ]
    assert lines["stage 1, full interval"][0] == "0.500" and lines["stage 1, full interval"][7] == "1 of 1"
    assert kinds(pretended[0]).count("distill") == 3 + 6 and kinds(pretended[0]).count("tune-reward") == 3 + 8
    again = call(*options)
    assert again.stdout == first.stdout and pretended[1].ran == []
    score = json.loads(call(*options, "--json").stdout)["rows"][2]["score"]
    assert score == pytest.approx({"mean": 0.6, "min": 0.5, "max": 0.7, "n": 3})
    picture = ElementTree.fromstring((tmp_path / "table.svg").read_text())
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width > 8 * 128 and grid.height > 3 * 128
        assert len(grid.info["prompts"].splitlines()) == 8  # type: ignore[attr-defined]
    assert kinds(pretended[0]).count("sample") == 3
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.600" in texts and "stage 1, full interval" in texts and "not run yet" not in texts


def test_what_is_missing_is_said_and_how_to_fill_it_in(tmp_path: Path, pretended: list[Pretended]) -> None:
    result = call("--out", str(tmp_path), "--only", "stage1", "--seeds", "2", "--set", "distill.batch=4")
    lines = table_of(result.stdout)
    assert lines["stage 1"][7] == "2 of 2"
    assert lines["stage 2"] == ["not run yet", *["-"] * 6, "0 of 2"]
    note = result.stdout.splitlines()[-1]
    assert note.startswith("Missing: teacher (2 of 2), teacher-equal-cost (2 of 2), stage2 (2 of 2)")
    fill = f"scripts/reproduce_shapes --fast --seeds 2 --out {tmp_path} --set distill.batch=4 --only "
    assert note.endswith(fill + ",".join(name for name in ROWS if name != "stage1"))
    picture = (tmp_path / "table.svg").read_text()
    assert picture.count(">not run yet</text>") == len(ROWS) - 1
    words = note.partition("scripts/reproduce_shapes ")[2].split()
    assert call(*words).stdout.splitlines()[-1] == "Nothing is missing."
    assert pretended[0].ran and "distill" in kinds(pretended[1])  # the ablations of stage 1


def test_figures_can_be_kept_elsewhere_and_name_no_path(tmp_path: Path, pretended: list[Pretended]) -> None:
    """As the ones in this repository: found again from another folder, where the weights are not."""
    kept = ["--cells", str(tmp_path / "kept"), "--seeds", "1", "--only", "stage2"]
    first = call("--out", str(tmp_path / "here"), *kept)
    assert not (tmp_path / "here/cells").exists() and f"--cells {tmp_path}/kept" in first.stdout
    again = call("--out", str(tmp_path / "there"), *kept)
    assert again.exit_code == 0 and pretended[1].ran == []
    assert table_of(again.stdout)["stage 2"][0] == "0.500"
    records = [path.read_text() for path in (tmp_path / "kept").iterdir()]
    assert len(records) == 2 and not any(str(tmp_path) in text for text in records)
    commands = [json.loads(text)["commands"] for text in records]
    assert any("presets/" in word for command in commands[0] for word in command)
    assert all(name in again.stdout for text in records for name in json.loads(text)["machines"])
    missing = call("--out", str(tmp_path / "there"), "--cells", str(tmp_path / "no"), "--list")
    assert (
        f"no folder {tmp_path / 'no'}" in missing.stderr and "stage2               0 of 3" in missing.stdout
    )


def test_the_picture_is_that_of_the_table(tmp_path: Path, pretended: list[Pretended]) -> None:
    """Drawn anew for another table in the same folder; a failing `sample` costs the picture alone."""
    options, other = (
        ["--out", str(tmp_path), "--seeds", "1", "--only", "stage1"],
        ["--set", "distill.batch=4"],
    )
    call(*options)
    call(*options, *other)
    assert kinds(pretended[1]).count("sample") == 1
    call(*options)
    assert kinds(pretended[2]) == ["sample"]
    assert call(*options).exit_code == 0 and pretended[3].ran == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretended, "fails", "sample")
        failed = call(*options, *other, "--json")
    assert failed.exit_code == 5 and "no pictures" in failed.stderr
    assert json.loads(failed.stdout)["files"] == [str(tmp_path / "table.md"), str(tmp_path / "table.svg")]


def test_what_another_call_filled_in_meanwhile_stands_in_the_table(
    tmp_path: Path, pretended: list[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = reproduce._work

    def work(*arguments: Any) -> None:
        monkeypatch.setattr(reproduce, "_work", make)
        call("--out", str(tmp_path), "--seeds", "1", "--only", "teacher")
        make(*arguments)

    monkeypatch.setattr(reproduce, "_work", work)
    lines = table_of(call("--out", str(tmp_path), "--seeds", "1", "--only", "stage1").stdout)
    assert lines["teacher, 50 steps with guidance 4"][7] == lines["stage 1"][7] == "1 of 1"


def test_kept_cells_are_whole_and_of_the_present_preset() -> None:
    """A cell of other settings would be of no use: it is removed when the preset changes."""
    kept = sorted((runner.ROOT / "scripts/reproduce/cells").glob("*.json"))
    request = Request(PRESET, reproduce.OWN[PRESET])
    rows = table_rows(load_preset(PRESET, request.overrides, {}).preset)
    known = {f"{cell.name}.json": cell for cell in table_cells(request, rows, 3, 3)}
    assert kept and {path.name for path in kept} <= known.keys()
    said: list[str] = []
    one = Runner(runner.ROOT, kept[0].parent, said.append)
    assert all(one.stored(known[path.name]) for path in kept) and said == []
    for path in kept:
        record = json.loads(path.read_text())
        assert record["machines"] and not any(word.startswith("/") for c in record["commands"] for word in c)


def test_a_changed_setting_runs_anew_and_the_old_cell_stays(
    tmp_path: Path, pretended: list[Pretended]
) -> None:
    options = ["--out", str(tmp_path), "--only", "stage1", "--seeds", "1"]
    call(*options)
    call(*options, "--set", "distill.fake_lr=0.001")
    assert kinds(pretended[1]) == ["distill", "eval", "sample"]
    call(*options, "--limit", "12")
    assert kinds(pretended[2]) == ["eval", "sample"]  # the same weights, measured otherwise
    call(*options, "--set", "evaluate.images_per_prompt=1")
    assert kinds(pretended[3]) == ["eval", "eval", "sample"]  # one more for the diversity
    assert (
        "--set evaluate.images_per_prompt=1"
        in call(*options, "--list", "--set", "evaluate.images_per_prompt=1").stdout
    )
    assert len(list((tmp_path / "cells").iterdir())) == 4
    call(*options)
    assert kinds(pretended[-1]) == ["sample"]  # the picture was that of the other settings


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": "x"}', b"\xff\xfe", b'{"evaluation": {}}'])
def test_a_damaged_cell_is_redone_without_training_again(
    tmp_path: Path, pretended: list[Pretended], damage: bytes
) -> None:
    options = ["--out", str(tmp_path), "--only", "stage1", "--seeds", "1"]
    whole = call(*options).stdout
    (path,) = (tmp_path / "cells").iterdir()
    before = json.loads(path.read_text())
    path.write_bytes(damage)
    listed = call(*options, "--list")
    assert "damaged" in listed.stderr and "stage1               0 of 1" in listed.stdout
    assert call(*options).stdout == whole
    assert kinds(pretended[-1]) == ["eval"]
    assert json.loads(path.read_text()) | {"commands": 0} == before | {"commands": 0}


@pytest.mark.parametrize("lost", ["key", "evaluation", "training_seconds", "overall", "diversity", "version"])
def test_a_cell_that_lacks_something_counts_as_not_run(tmp_path: Path, lost: str) -> None:
    one, cell = Pretended(tmp_path, tmp_path / "cells", lambda text: None), cell_of("stage1")
    record = one.make(cell)
    assert one.stored(cell) == record
    del (record["evaluation"] if lost == "overall" else record)[lost]
    (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps(record))
    assert one.stored(cell) is None


def test_stage_2_starts_from_stage_1_of_the_same_seed_and_makes_it_first(tmp_path: Path) -> None:
    one = Pretended(tmp_path, tmp_path / "cells", lambda text: None)
    cell = cell_of("stage2", 2)
    assert cell.stage_1 is not None
    one.make(cell)
    assert kinds(one) == ["distill", "eval", "eval", "tune-reward", "eval", "eval"]
    assert one.stored(cell.stage_1) is not None
    tune = dict(zip(one.ran[3], one.ran[3][1:], strict=False))
    assert Path(tune["--from"]) == tmp_path / "runs" / cell.stage_1.run_name and tune["--resume"] == "auto"
    preset = load_preset(tune["--preset"], environ={}).preset
    assert (preset.distill.seed, preset.tune_reward.seed) == (44, 44)
    assert [dict(zip(a, a[1:], strict=False)).get("--seed") for a in one.ran] == [
        None,
        "2",
        "2",
        None,
        "2",
        "2",
    ]
    assert dict(zip(one.ran[5], one.ran[5][1:], strict=False))["--limit"] == "120"
    # A folder that is gone is trained again for the next one that needs it; its figures are not.
    for run in (cell, cell.stage_1):
        one.run_of(run).path.rename(tmp_path / f"gone-{run.row.name}")
    again = Pretended(tmp_path, tmp_path / "cells", lambda text: None)
    again.make(cell_of("stage2-grpo-only", 2))
    assert kinds(again) == ["distill", "tune-reward", "eval", "eval"]


def test_a_failed_cell_does_not_keep_the_others(
    tmp_path: Path, pretended: list[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretended, "fails", "tune-reward")
    result = call("--out", str(tmp_path), "--seeds", "1")
    assert result.exit_code == 5 and "rtdmd tune-reward ended with exit code 5" in result.stderr
    lines = table_of(result.stdout)
    assert lines["stage 2"][0] == "failed, exit code 5" and lines["stage 1, full interval"][7] == "1 of 1"
    monkeypatch.setattr(Pretended, "fails", None)
    assert call("--out", str(tmp_path), "--seeds", "1").exit_code == 0
    assert set(kinds(pretended[-1])) == {"tune-reward", "eval", "sample"}


def test_no_cell_is_started_after_the_minutes(tmp_path: Path, pretended: list[Pretended]) -> None:
    result = call("--out", str(tmp_path), "--minutes", "0", "--json")
    assert result.exit_code == 0 and pretended[0].ran == []
    assert json.loads(result.stdout)["missing"] == ROWS
    assert json.loads(result.stdout)["note"].endswith("--fast --out " + str(tmp_path))


def test_full_runs_every_row_with_every_seed() -> None:
    request, rows = Request(PRESET), list(rows_of().values())
    fast, full = table_cells(request, rows, 3, 1), table_cells(request, rows, 3, 3)
    assert [(cell.row.name, cell.seed) for cell in fast] == [
        *((name, 0) for name in ROWS),
        *((name, seed) for seed in (1, 2) for name in ROWS[:4]),
    ]
    assert len({cell.key for cell in full}) == len(full) == 3 * len(ROWS)
    assert json.loads(call("--full", "--list", "--json").stdout)["rows"][9]["seeds"] == 3


def test_an_evaluation_takes_one_thread_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its seconds a picture can be compared; a training takes what it is given."""
    seen: list[str | None] = []

    class Stopped(Exception):
        pass

    def stop(*arguments: Any, env: dict[str, str], **options: Any) -> None:
        seen.append(env.get("OMP_NUM_THREADS"))
        raise Stopped

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(runner.subprocess, "Popen", stop)
    made = Runner(tmp_path, tmp_path / "cells", lambda text: None)
    for name in ("teacher", "stage1"):
        with pytest.raises(Stopped):
            made.make(cell_of(name, 0))
    assert seen == ["1", "2"]


def test_rows_follow_the_preset() -> None:
    own = rows_of()
    assert list(own) == ROWS
    assert own["stage1-consistency"].overrides == ("distill.consistency_weight=0.01",)
    assert own["stage1-interval"].overrides == ("distill.interval=full",)
    policy = "tune_reward.policy_weight=1.0"
    off = ("tune_reward.backprop_weight=0.0", "tune_reward.tilt=0.0")
    nothing = "tune_reward.policy_weight=0.0"
    assert own["stage2-grpo-only"].overrides == (policy, *off)
    assert own["stage2-all-steps"].overrides == (policy, *off, "tune_reward.subset_steps=3")
    assert own["stage2-all-steps"].label.startswith("stage 2, GRPO only, on all 3")
    beside = rows_of("tune_reward.policy_weight=0.5")["stage2-all-steps"]
    assert beside.overrides == ("tune_reward.subset_steps=3",)
    assert beside.label.startswith("stage 2, policy gradient on all 3")
    assert own["stage2-backprop-only"].overrides == (nothing, "tune_reward.backprop_weight=2.0", off[1])
    assert own["stage2-tilt-only"].overrides == (nothing, off[0], "tune_reward.tilt=1.0")
    assert own["stage2-no-reward"].overrides == (nothing, *off)
    assert own["stage2-matching"].label == "stage 2, no distribution matching, and so no tilt"
    inherited = "tune_reward.matching_backprop_steps=null"
    last = ("tune_reward.matching=last", "tune_reward.matching_images=null", inherited, off[1])
    assert own["stage2-matching-steps"].overrides == (inherited,)
    assert "through 4 steps" in own["stage2-matching-steps"].label
    assert "stage2-matching-steps" not in rows_of(inherited)
    assert own["stage2-matching-last"].overrides == last
    assert own["stage1-normaliser"].overrides == ("distill.normaliser=published",)
    assert own["stage1-batched"].overrides == ("distill.backprop_steps=1", "distill.boundaries_batched=false")
    assert own["stage1-boundaries"].label.startswith("stage 1, one boundary")
    unmatched = rows_of("tune_reward.dmd_weight=0.0")
    assert unmatched["stage2-matching"].label == "stage 2, with distribution matching"
    assert not {"stage2-no-reward", "stage2-tilt-only", "stage2-matching-last"} & unmatched.keys()
    assert rows_of("tune_reward.tilt=0.0")["stage2-backprop-only"].label.endswith("(as the preset)")
    other = ("tune_reward.subset_steps=3", "tune_reward.policy_weight=2.0", "tune_reward.dmd_weight=0.1")
    plain = ("distill.boundaries=one", "distill.backprop_steps=1", "distill.boundaries_batched=false")
    turned = rows_of("distill.consistency_weight=0.1", "distill.interval=full", *other, *plain)
    assert "stage2-tilt-only" not in turned  # it needs the sub-interval
    through = ("distill.backprop_steps=4", "distill.boundaries_batched=true")
    assert turned["stage1-backprop"].overrides == through
    assert turned["stage1-boundaries"].overrides == ("distill.boundaries=every",)
    assert turned["stage1-batched"].overrides == ("distill.boundaries_batched=true",)
    assert turned["stage2-matching"].overrides == ("tune_reward.dmd_weight=0.0",)
    assert turned["stage2-grpo-only"].overrides[0] == "tune_reward.policy_weight=2.0"
    assert turned["stage1-consistency"].label == "stage 1, without the consistency term"
    assert turned["stage1-consistency"].overrides == ("distill.consistency_weight=0",)
    assert turned["stage1-interval"].overrides == ("distill.interval=sub",)
    assert turned["stage2-all-steps"].label.endswith("(as the preset)")
    assert chosen_rows(list(own.values()), ["stage2", "stage1"]) == {"stage1", "stage2"}
    assert chosen_rows(list(own.values()), []) == set(ROWS)
    with pytest.raises(UsageError, match="stage3"):
        chosen_rows(list(own.values()), ["stage3"])


def test_a_key_holds_what_makes_the_figures_and_nothing_else() -> None:
    stage_1, stage_2, teacher = cell_of("stage1"), cell_of("stage2"), cell_of("teacher")
    tuned = cell_of("stage1", 0, "tune_reward.epochs=3", "distill.save_every=9", "hardware.threads=1")
    assert tuned.key == stage_1.key
    assert cell_of("stage2", 0, "tune_reward.epochs=3").key != stage_2.key
    assert cell_of("stage2", 0, "distill.batch=4").key != stage_2.key
    assert cell_of("teacher", 0, "distill.batch=4").key == teacher.key
    assert cell_of("teacher", 1).key != teacher.key != cell_of("teacher-equal-cost").key
    assert cell_of("stage1", limit=6).key != stage_1.key
    version = replace(stage_1, resolved=replace(stage_1.resolved, sha256="0"))
    assert version.key == stage_1.key
    assert runner.__version__ not in json.dumps(stage_1.settings)


def test_wrong_options_are_usage_errors(tmp_path: Path) -> None:
    result = call("--out", str(tmp_path), "--only", "stage9")
    assert result.exit_code == 2 and "stage9" in result.stderr and "teacher-equal-cost" in result.stderr
    result = call("--out", str(tmp_path), "--set", "distill.batchh=3")
    assert result.exit_code == 2 and "distill.batch" in result.stderr
