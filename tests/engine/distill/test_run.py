"""What surrounds the recipe: checkpoints that don't fit, runs made from another run's checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rtdmd_cli.config.loader import Resolved, preset_sha256
from rtdmd_cli.config.previews import PreviewsConfig
from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.common import PipelineBackbone
from rtdmd_cli.engine.compute import device, signals
from rtdmd_cli.engine.distill import run as distill_run
from rtdmd_cli.engine.distill.run import STAGE, build_trainer, run_distill
from rtdmd_cli.engine.prompts import embeddings
from rtdmd_cli.engine.prompts.ahead import AheadEncoder
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by
from rtdmd_cli.engine.report import viewer_data
from rtdmd_cli.engine.report.metrics import explained
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, load_checkpoint, newest_valid, save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training import closing, health, loop, trackers
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.health import Points
from rtdmd_cli.engine.training.previews import Previews
from rtdmd_cli.engine.training.restoring import restore
from rtdmd_cli.engine.training.session import Outcome, Session
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.errors import DataError, EnvironmentFailure, PictureFailure, UsageError
from tests.tiny_models import PROMPTS, TEXT_LENGTH, load_sd3, sd3_config


def preset(**values: Any) -> Preset:
    config: dict[str, Any] = {
        "iterations": 2,
        "batch": 1,
        "fake_per_generator": 1,
        "lora": LoraConfig(rank=2, alpha=4),
    }
    return Preset(name="tiny", model=sd3_config(), distill=DistillConfig(**(config | values)))


def run(
    out: Path,
    name: str,
    start: Start,
    hardware: HardwareConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
    previews: PreviewsConfig | None = None,
    **values: Any,
) -> Outcome:
    own = {"hardware": hardware or HardwareConfig(), "previews": previews or PreviewsConfig()}
    chosen = preset(**values).model_copy(update=own)
    resolved = Resolved(chosen, {}, preset_sha256(chosen))
    return run_distill(
        resolved,
        PromptSet(PROMPTS, [{}] * len(PROMPTS)),
        start,
        out,
        name,
        ["rtdmd"],
        say,
        True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two iterations. The test process has its own cache of encoded prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTDMD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run(tmp_path_factory.mktemp("runs"), "first", Start(None, None))


def test_a_new_run_from_anothers_checkpoint(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    begin = load_checkpoint(finished.checkpoint)
    outcome = run(tmp_path, "second", Start(None, begin))  # with nothing left to do
    assert outcome.iterations == 2 and outcome.checkpoint.parent.parent == tmp_path / "second"
    copy = load_checkpoint(outcome.checkpoint)
    assert begin.meta["prompts_sha256"] == known_by(PromptSet(PROMPTS, [{}] * len(PROMPTS)))
    assert copy.state == begin.state and copy.step == 2
    given_up = load_checkpoint(finished.checkpoint, once=True)
    run(tmp_path, "third", Start(None, given_up))
    assert not given_up.tensors and begin.tensors, (
        "a command's own lies in memory no longer than it is of use"
    )
    for group, tensors in begin.tensors.items():
        assert all(torch.equal(copy.tensors[group][name], tensor) for name, tensor in tensors.items())


def test_a_run_that_another_process_has_continued(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    began = run(tmp_path, "first", Start(None, None), iterations=1, save_every=1)
    chosen = Start(RunFolder(began.run), load_checkpoint(began.checkpoint))
    run(tmp_path, "first", chosen, iterations=2)
    with pytest.raises(UsageError, match="continued by another process"):
        run(tmp_path, "first", chosen, iterations=3)
    assert [row["iteration"] for row in RunFolder(began.run).metrics.read()] == [0, 1, 2]


def test_a_start_that_fails_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    runs = tmp_path / "runs"

    def fail(*given: object) -> None:
        assert (runs / "first" / "report.html").is_file()  # there from the first minute
        raise EnvironmentFailure("No memory is left.")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "make_previews", fail)
        with pytest.raises(EnvironmentFailure, match="No memory"):
            run(runs, "first", Start(None, None))
    assert list(runs.iterdir()) == []
    absent = HardwareConfig(tracker="trackio")
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "find_spec", lambda name: None)
        with pytest.raises(EnvironmentFailure, match="tracker trackio is not installed") as caught:
            run(runs, "first", Start(None, None), absent)
    assert "rtdmd[trackio]" in caught.value.hint and list(runs.iterdir()) == []
    assert run(runs, "first", Start(None, None)).iterations == 2


def test_a_run_that_is_stopped_at_once_in_its_first_pictures_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two signals before anything was trained: status and report agree, and the run can be taken up."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signals, "APART", 0.0)
    made = RunFolder(tmp_path / "first")

    def twice(*given: object) -> None:
        assert "The run is under way" in made.report.read_text("utf-8")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped) as stopped:
        patch.setattr(pictures, "make_previews", twice)
        run(tmp_path, "first", Start(None, None))
    assert stopped.value.at_once and made.status()["state"] == "interrupted"
    page = made.report.read_text("utf-8")
    assert "The run was interrupted: <strong>0 of 2</strong>" in page and "<script" not in page
    assert run(tmp_path, "first", Start(made, None)).iterations == 2


def test_the_report_lives_and_then_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with own prompts and two seeds: the grid before training, single pictures, and what the page says."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    chosen = preset(iterations=3, save_every=1, sample_every=2).model_copy(
        update={"previews": PreviewsConfig(prompts=("<b>one</b>", "two"), seeds=(5, 6))}
    )
    pages: list[str] = []
    folder = tmp_path / "runs" / "mine"
    advance = distill_run.iterate

    def look(trainer: Trainer, iteration: int) -> None:
        pages.append((folder / "report.html").read_text("utf-8"))
        advance(trainer, iteration)

    monkeypatch.setattr(distill_run, "iterate", look)
    prompts = PromptSet(PROMPTS, [{}] * len(PROMPTS))
    resolved = Resolved(chosen, {}, preset_sha256(chosen))
    run_distill(
        resolved, prompts, Start(None, None), tmp_path / "runs", "mine", ["rtdmd"], lambda text: None, True
    )
    assert len(pages) == 3 and all("The run goes on" in page and "location.reload" in page for page in pages)
    first, second = (page.partition('id="live"')[2].partition("Written")[0] for page in pages[:2])
    assert " left" not in first and " left" in second
    last = (folder / "report.html").read_text("utf-8")
    assert "<script" not in last and "The run finished" in last
    assert "before training: teacher" in pages[0] and "before training: teacher" in last
    grids = sorted(path.name for path in (folder / "samples").glob("*.png"))
    assert grids == ["step-000000.png", "step-000002.png", "step-000003.png"]
    sheet = viewer_data.pictures(RunFolder(folder))
    assert [(each["prompt"], each["seed"]) for each in sheet["columns"]] == [
        ("<b>one</b>", 5), ("<b>one</b>", 6), ("two", 5), ("two", 6)
    ]  # fmt: skip
    assert sheet["references"] == ["teacher", "few-step-teacher"]
    assert sheet["steps"] == ["step-000000", "step-000002", "step-000003"]
    assert all(len(files) == 4 for files in sheet["files"].values())
    names = {name for row in RunFolder(folder).metrics.read() for name in row} - {"iteration"}
    assert {name for name in names if not explained(name)} == set()
    assert {"lag", "learning_rate/generator", "iterations_per_second"} <= names


def without(checkpoint: Checkpoint, group: str, name: str | None = None) -> Checkpoint:
    tensors = {key: dict(value) for key, value in checkpoint.tensors.items()}
    if name is None:
        del tensors[group]
    else:
        del tensors[group][name]
    return replace(checkpoint, tensors=tensors)


def test_checkpoints_that_do_not_fit(finished: Outcome) -> None:
    """DataError for another base model, and for every group or tensor that is missing."""
    backbone = load_sd3()
    cond = backbone.encode(PROMPTS)
    trainer = build_trainer(backbone, preset(), len(PROMPTS), cond.select, cond.select([0]))
    good = load_checkpoint(finished.checkpoint)
    bad = [without(good, group) for group in good.tensors]
    bad += [without(good, group, min(tensors)) for group, tensors in good.tensors.items()]
    bad += [replace(good, meta=good.meta | {"base_hash": "other"})]
    bad += [replace(good, state={k: v for k, v in good.state.items() if k != "generator_updates"})]
    for checkpoint in bad:
        with pytest.raises(DataError):
            restore(trainer, checkpoint, STAGE)
    restore(trainer, good, STAGE)
    assert trainer.generator_updates == 2
    assert all(torch.equal(trainer.ema[name], tensor) for name, tensor in good.tensors["ema"].items())


def test_a_new_run_is_not_made_for_a_checkpoint_that_does_not_fit(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    partial = {"ema": load_checkpoint(finished.checkpoint).tensors["ema"]}
    path = save_checkpoint(tmp_path / "other", 1, partial, {"stage": "distill"}, 1, {})
    with pytest.raises(DataError, match="no full checkpoint"):
        run(tmp_path / "runs", "second", Start(None, load_checkpoint(path)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place", ["auto", "cpu"])
def test_a_cache_too_small_for_the_prompts_changes_nothing(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Two of four prompts fit: they are encoded ahead, iteration after iteration."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    row = 4 * ((12 + TEXT_LENGTH) * 40 + 20)
    said: list[str] = []
    hardware = HardwareConfig(cache_gb=(1024 + 2.5 * (row + 128)) / 1e9, text_encoder=place)
    progress = loop.training_progress

    def shown(*given: Any) -> Any:
        said.append("progress")
        return progress(*given)

    monkeypatch.setattr(loop, "training_progress", shown)
    outcome = run(tmp_path, "small", Start(None, None), hardware, said.append)
    assert any("takes 2 at a time" in line for line in said)
    (first,) = [place for place, line in enumerate(said) if "of the iterations 1 to" in line]
    assert first < said.index("progress"), "what the first encoding takes is no part of the estimate"
    plenty, few = load_checkpoint(finished.checkpoint), load_checkpoint(outcome.checkpoint)
    for group, tensors in plenty.tensors.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(few.tensors[group][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_signal_while_prompts_are_encoded_ahead_saves_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a window of prompts can take hours: no further block is encoded, and the run can be taken up."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embeddings, "BLOCK", 1)
    small = HardwareConfig(cache_gb=(1024 + 2.5 * (4 * ((12 + TEXT_LENGTH) * 40 + 20) + 128)) / 1e9)
    prepare, encode, encoded, trained = AheadEncoder.prepare, PipelineBackbone.encode_in_parts, [0], [0]

    def watched(self: AheadEncoder, *given: Any) -> bool:
        encoded[0] = 0
        return prepare(self, *given)

    def signalling(self: PipelineBackbone, *given: Any) -> Any:
        encoded[0] += 1
        if trained[0] and not encoded[1:]:
            encoded.append(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, *given)

    def advance(session: Session) -> None:
        real(session)
        trained[0] += 1

    real = loop.advance
    monkeypatch.setattr(loop, "advance", advance)
    with monkeypatch.context() as patch:
        patch.setattr(AheadEncoder, "prepare", watched)
        patch.setattr(PipelineBackbone, "encode_in_parts", signalling)
        outcome = run(tmp_path, "first", Start(None, None), small, iterations=8, batch=2, sample_every=0)
    assert encoded == [1, 0] and 0 < outcome.iterations == trained[0] < 8
    assert outcome.checkpoint.name == f"step-{outcome.iterations:06d}"
    again = Start(RunFolder(outcome.run), load_checkpoint(outcome.checkpoint))
    assert run(tmp_path, "first", again, small, iterations=8, batch=2, sample_every=0).iterations == 8


def test_a_signal_before_the_first_iteration_draws_no_pictures_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    small = HardwareConfig(cache_gb=(1024 + 2.5 * (4 * ((12 + TEXT_LENGTH) * 40 + 20) + 128)) / 1e9)
    prepare = AheadEncoder.prepare

    def signalled(self: AheadEncoder, *given: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, *given)

    monkeypatch.setattr(AheadEncoder, "prepare", signalled)
    said: list[str] = []
    outcome = run(tmp_path, "first", Start(None, None), small, said.append)
    assert (outcome.iterations, outcome.signal_exit_code) == (0, 143)
    assert not any("pictures before training" in line for line in said)


def test_a_run_goes_on_with_what_a_full_memory_advises(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a copy of the run: the adapters and the optimiser's states on a base in 8 bits."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    folder = RunFolder(shutil.copytree(finished.run, tmp_path / "first"))
    saving = HardwareConfig(base="int8", gradient_checkpointing=True, vae_tiling=True)
    change = ("hardware.base", "plain", "int8")
    start = Start(folder, newest_loaded(folder), frozenset({"hardware.base"}), (change,))
    assert run(tmp_path, "first", start, saving, iterations=3).iterations == 3


def newest_loaded(folder: RunFolder) -> Checkpoint:
    newest, _ = newest_valid(folder.checkpoints)
    assert newest is not None
    return load_checkpoint(newest)


def break_pictures(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The VAE gives nan from its call number `after` on, as one in half precision may."""
    real, calls = PipelineBackbone.pictures, [0]

    def pictures(self: PipelineBackbone, vae_latents: Tensor) -> Tensor:
        calls[0] += 1
        return real(self, vae_latents) * (1.0 if calls[0] <= after else float("nan"))

    monkeypatch.setattr(PipelineBackbone, "pictures", pictures)


def test_pictures_that_are_not_finite_cost_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last grid, in one on the way, before the training (which leaves no folder), and when a finished run is
    continued."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    found = {}
    for name, after, sample_every in (("last", 1, 0), ("middle", 3, 1), ("first", 0, 0)):
        with monkeypatch.context() as patch:
            break_pictures(patch, after)
            with pytest.raises(PictureFailure, match="not finite: the VAE's, of finite latents") as caught:
                run(tmp_path, name, Start(None, None), sample_every=sample_every)
        assert caught.value.exit_code == 5 and "fp32" in caught.value.hint
        one = RunFolder(tmp_path / name)
        if not one.path.exists():
            continue
        status = one.status()
        newest, _ = newest_valid(one.checkpoints)
        assert "the VAE's" in status["reason"]
        found[name] = (status["state"], status["iteration"], newest.name if newest else None)
    assert found == {
        "last": ("finished", 2, "step-000002"),
        "middle": ("failed", 1, "step-000001"),
    }
    folder = RunFolder(tmp_path / "last")
    again = Start(folder, load_checkpoint(folder.checkpoints / "step-000002"))
    with monkeypatch.context() as patch, pytest.raises(PictureFailure):
        break_pictures(patch, 0)
        run(tmp_path, "last", again)
    assert (folder.status()["state"], folder.status()["iteration"]) == ("finished", 2)
    run(tmp_path, "last", again)  # in float32, say
    assert folder.report.is_file() and "reason" not in folder.status()


def test_full_memory_in_a_grid_draws_it_in_smaller_parts_or_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only one picture at a time fits: the same grid. Not even one: a checkpoint of the last iteration."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    own = PreviewsConfig(prompts=("a ring",), seeds=(1, 2))
    whole = run(tmp_path, "whole", Start(None, None), previews=own, iterations=1).run
    real, most = PipelineBackbone.pictures, [1]

    def pictures(self: PipelineBackbone, vae_latents: Tensor) -> Tensor:
        if len(vae_latents) > most[0]:
            raise RuntimeError("CUDA error: out of memory")
        return real(self, vae_latents)

    monkeypatch.setattr(PipelineBackbone, "pictures", pictures)
    device._tell.cache_clear()
    parts = run(tmp_path, "parts", Start(None, None), previews=own, iterations=1).run
    grids = [
        [np.array(Image.open(path)) for path in sorted(each.glob("samples/*.png"))] for each in (whole, parts)
    ]
    assert len(grids[0]) == len(grids[1]) > 0
    assert caplog.text.count("pictures are taken 1 at a time") == 1  # of several grids
    for one, other in zip(*grids, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    begin = loop.begin

    def full_from_now_on(session: Session) -> None:
        begin(session)
        most[0] = 0

    monkeypatch.setattr(loop, "begin", full_from_now_on)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, "full", Start(None, None), previews=own, sample_every=1)
    full = RunFolder(tmp_path / "full")
    newest, _ = newest_valid(full.checkpoints)
    assert newest is not None and newest.name == "step-000001"
    assert (full.status()["state"], full.status()["iteration"]) == ("failed", 1)


def test_what_a_signal_would_say_while_a_run_trains(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the iteration where its line is shown, of the end where that is: never of loading, which is long over."""
    seen: list[str] = []

    @contextmanager
    def progress(total: int, done: int, silent: bool) -> Iterator[Callable[[int, Any], None]]:
        yield lambda iteration, figures: seen.append(signals._running[-1].ending)

    def say(text: str) -> None:
        if text == closing.LAST_WORK:
            seen.append(signals._running[-1].ending)

    monkeypatch.setattr(loop, "training_progress", progress)
    run(tmp_path, "told", Start(None, None), say=say)
    first, second, last = seen
    assert first == "finishing this iteration" and second.startswith("finishing this iteration (about ")
    assert last == closing.LAST_WORK


def test_a_signal_that_asks_for_a_checkpoint_gets_one_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 in the first of four iterations, two of which are saved anyway."""
    said: list[str] = []

    def asking(session: Session) -> None:
        if session.iteration == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(session)

    real = loop.advance
    monkeypatch.setattr(loop, "advance", asking)
    outcome = run(tmp_path, "asked", Start(None, None), say=said.append, iterations=4, save_every=2)
    kept = sorted(path.name for path in (outcome.run / "checkpoints").glob("step-*"))
    assert outcome.iterations == 4 and kept == ["step-000001", "step-000002", "step-000004"]
    assert sum(line.startswith("SIGUSR1: the last checkpoint") for line in said) == 1


def test_the_health_of_a_step_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the figures of the last grid and for the panel beside it."""
    drawn: list[int] = []

    def counting(previews: Previews) -> Points:
        drawn.append(1)
        return real(previews)

    real = health.points
    monkeypatch.setattr(health, "points", counting)
    outcome = run(tmp_path, "healthy", Start(None, None), sample_every=1)
    rows = RunFolder(outcome.run).metrics.read()
    assert (
        len(drawn) == len([row for row in rows if "lag" in row]) == 3
    )  # before training, and after each iteration
    assert (outcome.run / "health.png").is_file() and rows[1]["lag"] != rows[2]["lag"]
