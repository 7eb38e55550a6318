"""What `--from` finds, in which order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtdmd_cli.engine.sampling.source import Source, refuse_guidance, resolve
from rtdmd_cli.errors import DataError, RtdmdError, UsageError
from tests.tiny_runs import make_run, write_preset

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def test_nothing_given_takes_the_newest_finished_run(runs: Path) -> None:
    make_run(runs, "zebra")
    newest = make_run(runs, "alpha", (10, 20))
    make_run(runs, "unfinished", state="running")
    source = resolve(None, runs)
    assert (source.kind, source.checkpoint, source.label) == (
        "generator",
        newest.checkpoints / "step-000020",
        "alpha/step-000020",
    )
    assert len(source.notes) == 1 and "alpha/step-000020" in source.notes[0]


def test_nothing_given_and_no_finished_run_takes_the_built_in_model(runs: Path) -> None:
    make_run(runs, "unfinished", state="interrupted")
    source = resolve(None, runs)
    assert (source.kind, source.checkpoint, source.preset.name) == ("teacher", None, "shapes-4step")
    assert "built-in model" in source.notes[0]


def test_a_path_comes_before_a_run_name_and_that_before_a_preset(runs: Path) -> None:
    here = make_run(Path(), "shapes-4step")
    named = make_run(runs, "shapes-4step", (30,))
    assert resolve("shapes-4step", runs).checkpoint == here.checkpoints / "step-000010"
    shutil.rmtree(here.path)
    Path("shapes-4step").mkdir()  # a folder of that name that is nothing of ours changes nothing
    found = resolve("shapes-4step", runs)
    assert found.checkpoint == named.checkpoints / "step-000030"
    assert len(found.notes) == 1 and "`shapes-4step` is a run here" in found.notes[0]
    base = found.notes[0].rpartition(" ")[2]  # the preset's file, which the note names
    assert resolve(base, runs).label == "shapes-4step (base model)"
    assert resolve("runs/shapes-4step", runs).notes == ()
    shutil.rmtree(named.path)
    source = resolve("shapes-4step", runs)
    assert (source.kind, source.checkpoint, source.label) == ("teacher", None, "shapes-4step (base model)")


def test_paths_of_runs_checkpoints_and_presets(runs: Path) -> None:
    run = make_run(runs, "a", (10, 20))
    assert resolve("runs/a/", runs).label == "a/step-000020"
    older = resolve(str(run.checkpoints.resolve() / "step-000010"), runs)
    assert (older.label, older.preset.distill.lora.rank) == ("a/step-000010", 2)
    write_preset(Path("mine.yaml"))
    for reference in ("mine.yaml", "./mine.yaml"):
        assert resolve(reference, runs).label == "mine (base model)"


def test_the_folder_one_stands_in_is_a_path(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, "a")
    monkeypatch.chdir(run.path)
    assert resolve(".", Path("runs")).label == "a/step-000010"


@pytest.mark.parametrize(
    "reference", ["", "no such thing", "x" * 300, "a\0b", "none/such.yaml", "folder", "../runs", "-"]
)
def test_an_unknown_name_lists_the_three_possibilities(runs: Path, reference: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(UsageError) as caught:
        resolve(reference, runs)
    for word in ("checkpoint folder", "run under runs/", "preset"):
        assert word in caught.value.message
    assert caught.value.hint


def test_an_unknown_name_names_the_nearest(runs: Path) -> None:
    make_run(runs, "my-first-run")
    for wrong, near in (("my-frist-run", "my-first-run"), ("shape-4steps", "shapes-4step")):
        with pytest.raises(UsageError) as caught:
            resolve(wrong, runs)
        assert near in caught.value.hint


def test_a_broken_preset_file_is_explained(runs: Path) -> None:
    Path("mine.yaml").write_text("model: {family: sd3, pth: x}\n")
    with pytest.raises(UsageError, match=r"pth"):
        resolve("mine.yaml", runs)


def test_a_damaged_newest_checkpoint_is_skipped_aloud(runs: Path) -> None:
    run = make_run(runs, "a", (10, 20))
    weights = run.checkpoints / "step-000020" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    source = resolve("a", runs)
    assert source.label == "a/step-000010"
    assert "step-000020" in source.notes[0] and "bytes" in source.notes[0]
    with pytest.raises(DataError, match=r"step-000020/ema\.safetensors has"):
        resolve("runs/a/checkpoints/step-000020", runs)
    shutil.rmtree(run.checkpoints / "step-000010")
    with pytest.raises(DataError, match=r"no good checkpoint.*ema\.safetensors"):
        resolve("a", runs)


def remove_manifest(run: Path) -> None:
    (run / "checkpoints" / "step-000010" / "manifest.json").unlink()


def remove_preset(run: Path) -> None:
    (run / "preset.resolved.yaml").unlink()


def spoil_preset(run: Path) -> None:
    (run / "preset.resolved.yaml").write_text("nonsense: 1\n")


def remove_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000010")


@pytest.mark.parametrize(
    ("spoil", "reference", "expected"),
    [
        (remove_manifest, "runs/a/checkpoints/step-000010", "foreign.*manifest"),
        (remove_preset, "runs/a", "preset.resolved.yaml is missing"),
        (remove_preset, "runs/a/checkpoints/step-000010", "lies outside a run"),
        (spoil_preset, "runs/a", "run runs/a is damaged.*nonsense"),
        (remove_checkpoints, "a", "has no checkpoint yet"),
    ],
)
def test_damaged_runs(runs: Path, spoil: Callable[[Path], None], reference: str, expected: str) -> None:
    run = make_run(runs, "a")
    spoil(run.path)
    with pytest.raises(DataError, match=expected):
        resolve(reference, runs)


def test_the_environment_does_not_change_a_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs, "a")
    write_preset(Path("mine.yaml"))
    monkeypatch.setenv("RTDMD_SET_SAMPLER__ETA", "0.5")
    assert resolve("a", runs).preset.sampler.eta == 0.9
    assert resolve("mine.yaml", runs).preset.sampler.eta == 0.5


def test_guidance_is_refused_for_a_generator_alone(runs: Path) -> None:
    make_run(runs, "a")
    write_preset(Path("mine.yaml"))
    generator, teacher = resolve("a", runs), resolve("mine.yaml", runs)
    for fine in (None, 1.0):
        refuse_guidance(generator, fine)
    refuse_guidance(teacher, 3.0)
    with pytest.raises(UsageError, match="without guidance"):
        refuse_guidance(generator, 3.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read(runs: Path) -> None:
    run = make_run(runs, "a")
    run.path.chmod(0)
    try:
        with pytest.raises(RtdmdError) as caught:
            resolve("runs/a", runs)
        assert caught.value.exit_code == 3
    finally:
        run.path.chmod(0o755)


def test_a_source_is_plain_data(runs: Path) -> None:
    make_run(runs, "a")
    assert isinstance(resolve("a", runs), Source) and resolve("a", runs) == resolve("runs/a", runs)


def test_the_best_checkpoint_is_taken_where_the_run_names_one(runs: Path) -> None:
    run = make_run(runs, "a", (10, 20), stage="tune-reward")
    assert resolve("a", runs).label == "a/step-000020" and resolve("a", runs).notes == ()
    with pytest.raises(UsageError, match="names no best checkpoint"):
        resolve("a", runs, "best")
    run.set_status("finished", best="step-000010")
    for source in (resolve("a", runs), resolve(None, runs), resolve("a", runs, "best")):
        assert source.label == "a/step-000010" and "--checkpoint last" in source.notes[-1]
    assert resolve("a", runs, "last").label == "a/step-000020" and resolve("a", runs, "last").notes == ()
    assert resolve("a", runs, "20").label == "a/step-000020"
    run.set_status("finished", best="step-000020")
    assert resolve("a", runs).label == "a/step-000020" and resolve("a", runs).notes == ()
    for reference, checkpoint, word in (
        ("a", "30", "10, 20"), ("a", "newest", "best, last"), ("shapes-4step", "last", "Leave --checkpoint out"),
        (str(run.checkpoints / "step-000010"), "last", "Leave --checkpoint out"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            resolve(reference, runs, checkpoint)
        assert word in caught.value.hint


def test_a_hub_id_names_the_base_model_of_a_shipped_preset(runs: Path) -> None:
    source = resolve("stabilityai/stable-diffusion-3.5-medium", runs)
    assert source.kind == "teacher" and source.preset.model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert "sd35-4step" in source.notes[0]
    with pytest.raises(UsageError, match="neither a folder nor a model of a shipped preset") as caught:
        resolve("some/model", runs)
    assert "--set model.path=some/model" in caught.value.hint
