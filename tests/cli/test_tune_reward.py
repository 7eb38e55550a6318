"""`rtdmd tune-reward` as a person runs it, on the tiny model with the CLIPs of the shapes world.

The processes of `world` are made once: "straight" is started from nothing, the others are forked
(`tests.commands.fork`). Mistakes are tried in this process, as they load no model.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rtdmd_cli.cli import app
from rtdmd_cli.cli.tune_reward import result
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.prompts.reading import known_by, read_prompt_set
from rtdmd_cli.engine.rewards import registry
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint, save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.session import Outcome
from tests.commands import (
    ENDLESS,
    Done,
    World,
    as_overrides,
    contents,
    fork,
    launch,
    newest,
    signalled,
    steps,
    timeless,
    wait,
)
from tests.tiny_models import PROMPTS
from tests.tiny_runs import add_checkpoint, generator_weights, make_run
from tests.tiny_tuning import find

TRAINED, JUDGE = "shapes-clip", "shapes-clip-heldout"
STAGE_1 = "checkpoints/step-000010"
SAVE = 3  # epochs between two checkpoints
LONG = 10  # epochs of the run that is broken off
SHORT = SAVE
RECIPE = {
    "prompts": "tiny.txt",
    "images_per_epoch": 8,
    "images_per_prompt": 4,
    "lora.rank": 2,
    "lora.alpha": 2,
    "generator_lr": 0.01,
    "fake_lr": 0.01,
    "held_out": f"[{JUDGE}]",
    "save_every": SAVE,
    "keep": 10,
    "sample_every": 0,
    "eval_images": 2,
}
SETTINGS = as_overrides("tune_reward", RECIPE)
SETTINGS += ["--set", "distill.eps=0.001", "--set", "hardware.threads=1", "--reward", TRAINED]


def tune(name: str, epochs: int) -> tuple[str, ...]:
    """The command line of a run."""
    return ("tune-reward", "--name", name, "--set", f"tune_reward.epochs={epochs}", *SETTINGS)


def break_off(
    folder: Path, number: signal.Signals, when: Callable[[RunFolder], bool], *arguments: str
) -> Done:
    """Start or continue the endless run "broken", and send it a signal as soon as `when` holds."""
    run = RunFolder(folder / "runs" / "broken")
    process = fork(folder, *tune("broken", ENDLESS), *arguments)
    return signalled(process, run, number, when)


def broken_run(folder: Path) -> dict[str, Done]:
    """The run "broken": ended by SIGTERM, then by kill -9 between two checkpoints; then finished."""
    run, done = RunFolder(folder / "runs" / "broken"), {}
    done["SIGTERM"] = break_off(folder, signal.SIGTERM, lambda r: newest(r) >= 1)
    saved = steps(run)
    done["SIGKILL"] = break_off(
        folder,
        signal.SIGKILL,
        lambda r: len(steps(r)) > len(saved) and newest(r) >= steps(r)[-1] + 1,
        *("--resume", "auto"),
    )
    done["before the kill"] = Done(newest(run), "", "")
    done["broken"] = wait(fork(folder, *tune("broken", LONG), "--resume", "auto"))
    return done


def other_runs(folder: Path) -> dict[str, Done]:
    """What is compared with it."""
    done = {"straight": wait(launch(folder, "rtdmd_cli", *tune("straight", LONG), "--json"))}
    small = ("--set", "tune_reward.micro_batch=1", "--set", "tune_reward.rewards_in_memory=one", "--quiet")
    done["small"] = wait(fork(folder, *tune("small", SHORT), *small))
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    make_run(folder / "runs", "first")
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(broken_run, folder), pool.submit(other_runs, folder)]
        yield World(folder, parts[0].result() | parts[1].result())


def test_a_run_from_start_to_end(world: World) -> None:
    done, run = world.done["straight"], world.run("straight")
    assert done.code == 0, done.err
    result = json.loads(done.out)  # nothing else on stdout
    assert result["run"] == "runs/straight" and result["epochs"] == LONG and result["finished"] is True
    assert result["checkpoint"] == f"runs/straight/checkpoints/step-{LONG:06d}" and result["seconds"] > 0
    assert list(result["rewards"]) == [JUDGE, TRAINED]
    for name, figures in result["rewards"].items():
        assert figures.keys() == {"before", "after", "trained_on"}
        assert figures["trained_on"] is (name == TRAINED)
        assert -1 <= figures["before"] <= 1 and figures["before"] != figures["after"]
    assert "from runs/first, step-000010" in done.err and f"{LONG}/{LONG}" in done.err
    assert "rtdmd sample" in done.err and "Traceback" not in done.err
    assert [row["iteration"] for row in run.metrics.read()] == list(range(1, LONG + 1))
    assert steps(run) == [3, 6, 9, LONG]
    assert (run.stage, run.status()["state"]) == ("tune-reward", "finished")
    assert (run.samples / f"step-{LONG:06d}.png").is_file() and (run.path / "health.png").is_file()
    page = run.report.read_text(encoding="utf-8")
    assert page.index(f"{JUDGE} went from") < page.index(f"{TRAINED} (trained on)")


def test_resume_is_exact(world: World) -> None:
    """Ended by SIGTERM and by kill -9, the run ends as the one that ran straight through."""
    term, killed, done = (world.done[name] for name in ("SIGTERM", "SIGKILL", "broken"))
    assert term.code == 143 and "--resume runs/broken" in term.err and "Traceback" not in term.err
    assert killed.code == -signal.SIGKILL and "continuing runs/broken at iteration" in killed.err
    assert done.code == 0, done.err
    saved = max(step for step in steps(world.run("broken")) if step <= world.done["before the kill"].code)
    assert saved < world.done["before the kill"].code < LONG  # lines after the last checkpoint were dropped
    assert f"continuing runs/broken at iteration {saved}" in done.err
    paths = [world.checkpoint(name, LONG) for name in ("broken", "straight")]
    tensors = [contents(path, "*.safetensors") for path in paths]
    assert len(tensors[0]) == 7 and tensors[0] == tensors[1]
    states = [load_checkpoint(path).state for path in paths]
    assert all(state.pop("seconds") > 0 for state in states) and states[0] == states[1]
    assert timeless(world.run("broken")) == timeless(world.run("straight"))
    assert world.run("broken").status()["state"] == "finished"


def test_micro_batches(world: World) -> None:
    """1 x 8 equals 8 x 1, also with the rewards loaded anew; and --quiet leaves stderr to the libraries."""
    done = world.done["small"]
    assert done.code == 0 and "model " not in done.err and "rtdmd" not in done.err
    for group in ("generator", "fake", "ema"):
        small, whole = (
            load_file(world.checkpoint(name, SHORT) / f"{group}.safetensors")
            for name in ("small", "straight")
        )
        assert small.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-3, msg=f"{group}/{name}")
    for small_row, row in zip(
        timeless(world.run("small")), timeless(world.run("straight"), SHORT), strict=True
    ):
        assert small_row.pop("drift") < 1e-5 and row.pop("drift") < 1e-5
        assert small_row == pytest.approx(row, rel=5e-3, abs=1e-4)


# --- in this process

Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """The program on some arguments."""
    threads = torch.get_num_threads()

    def called(*arguments: str) -> Done:
        capsys.readouterr()
        code = app.main(list(arguments))
        return Done(code, *capsys.readouterr())

    yield called
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with prompts and a stage-1 run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    Path("tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    make_run(Path("runs"), "first")
    return tmp_path


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_tuned_run_is_sampled(world: World, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("RTDMD_CACHE", str(world.folder / "cache"))
    pictures = []
    for name in ("straight", "broken", "first"):
        done = call("sample", "a red ring", "--from", name, "--out", f"pictures-{name}")
        assert done.code == 0, done.err
        pictures.append(Path(done.out.strip()).read_bytes())
    straight, broken, first = (data[-2000:] for data in pictures)
    assert straight == broken != first


def test_the_newest_finished_distill_run_is_taken(folder: Path, call: Call) -> None:
    make_run(Path("runs"), "another")
    make_run(Path("runs"), "tuned", stage="tune-reward")
    make_run(Path("runs"), "unfinished", state="running")
    before = snapshot(folder)
    done = call("tune-reward", *SETTINGS, "--dry-run", "--json")
    assert done.code == 0, done.err
    planned = json.loads(done.out)
    assert planned["from"] == "runs/another/checkpoints/step-000010"
    assert planned["run"] == "runs/another-tuned" and planned["start"] == 0
    assert (planned["rewards"], planned["held_out"], planned["prompts"]) == (TRAINED, JUDGE, len(PROMPTS))
    assert (planned["images_per_epoch"], planned["micro_batch"]) == (8, 8)
    named = json.loads(call("tune-reward", *SETTINGS, "--from", "first", "--dry-run", "--json").out)
    assert named["run"] == "runs/first-tuned"
    assert snapshot(folder) == before


def test_the_environment_overrides_the_runs_own_recipe(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_SET_TUNE_REWARD__MICRO_BATCH", "2")
    done = call("tune-reward", *SETTINGS, "--from", "first", "--dry-run", "--json")
    assert json.loads(done.out)["micro_batch"] == 2
    monkeypatch.setenv("RTDMD_SET_TUNE_REWARD__MICRO_BATHC", "2")
    done = call("tune-reward", *SETTINGS, "--from", "first", "--dry-run")
    assert done.code == 2 and "tune_reward.micro_batch" in done.err


def test_what_people_read_at_the_end(tmp_path: Path) -> None:
    records = {
        "rewards_before": {TRAINED: 0.5, JUDGE: 0.25},
        "rewards_after": {TRAINED: 0.75, JUDGE: 0.125},
    }
    outcome = Outcome(tmp_path, 3, 1.0, tmp_path / "step", 0, records)
    resolved = load_preset("shapes-4step", [f"tune_reward.held_out=[{JUDGE}]"], {})
    lines = result(outcome, resolved, as_json=False)
    assert list(lines)[-2:] == [JUDGE, TRAINED]
    assert lines[JUDGE] == "0.2500 -> 0.1250" and lines[TRAINED] == "0.5000 -> 0.7500, trained on"


def test_no_run_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs"), "unfinished", state="running")
    done = call("tune-reward", "--reward", TRAINED)
    assert done.code == 2 and done.out == ""
    assert "no finished stage-1 run under runs/" in done.err and "rtdmd distill" in done.err
    misspelt = call("tune-reward", "--set", "tune_reward.epoch=3")  # which is wrong whatever the run
    assert misspelt.code == 2 and "Unknown key `tune_reward.epoch`" in misspelt.err
    assert "the nearest key is `tune_reward.epochs`" in misspelt.err


def test_mistakes(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence and the exit code; no model is loaded, nothing is made."""

    def never(*arguments: object) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr("rtdmd_cli.engine.tune_reward.run.load_backbone", never)
    monkeypatch.setattr("rtdmd_cli.engine.distill.run.load_backbone", never)
    for name in ("rule", "prompt"):
        monkeypatch.setitem(registry.REWARDS, name, find(name))
    make_run(Path("runs"), "tuned", stage="tune-reward")
    make_run(Path("runs"), "bare", ())
    preset = RunFolder(Path("runs/first")).preset.read_text(encoding="utf-8")
    lines = [line for line in preset.splitlines() if not line.strip().startswith("path:")]
    Path("other.yaml").write_text("\n".join(lines).replace("model:", "model:\n  path: elsewhere") + "\n")
    Path("rank.yaml").write_text(preset.replace("    rank: 2\n", "    rank: 3\n", 1))
    Path("bad.jsonl").write_text('{"prompt": "a ring"}\n{"text": "a ring"}\n')
    Path("known.jsonl").write_text('{"prompt": "a ring", "length": 6}\n{"prompt": "a circle", "length": 8}\n')
    Path("plain.txt").write_text("a ring\na circle\n")
    measured = [f"--set=tune_reward.{key}" for key in ("prompts=known.jsonl", "eval_prompts=plain.txt")]
    bare = ("--set", f"tune_reward.held_out=[{JUDGE}]")
    alone = [f"--set=tune_reward.{term}_weight=0" for term in ("policy", "dmd")]
    cases: list[tuple[tuple[str, ...], int, str]] = [
        (("--reward", "shapes-klip"), 2, "`shapes-clip`"),
        (("--reward", f"{TRAINED}=much"), 2, "number as weight, not 'much'"),
        (("--reward", f"{TRAINED}=0"), 2, "above 0"),
        (("--reward", TRAINED, "--reward", f"{TRAINED}=2"), 2, "each reward once"),
        (("--reward", f"{TRAINED}, rule"), 2, f"no reward `{TRAINED}, rule`"),
        (("--reward", JUDGE, *bare), 2, "trains on"),
        (("--reward", "rule", *alone), 2, "none of the rewards is differentiable"),
        (("--reward", "prompt"), 4, "`tune_reward.prompts`: The reward prompt needs `length`"),
        (
            ("--reward", "prompt", *measured),
            4,
            "`tune_reward.eval_prompts`: The reward prompt needs `length`",
        ),
        (("--set", "tune_reward.epoch=3"), 2, "tune_reward.epochs"),
        (("--set", "tune_reward.reward_paths=[hpsv2=/x]"), 2, "names hpsv2"),
        (("--set", "tune_reward.prompts=bad.jsonl"), 4, "prompt 2 has no text"),
        (("--set", "tune_reward.eval_prompts=none.txt"), 4, "none.txt"),
        (("--from", "first", "--preset", "other.yaml"), 4, "another `model.path`"),
        (("--from", "first", "--preset", "rank.yaml"), 4, "another `distill.lora`"),
        (("--set", "sampler.raw_steps=[1000, 900, 500, 250]"), 4, "another `sampler.raw_steps`"),
        (("--from", "first", "--preset", "shapes-4step"), 4, "another `model.path`"),
        (("--from", "tuned"), 4, "a run of rtdmd tune-reward"),
        (("--from", "runs/tuned/checkpoints/step-000010"), 4, "a run of rtdmd tune-reward"),
        (("--from", "bare"), 4, "no good checkpoint"),
        (("--from", "nonsense"), 2, "`nonsense`"),
        (("--from", "shapes-4step"), 2, "neither a run nor a checkpoint"),
        (("--name", "first"), 2, "already exists"),
        (("--name", "a/b"), 2, "cannot be the name of a run"),
        (("--name", ""), 2, "cannot be the name of a run"),
        (("--resume", "nonsense"), 2, "neither auto, never"),
        (("--resume", "first"), 4, "was not made by rtdmd tune-reward"),
        (("--resume", "bare"), 4, "a run of rtdmd distill, not of rtdmd tune-reward"),
    ]
    before = snapshot(folder)
    for arguments, code, text in cases:
        own = SETTINGS[:-2] if "--reward" in arguments else SETTINGS
        where = () if "--from" in arguments else ("--from", "first")
        named = () if "--name" in arguments or "--resume" in arguments else ("--name", "new")
        done = call("tune-reward", *own, *where, *named, *arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done)
        assert "error: " in done.err and text in done.err, (arguments, done.err)
        assert "Traceback" not in done.err
    for name in ("", "a/b", "..", "x" * 81):
        done = call("distill", "--preset", "rank.yaml", "--name", name)
        assert (done.code, done.out) == (2, "") and "cannot be the name of a run" in done.err
    assert snapshot(folder) == before


def test_a_reward_without_a_gradient_is_noted(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.REWARDS, "rule", find("rule"))
    few = ("--set", "tune_reward.epochs=1", "--set", "tune_reward.eval_images=0", "--reward", "rule=0.5")
    done = call("tune-reward", *SETTINGS, *few, "--json")
    assert done.code == 0, done.err
    assert "no gradient in rule: in the policy term only" in done.err
    assert json.loads(done.out)["rewards"] == {}
    off = ("--set", "tune_reward.policy_weight=0", "--set", "tune_reward.dmd_weight=0.1", "--name", "off")
    done = call("tune-reward", *SETTINGS, *few, *off)
    assert done.code == 0 and "no term that is on can follow rule: measured, not trained on" in done.err
    tilt = ("--set", "tune_reward.policy_weight=0", "--set", "tune_reward.tilt=1", "--name", "tilted")
    done = call("tune-reward", *SETTINGS, *few, *tilt)
    assert done.code == 0 and "no gradient in rule: in the tilt of matching only" in done.err


# --- where a run starts


def tuned_run(name: str, *settings: str) -> RunFolder:
    """A run of tune-reward with a checkpoint, as far as finding it goes."""
    run = make_run(Path("runs"), name, (), "interrupted", "tune-reward", Path("runs/first") / STAGE_1)
    prompts = read_prompt_set("tiny.txt")
    meta = {"prompts_sha256": known_by(prompts, prompts)}
    save_checkpoint(run.checkpoints, 5, {"ema": generator_weights(5)}, {"stage": "tune-reward"}, 9, meta)
    shutil.copy(dumped(*settings), run.preset)
    return run


def dumped(*settings: str) -> Path:
    """The recipe of SETTINGS and `settings` in a file."""
    from rtdmd_cli.config.loader import dump_resolved, load_preset

    pairs = [*SETTINGS[:-2][1::2], f'tune_reward.rewards=["{TRAINED}"]', *settings]
    path = Path("dumped.yaml")
    path.write_text(dump_resolved(load_preset("runs/first/preset.resolved.yaml", pairs, {}).preset))
    return path


def begin(call: Call, *arguments: str) -> tuple[int, str]:
    """Where a dry run would start: run and epoch; or exit code and message."""
    done = call("tune-reward", "--from", "first", *SETTINGS, "--dry-run", "--json", *arguments)
    if done.code:
        return done.code, done.err
    planned = json.loads(done.out)
    return planned["start"], planned["run"]


def test_a_run_is_continued_by_name_path_and_auto(folder: Path, call: Call) -> None:
    tuned_run("mine")
    assert begin(call, "--name", "mine", "--resume", "auto") == (5, "runs/mine")
    for reference in ("mine", "runs/mine", "runs/mine/checkpoints/step-000005"):
        assert begin(call, "--resume", reference)[0] == 5
        assert begin(call, "--resume", reference)[1].endswith(
            "runs/mine"
        )  # not a new one of the default name
    assert begin(call, "--resume", "mine", "--name", "other") == (5, "runs/other")
    assert begin(call, "--resume", "auto") == (0, "runs/first-tuned")


def test_a_broken_run_is_shown_with_the_command_that_continues_it(folder: Path, call: Call) -> None:
    """Also where its folder was moved; where stage 1's checkpoint has gone its run is named, without that the end alone."""

    def told(name: str) -> list[str]:
        return shlex.split(call("runs", "show", name).err.partition("Go on with: ")[2])

    run = tuned_run("mine")
    again = ["--preset", str(run.preset), "--resume", str(run.path)]
    assert told("mine") == ["rtdmd", "tune-reward", "--from", f"runs/first/{STAGE_1}", *again]
    done = call(*told("mine")[1:], "--dry-run", "--json")
    assert done.code == 0 and json.loads(done.out)["start"] == 5
    Path("runs").rename("elsewhere")
    assert told("elsewhere/mine")[2:4] == ["--from", f"elsewhere/first/{STAGE_1}"]
    shutil.rmtree(Path("elsewhere/first") / STAGE_1)
    assert told("elsewhere/mine")[2:4] == ["--from", "elsewhere/first"]
    shutil.rmtree("elsewhere/first")
    assert told("elsewhere/mine") == ["the", "same", "command", "and", "--resume", "elsewhere/mine"]


def test_what_may_change_when_a_run_is_continued(folder: Path, call: Call) -> None:
    tuned_run("mine")
    free = ["tune_reward.micro_batch=1", "tune_reward.rewards_in_memory=one", "tune_reward.epochs=3000"]
    free += ["distill.consistency_batched=true", "distill.iterations=7", "hardware.threads=2"]
    free += ["tune_reward.save_every=9", "evaluate.batch=1"]
    again = ("--name", "mine", "--resume", "auto")
    assert begin(call, *again, *(f"--set={setting}" for setting in free)) == (5, "runs/mine")
    for setting in (
        "tune_reward.generator_lr=0.5",
        "distill.t_max=0.9",
        "evaluate.seed=1",
        "sampler.eta=0.5",
    ):
        code, message = begin(call, *again, "--set", setting)
        assert code == 4 and f"{setting.partition('=')[0]} was" in message


def test_prompts_that_have_changed(folder: Path, call: Call) -> None:
    """Of both stages; a checkpoint that does not say on which prompts it was trained is taken as it is."""
    again = ("--name", "mine", "--resume", "auto")
    distilled = RunFolder(Path("runs/first"))
    stage_1 = ("distill", "--preset", str(distilled.preset), "--set", "distill.prompts=tiny.txt", "--dry-run")
    file = distilled.preset.read_text(encoding="utf-8")
    distilled.preset.write_text(file.replace("prompts: builtin:shapes", "prompts: tiny.txt", 1))
    tuned_run("mine")
    meta = {"prompts_sha256": known_by(read_prompt_set("tiny.txt"))}
    tensors = {"ema": generator_weights(20)}
    save_checkpoint(distilled.checkpoints, 20, tensors, {"stage": "distill"}, 9, meta)
    first = (*stage_1, "--name", "first", "--resume", "auto")
    assert call(*first).code == 0 and begin(call, *again)[0] == 5
    Path("tiny.txt").write_text("\n".join([*PROMPTS[1:], "a blue star"]) + "\n", encoding="utf-8")
    code, message = begin(call, *again)
    assert code == 4 and "step-000005 was trained on other prompts" in message
    done = call(*first)
    assert done.code == 4 and "step-000020 was trained on other prompts" in done.err
    add_checkpoint(distilled, 30, generator_weights(30))
    assert call(*first).code == 0
