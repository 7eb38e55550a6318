"""The run folder: made whole, never overwritten, found again, and without private data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rtdmd_cli.config.loader import Resolved, load_preset
from rtdmd_cli.engine.compute.mixed import products_of
from rtdmd_cli.engine.storage import checkpoint, files, run_folder
from rtdmd_cli.engine.storage.run_folder import Metrics, RunFolder, State
from rtdmd_cli.errors import BusyError, DataError, NumericalError, UsageError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resolved() -> Resolved:
    return load_preset("shapes-4step", ["distill.iterations=7"], {})


@pytest.fixture
def run(tmp_path: Path, resolved: Resolved) -> RunFolder:
    return run_folder.create_run(tmp_path / "runs", "first", resolved, ["rtdmd", "distill"], CPU)


def test_a_new_run_holds_preset_environment_and_status(run: RunFolder, resolved: Resolved) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "environment.json",
        "preset.resolved.yaml",
        "samples",
        "status.json",
    ]
    assert [path.name for path in run.path.parent.iterdir()] == ["first"]
    assert load_preset(str(run.preset), environ={}).preset == resolved.preset
    assert run.status()["state"] == "running"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["command"] == ["rtdmd", "distill"]
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"].startswith("cpu")
    assert environment["matrix_products"] == products_of(resolved.preset.hardware, CPU)


def test_every_run_has_an_id_of_its_own(run: RunFolder, tmp_path: Path, resolved: Resolved) -> None:
    other = run_folder.create_run(tmp_path / "others", "first", resolved, ["rtdmd", "distill"], CPU)
    assert run.id and other.id and run.id != other.id
    known, moved = run.id, RunFolder(run.path.rename(tmp_path / "moved"))
    moved.note_changes([("hardware.dtype", "bf16", "fp32")], 3)
    assert moved.id == known
    (moved.path / "environment.json").write_text("[]")
    assert moved.id is None


def test_an_existing_run_is_refused_with_both_choices(run: RunFolder, resolved: Resolved) -> None:
    before = (run.path / "environment.json").read_bytes()
    with pytest.raises(UsageError, match="already exists") as caught:
        run_folder.create_run(run.path.parent, "first", resolved, ["other"], CPU)
    assert "--resume auto" in caught.value.hint
    assert "--name OTHER" in caught.value.hint
    assert (run.path / "environment.json").read_bytes() == before
    assert [path.name for path in run.path.parent.iterdir()] == ["first"]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path, resolved: Resolved) -> None:
    (tmp_path / "empty").mkdir()
    assert run_folder.create_run(tmp_path, "empty", resolved, [], CPU).status()["state"] == "running"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="already exists"):
        run_folder.create_run(tmp_path, "file", resolved, [], CPU)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "-x", ".hidden", "a b", "x" * 81, "a\n"])
def test_names_that_are_no_names(name: str, tmp_path: Path, resolved: Resolved) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        run_folder.create_run(tmp_path / "runs", name, resolved, [], CPU)
    assert not (tmp_path / "runs").exists()


def test_a_run_broken_off_in_the_making_leaves_no_run(
    tmp_path: Path, resolved: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(temporary: Path, final: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "rename_folder", die)
        run_folder.create_run(tmp_path, "a", resolved, [], CPU)
    assert not (tmp_path / "a").exists()
    assert run_folder.find_newest_finished(tmp_path) is None
    run_folder.create_run(tmp_path, "a", resolved, [], CPU)


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    metrics.append({"iteration": 1, "fake": 0.1})
    metrics.append({"iteration": 2, "fake": 0.3, "generator": 1.0})
    assert metrics.path.read_text() == (
        '{"fake": 0.1, "iteration": 1}\n{"fake": 0.3, "generator": 1.0, "iteration": 2}\n'
    )
    assert [line["iteration"] for line in metrics.read()] == [1, 2]


def test_a_metric_that_is_not_finite_is_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(NumericalError, match="metric fake is not finite at iteration 3"):
        metrics.append({"iteration": 3, "ok": 1.0, "fake": float("nan")})
    with pytest.raises(TypeError, match="whole number"):
        metrics.append({"iteration": 1.5})
    assert not metrics.path.exists()


@pytest.mark.parametrize(
    "tail", [b"", b'{"iteration": 3', b"\0\0\0", b'{"iteration": 4}', b'{"other": 1}\n', b"[]\n"]
)
def test_truncation_drops_later_and_damaged_lines_and_keeps_the_others_bytes(
    tail: bytes, tmp_path: Path
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    kept = b'{"iteration":1}\n{"fake":  2.50, "iteration": 2}\n'
    metrics.path.write_bytes(kept + b'{"iteration": 3}\n' + tail)
    assert [line["iteration"] for line in metrics.read()] == [1, 2, 3]
    assert metrics.truncate_after(2) == (2 if tail else 1)
    assert metrics.path.read_bytes() == kept
    assert metrics.truncate_after(2) == 0
    metrics.append({"iteration": 3})
    assert metrics.path.read_bytes() == kept + b'{"iteration": 3}\n'
    assert metrics.truncate_after(0) == 3
    assert metrics.path.read_bytes() == b""


def test_truncation_without_a_file(tmp_path: Path) -> None:
    assert Metrics(tmp_path / "metrics.jsonl").truncate_after(5) == 0


def test_log_and_status(run: RunFolder) -> None:
    run.log("one\ntwo \udcff")
    lines = (run.path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two \\udcff"]
    run.set_status("failed", iteration=3, reason="nan")
    status = run.status()
    assert (status["state"], status["iteration"], status["reason"]) == ("failed", 3, "nan")
    (run.path / "status.json").write_text("{")
    with pytest.raises(DataError, match=r"status\.json is missing or damaged"):
        run.status()


def test_the_run_that_finished_last_is_found(tmp_path: Path, resolved: Resolved) -> None:
    assert run_folder.find_newest_finished(tmp_path / "none") is None
    states: dict[str, State] = {"c": "finished", "b": "finished", "a": "interrupted", "d": "failed"}
    for name, state in states.items():
        run_folder.create_run(tmp_path, name, resolved, [], CPU).set_status(state)
    damaged = run_folder.create_run(tmp_path, "e", resolved, [], CPU)
    (damaged.path / "status.json").write_text("{")
    (tmp_path / "stray.txt").touch()
    assert run_folder.find_newest_finished(tmp_path) == RunFolder(tmp_path / "b")
    RunFolder(tmp_path / "c").set_status("finished")
    assert run_folder.find_newest_finished(tmp_path) == RunFolder(tmp_path / "c")


def test_references(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run.path.parent
    saved = checkpoint.save_checkpoint(run.checkpoints, 5, {}, {}, 1, {})
    alone = checkpoint.save_checkpoint(tmp_path / "elsewhere", 5, {}, {}, 1, {})
    for reference in (str(run.path), "first"):
        found = run_folder.resolve_run(reference, out)
        assert found == run_folder.RunReference(run, None)
    found = run_folder.resolve_run(str(saved), out)
    assert found is not None
    assert found.run is not None
    assert (found.run.path, found.checkpoint) == (run.path.resolve(), saved)
    assert run_folder.resolve_run(str(alone), out) == run_folder.RunReference(None, alone)
    monkeypatch.chdir(tmp_path)
    assert run_folder.resolve_run("runs/first", Path("other")) == run_folder.RunReference(
        RunFolder(Path("runs/first")), None
    )
    for reference in ("shapes-4step", "../first", "", "x" * 5000, "a\0b", str(tmp_path)):
        assert run_folder.resolve_run(reference, out) is None


def test_a_path_comes_before_a_name(
    run: RunFolder, resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder.create_run(tmp_path / "here", "first", resolved, [], CPU)
    monkeypatch.chdir(tmp_path / "here")
    found = run_folder.resolve_run("first", run.path.parent)
    assert found == run_folder.RunReference(RunFolder(Path("first")), None)


def test_opening(run: RunFolder, tmp_path: Path) -> None:
    assert run_folder.open_run(run.path) == run
    with pytest.raises(UsageError, match="no run folder"):
        run_folder.open_run(tmp_path / "none")
    with pytest.raises(DataError, match="is not a run folder"):
        run_folder.open_run(tmp_path)


def test_a_run_belongs_to_one_process_and_leftovers_go(run: RunFolder) -> None:
    (run.samples / "pictures").mkdir()
    places = (run.path, run.samples, run.samples / "pictures", run.checkpoints)
    leftovers = [files.tmp_path(place / "grid.png") for place in places]
    for leftover in leftovers:
        leftover.touch()
    with run.lock():
        assert not [leftover for leftover in leftovers if leftover.exists()]
        with pytest.raises(BusyError, match="Another process"), run.lock():
            pytest.fail("held twice")
    with run.lock():
        pass
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_the_lock_of_a_killed_process_is_lifted(run: RunFolder) -> None:
    holder = (
        "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(d, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BusyError, match="Another process"), run.lock():
            pytest.fail("held by another process")
        process.kill()
        process.wait()
    with run.lock():
        pass


def test_private_data_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    monkeypatch.setattr(run_folder.platform, "node", lambda: "alices-box")
    command = [
        "/home/alice/env/bin/rtdmd",
        "distill",
        "--preset=/home/alice/x.yaml",
        "--out",
        "/home/alice",
        "/home/alicent/y",
        "/mnt/alice/z",
        "alices-box:/data",
        "hf_abcdefghijkl",
        "key 0123secret.",
        "--hub-token",
        "plain",
        "x.password=a=b",
        "a photo of a token ring",
        "malice",
    ]
    assert run_folder.describe_environment(command, CPU)["command"] == [
        "rtdmd",
        "distill",
        "--preset=~/x.yaml",
        "--out",
        "~",
        "/home/alicent/y",
        "/mnt/<user>/z",
        "<host>:/data",
        "<token>",
        "key <token>.",
        "--hub-token",
        "<token>",
        "x.password=<token>",
        "a photo of a token ring",
        "malice",
    ]
    whole = json.dumps(run_folder.describe_environment(["rtdmd"], CPU))
    assert "alice" not in whole
