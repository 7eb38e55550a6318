"""`rtdmd distill` as a person runs it: real processes on the tiny model, killed, interrupted, resumed.

The runs of `world` are made once; every test looks at what they left behind. One process, "straight", is started from
nothing, and all others are forked (`tests.commands.fork`).
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rtdmd_cli.cli.checking import require_folders
from rtdmd_cli.cli.starting import DISTILL, find_prompts, find_start, load_recipe
from rtdmd_cli.config.loader import Resolved, dump_resolved, load_preset
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint, save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training.restoring import accepted
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.errors import DataError, UsageError
from tests.commands import (
    ENDLESS,
    Done,
    Forked,
    World,
    contents,
    fork,
    launch,
    newest,
    signalled,
    steps,
    timeless,
    wait,
)
from tests.tiny_models import PROMPTS, TEXT_LENGTH, sd3_folder
from tests.tiny_runs import add_checkpoint, generator_weights, make_run

SAVE = 8  # iterations between two checkpoints of most runs
LONG = 3 * SAVE  # iterations of the run that is broken off again and again
SHORT, SHORT_SAVE = SAVE, 6  # of the others


def write_preset(folder: Path) -> None:
    """tiny.yaml and tiny.txt: pictures of 16 px, 4 a batch."""
    (folder / "tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    where = f"family: sd3, path: {sd3_folder()}, resolution: 16, text_length: {TEXT_LENGTH}"
    model = f"{{{where}, guidance: 4.0, teacher_steps: 1}}"
    settings = "batch: 4, fake_per_generator: 2, prompts: tiny.txt, lora: {rank: 2, alpha: 4}"
    steps = "generator_lr: 0.01, fake_lr: 0.01, eps: 0.001"
    rhythm = f"save_every: {SAVE}, keep: 10, log_every: 1, sample_every: 0"
    (folder / "tiny.yaml").write_text(
        f"model: {model}\ndistill: {{{settings}, {steps}, {rhythm}}}\nhardware: {{threads: 1}}\n",
        encoding="utf-8",
    )


def start(folder: Path, *arguments: str) -> Forked:
    return fork(folder, "distill", "--preset", "tiny.yaml", *arguments)


def train(folder: Path, name: str, iterations: int, *arguments: str) -> Done:
    """One process to its end."""
    given = ("--name", name, "--set", f"distill.iterations={iterations}", *arguments)
    return wait(start(folder, *given))


def break_off(
    folder: Path, name: str, number: signal.Signals, when: Callable[[RunFolder], bool], *arguments: str
) -> Done:
    """Start or continue an endless run, and send it a signal as soon as `when` holds."""
    run = RunFolder(folder / "runs" / name)
    process = start(folder, "--name", name, "--set", f"distill.iterations={ENDLESS}", *arguments)
    return signalled(process, run, number, when)


def broken_run(folder: Path) -> dict[str, Done]:
    """The run "broken": ended by SIGTERM, SIGINT, and kill -9 soon after a checkpoint; then finished."""
    run, done = RunFolder(folder / "runs" / "broken"), {}
    done["SIGTERM"] = break_off(folder, "broken", signal.SIGTERM, lambda r: newest(r) >= 1)
    first = newest(run)
    resume = ("--resume", "auto")
    done["SIGINT"] = break_off(folder, "broken", signal.SIGINT, lambda r: newest(r) >= first + 2, *resume)
    saved = steps(run)
    done["SIGKILL"] = break_off(
        folder,
        "broken",
        signal.SIGKILL,
        lambda r: len(steps(r)) > len(saved) and newest(r) >= steps(r)[-1] + 2,
        *resume,
    )
    done["before the kill"] = Done(newest(run), "", "")
    done["broken"] = train(folder, "broken", LONG, *resume)
    return done


def other_runs(folder: Path) -> dict[str, Done]:
    """What is compared with it, and copies of that which are extended, damaged, poisoned."""
    given = ("--preset", "tiny.yaml", "--name", "straight", "--set", f"distill.iterations={LONG}", "--json")
    done = {"straight": wait(launch(folder, "rtdmd_cli", "distill", *given))}
    small = ("--set", "distill.micro_batch=1", "--set", f"distill.save_every={SHORT_SAVE}")
    done["small"] = train(folder, "small", SHORT, *small, "--json", "--quiet")
    runs = folder / "runs"
    shutil.copytree(runs / "straight", runs / "longer")
    done["longer"] = train(folder, "longer", LONG + 2, "--resume", "auto", "--json")
    shutil.copytree(runs / "small", runs / "damaged")
    spoil(runs / "damaged" / "checkpoints" / f"step-{SHORT:06d}" / "fake.safetensors")
    done["damaged"] = train(folder, "damaged", SHORT, *small, "--resume", "auto")
    shutil.copytree(runs / "small", runs / "poisoned")
    poison(runs / "poisoned" / "checkpoints" / f"step-{SHORT:06d}")
    done["poisoned"] = train(folder, "poisoned", SHORT + 4, *small, "--resume", "runs/poisoned")
    return done


def spoil(file: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def poison(path: Path) -> None:
    """Give a checkpoint, otherwise in order, an infinite momentum: the next step makes a weight infinite."""
    loaded = load_checkpoint(path)
    name = min(name for name in loaded.tensors["optimizer_fake"] if name.endswith("exp_avg"))
    loaded.tensors["optimizer_fake"][name].fill_(torch.inf)
    save_checkpoint(path.parent, loaded.step, loaded.tensors, loaded.state, 10, loaded.meta)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("distill")
    write_preset(folder)
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(broken_run, folder), pool.submit(other_runs, folder)]
        yield World(folder, parts[0].result() | parts[1].result())


def state(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "seconds"}


def assert_same_course(world: World, one: str, other: str, step: int) -> None:
    """Byte for byte: adapters, average, optimiser states at `step`, and all lines up to it, but for times."""
    paths = world.checkpoint(one, step), world.checkpoint(other, step)
    tensors = [contents(path, "*.safetensors") for path in paths]
    assert len(tensors[0]) == 5 and tensors[0] == tensors[1]
    assert state(paths[0]) == state(paths[1])
    assert timeless(world.run(one), step) == timeless(world.run(other), step)


def test_a_run_from_start_to_end(world: World) -> None:
    done, run = world.done["straight"], world.run("straight")
    assert done.code == 0, done.err
    result = json.loads(done.out)  # nothing else on stdout
    assert result["run"] == "runs/straight" and result["iterations"] == LONG and result["finished"] is True
    assert result["checkpoint"] == f"runs/straight/checkpoints/step-{LONG:06d}" and result["seconds"] > 0
    assert f"iteration {LONG}/{LONG}" in done.err
    assert [row["iteration"] for row in run.metrics.read()] == list(range(1, LONG + 1))
    assert steps(run) == [SAVE, 2 * SAVE, LONG]
    assert run.status()["state"] == "finished" and run.status()["iteration"] == LONG
    assert (run.samples / f"step-{LONG:06d}.png").is_file() and (run.path / "health.png").is_file()
    assert "</html>" in run.report.read_text(encoding="utf-8")


def test_micro_batches(world: World) -> None:
    """1 x 4 equals 4 x 1; and --quiet leaves stderr empty."""
    done = world.done["small"]
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["iterations"] == SHORT
    for group in ("generator", "fake", "ema"):
        small, whole = (
            load_file(world.checkpoint(name, SHORT) / f"{group}.safetensors")
            for name in ("small", "straight")
        )
        assert small.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-4, msg=f"{group}/{name}")
    for small_row, row in zip(
        timeless(world.run("small")), timeless(world.run("straight"), SHORT), strict=True
    ):
        assert small_row == pytest.approx(row, rel=1e-3, abs=1e-5)


def test_signals_finish_the_iteration_and_save(world: World) -> None:
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        done = world.done[name]
        assert done.code == code, done.err
        assert "--resume runs/broken" in done.err and "Traceback" not in done.err
    assert "continuing runs/broken at iteration" in world.done["SIGINT"].err
    kept = [step for step in steps(world.run("broken")) if step % SAVE]
    assert len(kept) == 2  # saved where the signals came, between the regular ones


def test_resume_is_exact(world: World) -> None:
    """Broken off by two signals and a kill -9, the run ends as the one that ran straight through."""
    killed, done = world.done["SIGKILL"], world.done["broken"]
    assert killed.code == -signal.SIGKILL
    assert done.code == 0, done.err
    saved = max(step for step in steps(world.run("broken")) if step <= world.done["before the kill"].code)
    assert saved < world.done["before the kill"].code < LONG  # lines after the last checkpoint were dropped
    assert f"continuing runs/broken at iteration {saved}" in done.err
    assert_same_course(world, "broken", "straight", LONG)
    assert world.run("broken").status()["state"] == "finished"
    assert "runs/broken" in done.out


def test_a_finished_run_is_extended(world: World) -> None:
    done = world.done["longer"]
    assert done.code == 0, done.err
    assert json.loads(done.out)["iterations"] == LONG + 2
    assert f"continuing runs/longer at iteration {LONG}" in done.err
    assert_same_course(world, "longer", "straight", LONG)
    assert [row["iteration"] for row in world.run("longer").metrics.read()] == list(range(1, LONG + 3))
    before, after = (load_file(world.checkpoint("longer", s) / "fake.safetensors") for s in (LONG, LONG + 2))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert world.run("longer").status()["iteration"] == LONG + 2


def test_a_damaged_checkpoint_is_skipped_aloud(world: World) -> None:
    done = world.done["damaged"]
    assert done.code == 0, done.err
    assert f"skipped the checkpoint step-{SHORT:06d}" in done.err and "fake.safetensors" in done.err
    assert f"continuing runs/damaged at iteration {SHORT_SAVE}" in done.err
    assert_same_course(world, "damaged", "small", SHORT)


def test_a_weight_that_is_not_finite_ends_the_run(world: World) -> None:
    done, run = world.done["poisoned"], world.run("poisoned")
    assert done.code == 5, done.err
    assert "error: The weight fake/transformer_blocks.0." in done.err and "Traceback" not in done.err
    assert f"at iteration {SHORT + 2}." in done.err  # made by the one before
    assert steps(run) == [SHORT_SAVE, SHORT]
    load_checkpoint(world.checkpoint("poisoned", SHORT))  # as it was
    assert run.status()["state"] == "failed" and "The weight fake/" in run.status()["reason"]


def test_refusals(world: World) -> None:
    """Bad input: one sentence and the exit code, nothing on stdout, nothing made or changed."""
    folder, runs = world.folder, world.folder / "runs"
    (folder / "empty.txt").write_text("\n  \n", encoding="utf-8")
    (folder / "latin.txt").write_bytes("a red ring\na blue caf\u00e9\n".encode("latin-1"))
    (folder / "long.txt").write_text(f"a ring\n{'x' * 10_001}\n", encoding="utf-8")
    for name in ("ruined", "foreign"):
        shutil.copytree(runs / "small", runs / name)
    for file in (runs / "ruined").glob("checkpoints/*/ema.safetensors"):
        spoil(file)
    for file in (runs / "foreign").glob("checkpoints/*/manifest.json"):
        file.write_text('{"format": "other"}', encoding="utf-8")
    auto = ("--resume", "auto", "--set", "distill.micro_batch=1", "--name")
    cases = {
        ("--set", "distill.iteration=3"): (2, "distill.iterations"),
        ("--set", "distill.prompts=empty.txt"): (4, "empty.txt"),
        ("--set", "distill.prompts=latin.txt"): (4, "latin.txt, line 2"),
        ("--set", "distill.prompts=long.txt"): (4, "long.txt, line 2"),
        ("--name", "straight"): (2, "--resume auto, or start another run with --name"),
        (*auto, "ruined"): (4, "ema.safetensors is damaged"),
        (*auto, "foreign"): (4, "foreign"),
        (*auto, "small", "--set", "distill.fake_lr=0.5"): (4, "distill.fake_lr was 0.01, now 0.5"),
        ("--resume", "nonsense"): (2, "`nonsense`"),
    }
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda arguments: wait(start(folder, *arguments)), cases)
    for (arguments, (code, text)), done in zip(cases.items(), ended, strict=True):
        assert (done.code, done.out) == (code, ""), (arguments, done)
        assert "error: " in done.err and text in done.err and "Traceback" not in done.err, (
            arguments,
            done.err,
        )
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_dry_run(world: World) -> None:
    """No model is loaded and no folder made; all that would stop the run is said at once, with the run's exit code."""
    absent = ("--set", "model.path=no-such-folder", "--set", "hardware.device=cuda", "--out", "elsewhere")
    fresh = wait(start(world.folder, "--dry-run", "--json", *absent))
    assert fresh.code == 3, fresh.err
    planned = json.loads(fresh.out)
    assert planned["run"] == "elsewhere/tiny" and planned["start"] == 0 and planned["prompts"] == len(PROMPTS)
    assert ["cuda" in planned["findings"][0], "no-such-folder" in planned["findings"][1]] == [True, True]
    assert "cuda" in fresh.err and "no-such-folder" in fresh.err
    good = wait(start(world.folder, "--dry-run", "--json", "--out", "elsewhere"))
    assert good.code == 0 and json.loads(good.out)["findings"] is None
    assert not (world.folder / "elsewhere").exists()


# Where a run starts, without a process for each case.


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs", "mine", (10, 20))


def resolved(run: RunFolder) -> Resolved:
    return load_preset(str(run.preset), environ={})


def found(run: RunFolder, resume: str, name: str | None = None) -> tuple[Path | None, int | None]:
    """The run to continue and the iteration to start at, with `run`'s folder as --out."""
    begin = find_start(resume, run.path.parent, name, name or "mine", resolved(run), "", False, DISTILL)
    return (begin.run.path if begin.run else None, begin.checkpoint.step if begin.checkpoint else None)


def test_where_a_run_starts(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    newest, older = (str(run.checkpoints / f"step-0000{step}") for step in (20, 10))
    for reference in ("auto", "mine", str(run.path), newest, "runs/mine/checkpoints/step-000020"):
        assert found(run, reference) == (run.path, 20) or reference.startswith("runs/")
    assert found(run, "mine", name="mine") == (run.path, 20)
    assert found(run, "auto", name="new") == (None, None)
    assert found(run, "never", name="new") == (None, None)
    for reference, step in (("mine", 20), (newest, 20), (older, 10)):
        assert found(run, reference, name="new") == (None, step)
    outside = shutil.copytree(older, tmp_path / "step-000010")
    assert found(run, str(outside), name="new") == (None, 10)


def test_where_no_run_starts(run: RunFolder, tmp_path: Path) -> None:
    older = str(run.checkpoints / "step-000010")
    outside = str(shutil.copytree(older, tmp_path / "step-000010"))
    for reference, name in ((older, None), (outside, None), ("never", None), (older, "mine"), ("else", None)):
        with pytest.raises(UsageError):
            found(run, reference, name)
    (tmp_path / "runs" / "full").mkdir()
    (tmp_path / "runs" / "full" / "a.txt").touch()
    for reference in ("auto", "never", "mine"):
        with pytest.raises(UsageError, match="not empty"):
            found(run, reference, "full")


def test_a_run_without_checkpoints_starts_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = make_run(tmp_path / "runs", "mine", ())
    assert found(bare, "auto") == (bare.path, None)
    assert "starts from the beginning" in capsys.readouterr().err
    with pytest.raises(DataError, match="no checkpoint"):
        found(bare, "mine", name="new")


def test_checkpoints_of_others(run: RunFolder) -> None:
    tensors = {"ema": generator_weights(1)}
    save_checkpoint(run.checkpoints, 30, tensors, {"stage": "tune-reward"}, 9, {})
    with pytest.raises(DataError, match="not made by rtdmd distill"):
        found(run, "auto")


def test_other_precision_is_refused_unless_allowed(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value, before in (("base", "nf4", "plain"), ("mixed_precision", "bf16", "none")):
        now = load_preset(str(run.preset), [f"hardware.{key}={value}"], {})

        def begin(*allow: str, preset: Resolved = now) -> Start:
            return find_start("auto", run.path.parent, None, "mine", preset, "", False, DISTILL, allow)

        told = f"other precision settings: hardware.{key} was {before}, now {value}"
        with pytest.raises(DataError, match=told) as caught:
            begin()
        assert f"--allow-change hardware.{key}" in caught.value.hint
        with pytest.raises(UsageError, match="does not take `distill.lr`"):
            begin("distill.lr")
        capsys.readouterr()
        allowed = begin(f"hardware.{key}")
        assert allowed.changes == ((f"hardware.{key}", before, value),)
        assert f"allowed: hardware.{key} was {before}, now {value}" in capsys.readouterr().err
    run.note_changes(allowed.changes, 20)
    told_there = json.loads((run.path / "environment.json").read_text())["changes"]
    assert told_there == [
        {"iteration": 20, "key": "hardware.mixed_precision", "before": "none", "now": "bf16"}
    ]
    assert "from iteration 20 on hardware.mixed_precision is bf16" in (run.path / "log.txt").read_text()


def test_another_dtype_that_auto_brings_is_refused_unless_allowed(run: RunFolder) -> None:
    path = add_checkpoint(run, 30, generator_weights(1))
    made = replace(load_checkpoint(path), meta={"dtype": "bfloat16"})
    assert accepted(Start(run, made), torch.bfloat16).changes == ()
    with pytest.raises(DataError, match="in bfloat16, now it is in float32") as caught:
        accepted(Start(run, made), torch.float32)
    assert "--allow-change hardware.dtype" in caught.value.hint
    allowed = accepted(Start(run, made, frozenset(["hardware.dtype"])), torch.float32)
    assert allowed.changes == (("hardware.dtype", "bfloat16", "float32"),)


def test_a_run_whose_files_were_moved_says_what_it_looks_for(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command; and the run goes on with the new place, where the contents are compared as ever."""
    base, prompts = Path(shutil.copytree(sd3_folder(), tmp_path / "base")), tmp_path / "train.txt"
    prompts.write_text("a red ring\n")
    settings = [f"model.path={base}", f"distill.prompts={prompts}"]
    run.preset.write_text(dump_resolved(load_preset(str(run.preset), settings, {}).preset))
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"made with model.path {base}, where nothing is") as caught:
        resolve(str(run.path), run.path.parent)
    assert f"new place into {run.preset}" in caught.value.hint
    with pytest.raises(DataError, match=f"no model folder {base}") as caught:
        require_folders(resolved(run).preset.model)
    assert "--set model.path=PATH" in caught.value.hint
    prompts.unlink()
    with pytest.raises(DataError, match=f"no prompt file {prompts}") as caught:
        find_prompts(str(prompts), False, "distill.prompts")
    assert "--set distill.prompts=PATH" in caught.value.hint
    now = load_preset(str(run.preset), [f"model.path={moved}"], {})
    begun = find_start("auto", run.path.parent, None, "mine", now, "", False, DISTILL)
    assert begun.changes == (("model.path", str(base), str(moved)),)
    assert f"moved: model.path was {base}, now {moved}" in capsys.readouterr().err
    base.mkdir()
    with pytest.raises(DataError, match="other settings: model.path was"):
        find_start("auto", run.path.parent, None, "mine", now, "", False, DISTILL)


def test_a_run_whose_preset_is_gone_says_how_it_goes_on(run: RunFolder, tmp_path: Path) -> None:
    newest, wanted = run.checkpoints / "step-000020", resolved(run)
    run.preset.unlink()

    def begin(resume: str, name: str | None = None) -> Start:
        return find_start(resume, run.path.parent, name, name or "mine", wanted, None, True, DISTILL)

    for reference in ("auto", "mine", str(run.path)):
        with pytest.raises(DataError, match=r"mine is damaged: preset\.resolved\.yaml is missing") as caught:
            begin(reference)
        assert caught.value.hint.endswith(f"--resume {newest} --name OTHER")
    started = begin(str(newest), "other")
    assert started.run is None and started.checkpoint is not None and started.checkpoint.step == 20
    shutil.rmtree(run.checkpoints)
    with pytest.raises(DataError) as caught:
        begin("auto")
    assert caught.value.hint.endswith("leave --resume out")


def test_a_preset_file_that_is_gone_is_found_in_the_run(run: RunFolder, tmp_path: Path) -> None:
    out, gone = run.path.parent, str(tmp_path / "gone.yaml")
    for reference in ("auto", "mine", str(run.path), str(run.checkpoints / "step-000010")):
        with pytest.raises(UsageError, match="There is no preset file") as caught:
            load_recipe(gone, [], reference, out, "mine")
        assert caught.value.hint == f"The run has a copy of its own: --preset {run.preset}"
    for reference, name in (("never", "mine"), ("auto", "other")):
        with pytest.raises(UsageError, match="There is no preset file") as caught:
            load_recipe(gone, [], reference, out, name)
        assert "rtdmd presets list" in caught.value.hint
    again = load_recipe(str(run.preset), ["distill.iterations=3"], "auto", out, "mine")
    assert again.preset.distill.iterations == 3
    own = str(run.preset)
    run.preset.unlink()
    with pytest.raises(DataError, match="is damaged"):
        load_recipe(own, [], "auto", out, "mine")


def test_a_damaged_preset_in_the_run(run: RunFolder) -> None:
    preset = resolved(run)
    run.preset.write_text("model: [", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        find_start("auto", run.path.parent, None, "mine", preset, "", False, DISTILL)


def test_a_full_memory_advises_settings_with_which_the_run_goes_on(run: RunFolder) -> None:
    """Neither another optimiser nor both formats of the base, and with it the option that allows it."""
    own = load_preset(str(run.preset), ["distill.boundaries=every", "distill.boundaries_batched=true"], {})
    run.preset.write_text(dump_resolved(own.preset))
    words = shlex.split(memory.hint(own.preset, "distill").partition("--resume and ")[2].partition(";")[0])
    given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    allow = [words[i + 1] for i, word in enumerate(words) if word == "--allow-change"]
    assert [each.partition("=")[0] for each in given] == [
        *("hardware.vae_tiling", "hardware.gradient_checkpointing", "distill.boundaries_batched"),
        "hardware.base",
    ]
    now = load_preset(str(run.preset), given, {})
    started = find_start("auto", run.path.parent, None, "mine", now, None, True, DISTILL, allow)
    assert started.run is not None and [key for key, *_ in started.changes] == ["hardware.base"]
    with pytest.raises(DataError, match="other precision settings"):
        find_start("auto", run.path.parent, None, "mine", now, None, True, DISTILL)


def test_a_run_that_met_nan_goes_on_at_lower_rates_in_a_run_of_its_own(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    gentle = ["distill.generator_lr=1e-6", "distill.grad_clip=0.5", "distill.lr_warmup=10"]
    now, out = load_preset(str(run.preset), gentle, {}), run.path.parent
    started = find_start(str(run.path), out, "gentle", "gentle", now, None, False, DISTILL)
    assert started.run is None and started.checkpoint is not None and started.checkpoint.once
    assert {key for key, *_ in started.changes} == {each.partition("=")[0] for each in gentle}
    assert "allowed: distill.generator_lr was" in capsys.readouterr().err
    for name in (None, "mine"):
        with pytest.raises(DataError, match="other settings") as caught:
            find_start("auto", out, name, "mine", now, None, True, DISTILL)
        assert caught.value.hint == "Go on from its checkpoint in a run of its own: add --name OTHER."
    other = load_preset(str(run.preset), [*gentle, "distill.batch=3"], {})
    with pytest.raises(DataError, match="other settings: distill.batch was") as caught:
        find_start(str(run.path), out, "gentle", "gentle", other, None, True, DISTILL)
    again = f"rtdmd distill --preset {run.preset} --resume {run.path}"
    assert again in caught.value.hint and "--name OTHER, without --resume" in caught.value.hint
