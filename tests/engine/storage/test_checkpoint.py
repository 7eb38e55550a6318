"""Checkpoints: the same bytes for the same content, damage is named, a kill at any moment does no harm."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rtdmd_cli
from rtdmd_cli.engine.storage import checkpoint, files
from rtdmd_cli.engine.storage.disk import Disk
from rtdmd_cli.errors import DataError, EnvironmentFailure

META = {"preset_sha256": "ab" * 32, "rtdmd": "0.1.0", "base_model": "builtin:shapes"}


def content(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    shared = torch.arange(12.0).reshape(3, 4) * value
    return {
        "generator": {"b": shared.T, "a": shared, "half": torch.tensor([value, 2.0], dtype=torch.bfloat16)},
        "optimizer": {"a/step": torch.tensor(value), "a/state1": torch.arange(5, dtype=torch.uint8)},
        "empty": {},
    }


def save(folder: Path, step: int, value: float = 1.0, keep: int = 3) -> Path:
    return checkpoint.save_checkpoint(
        folder, step, content(value), {"iteration": step, "x": [0.1]}, keep, META
    )


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 500)
    assert path.name == "step-000500"
    loaded = checkpoint.load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.meta) == (path, 500, META)
    assert loaded.state == {"iteration": 500, "x": [0.1]}
    expected = content()
    assert loaded.tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert loaded.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name], tensor)


def test_a_spared_checkpoint_is_neither_removed_nor_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        arguments = (tmp_path, step, content(), {"iteration": step}, 2, META)
        checkpoint.save_checkpoint(*arguments, spared=2 if step > 2 else None)
    assert checkpoint.checkpoint_steps(tmp_path) == [2, 4, 5]
    checkpoint.save_checkpoint(tmp_path, 6, content(), {"iteration": 6}, 2, META, spared=5)
    assert checkpoint.checkpoint_steps(tmp_path) == [4, 5, 6]  # 2 is an old one like others now


def test_the_same_content_gives_the_same_bytes_and_no_pickle(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 7), save(tmp_path / "b", 7)
    names = sorted(path.name for path in first.iterdir())
    assert names == [
        "empty.safetensors",
        "generator.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    manifest = json.loads((first / "manifest.json").read_text())
    data = (first / "generator.safetensors").read_bytes()
    assert manifest["files"]["generator.safetensors"] == {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("rtdmd-checkpoint", 1, 7)
    assert manifest["meta"] == META


def test_the_oldest_go_and_later_steps_stay(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=2)
    assert checkpoint.checkpoint_steps(tmp_path) == [300, 400]
    save(tmp_path, 350, keep=1)
    assert checkpoint.checkpoint_steps(tmp_path) == [350, 400]
    aside = checkpoint.set_aside_after(tmp_path, 350)
    assert aside is not None and [path.name for path in aside.iterdir()] == ["step-000400"]
    checkpoint.verify_checkpoint(aside / "step-000400")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([aside.name, "step-000350"])
    assert checkpoint.set_aside_after(tmp_path, 350) is None


def test_a_rotation_that_a_kill_came_before_is_made_up_for(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=9)
    checkpoint.rotate(tmp_path, 300, 1, spared=100)
    assert checkpoint.checkpoint_steps(tmp_path) == [100, 300, 400]


def test_steps_of_more_than_six_digits_sort_by_number(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    assert save(tmp_path, 1_000_000).name == "step-1000000"
    assert checkpoint.checkpoint_steps(tmp_path) == [999_999, 1_000_000]
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-1000000", [])


@pytest.mark.parametrize(
    "state",
    [{"a": (1, 2)}, {"a": float("nan")}, {1: 2}, {"a": object()}],
    ids=["tuple", "nan", "key", "object"],
)
def test_a_state_that_is_not_plain_json_is_refused(state: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError)):
        checkpoint.save_checkpoint(tmp_path, 1, {}, state, 1, {})
    assert checkpoint.checkpoint_steps(tmp_path) == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group"):
        checkpoint.save_checkpoint(tmp_path, 1, {"../up": {}}, {}, 1, {})
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save_checkpoint(tmp_path, 1, {}, {}, 0, {})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes: Any) -> None:
    """Change the manifest as somebody would who also repairs its own hash."""
    body = json.loads(path.read_text()) | changes
    body.pop("sha256")
    body["sha256"] = hashlib.sha256(files.json_text(body).encode()).hexdigest()
    path.write_text(json.dumps(body))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (
        lambda p: flip(p / "generator.safetensors"),
        r"generator\.safetensors is damaged: its sha256",
    ),
    "short": (
        lambda p: os.truncate(p / "generator.safetensors", 20),
        r"generator\.safetensors has 20 bytes inst",
    ),
    "missing": (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "state": (lambda p: (p / "state.json").write_text("{}"), r"state\.json has 2 bytes"),
    "folder": (shutil.rmtree, r"no checkpoint folder .*step-000002"),
    "no manifest": (
        lambda p: (p / "manifest.json").unlink(),
        r"step-000002 is foreign.*manifest\.json is missing",
    ),
    "other format": (
        lambda p: (p / "manifest.json").write_text('{"format": "x"}'),
        "is foreign.*another program",
    ),
    "no object": (lambda p: (p / "manifest.json").write_text("[1]"), "is foreign.*another program"),
    "not JSON": (
        lambda p: os.truncate(p / "manifest.json", 30),
        r"manifest\.json is damaged: it is not JSON",
    ),
    "nan": (lambda p: (p / "manifest.json").write_text('{"step": NaN}'), r"damaged: NaN is not JSON"),
    "edited": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"step": 2', '"step": 9')
        ),
        r"manifest\.json is damaged: its own sha256",
    ),
    "no files": (lambda p: rewrite(p / "manifest.json", files=None), "lacks a field"),
    "outside": (
        lambda p: rewrite(
            p / "manifest.json",
            files={"state.json": {"size": 2, "sha256": "0" * 64}, "../x": {"size": 2, "sha256": ""}},
        ),
        "its list of files",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_auto_falls_back(kind: str, tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage, reason = DAMAGE[kind]
    damage(bad)
    with pytest.raises(DataError, match=reason) as caught:
        checkpoint.load_checkpoint(bad)
    assert caught.value.exit_code == 4
    skipped = [] if kind == "folder" else [(bad, caught.value.message)]
    assert checkpoint.newest_valid(tmp_path) == (good, skipped)


def test_a_checkpoint_of_a_newer_version_is_refused_and_no_older_one_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    rewrite(save(tmp_path, 2) / "manifest.json", version=2)
    for read in (checkpoint.newest_valid, lambda folder: checkpoint.load_checkpoint(folder / "step-000002")):
        with pytest.raises(DataError, match="version 2; this program reads version 1") as caught:
            read(tmp_path)
        assert "Use the version of rtdmd that wrote it" in caught.value.hint


def test_a_folder_with_another_steps_name_is_refused(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "step-000099")
    save(tmp_path, 2)
    with pytest.raises(DataError, match=r"step-000099 is a checkpoint of step 1") as caught:
        checkpoint.newest_valid(tmp_path)
    assert "step-000001" in caught.value.hint
    copy = shutil.copytree(tmp_path / "step-000001", tmp_path / "my copy")
    assert checkpoint.load_checkpoint(copy).step == 1  # under any name that claims no step


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE", "ENOMEM", "ETIMEDOUT"])
def test_a_disk_that_does_not_answer_is_no_damage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    read, number = Path.read_bytes, getattr(errno, name)

    def fail(self: Path) -> bytes:
        if self.parent == newest and self.name == "generator.safetensors":
            raise OSError(number, os.strerror(number))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(EnvironmentFailure, match=r"Cannot read .*step-000002/generator\.safetensors"):
        checkpoint.newest_valid(tmp_path)


def test_nothing_of_anybody_elses_is_removed_beside_the_checkpoints(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("step-000001.old", "step-000002.replaced-0a0b0c0d", "notes")]
    for path in mine:
        path.mkdir()
        (path / "f").write_text("mine")
    for step in (1, 2, 2, 3):
        save(tmp_path, step, keep=1)
    assert checkpoint.checkpoint_steps(tmp_path) == [3]
    assert all((path / "f").read_text() == "mine" for path in mine)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1)
    real = os.statvfs(tmp_path)
    few = os.statvfs_result((real.f_bsize, 1, real.f_blocks, 0, 0, *tuple(real)[5:]))
    monkeypatch.setattr(files.os, "statvfs", lambda path: few)
    with pytest.raises(EnvironmentFailure, match=r"step-000002 needs 0\.\d MB, and 0\.0 MB are free"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [good]


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1)

    class Full(Disk):
        def write(self, descriptor: int, data: bytes) -> None:
            if len(data) > 400:
                os.write(descriptor, data[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(descriptor, data)

    monkeypatch.setattr(files, "disk", Full())
    with pytest.raises(EnvironmentFailure, match="no space left"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [good]


def test_no_valid_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "none") == (None, [])
    assert checkpoint.checkpoint_steps(tmp_path / "none") == []
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    path, skipped = checkpoint.newest_valid(tmp_path)
    assert path is None
    assert [bad.name for bad, _ in skipped] == ["step-000002", "step-000001"]


def test_a_file_that_may_not_be_read_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(EnvironmentFailure, match=r"Cannot read .*manifest\.json"):
        checkpoint.newest_valid(tmp_path)
    with pytest.raises(EnvironmentFailure):
        checkpoint.load_checkpoint(path)


def test_a_disk_that_gives_back_other_bytes_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1)
    write = files.write_bytes

    def lossy(path: Path, data: bytes) -> None:
        write(path, data[:-1] + b"?" if path.name == "generator.safetensors" else data)

    monkeypatch.setattr(files, "write_bytes", lossy)
    with pytest.raises(EnvironmentFailure, match="other bytes than were written"):
        save(tmp_path, 2, keep=1)
    assert checkpoint.newest_valid(tmp_path) == (good, [])


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


class Dying(Disk):
    """The `call`-th call, and all after it, raise Killed."""

    def __init__(self, call: int) -> None:
        self.call, self.count = call, 0

    def __getattribute__(self, name: str) -> Any:
        if name in vars(Disk):
            self.count += 1
            if self.count >= self.call:
                raise Killed
        return super().__getattribute__(name)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("step", [300, 400])
def test_death_at_every_single_step_of_a_save(
    step: int, damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new step, and one that replaces a checkpoint of other content, good or damaged."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for speed
    before = 200 if damaged else 300
    finished, call = False, 0
    while not finished:
        call += 1
        folder = tmp_path / str(call)
        path = [save(folder, old, value=1.0) for old in (100, 200, 300)][-1]
        if damaged:
            flip(path / "state.json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "disk", Dying(call))
            try:
                save(folder, step, value=2.0)
                finished = True
            except Killed:
                pass
        whole = [
            path for path in folder.glob("step-*") if not (damaged and path.name.startswith("step-000300"))
        ]
        for path in whole:
            checkpoint.verify_checkpoint(path)
        newest, _ = checkpoint.newest_valid(folder)
        assert newest is not None
        loaded = checkpoint.load_checkpoint(newest)
        assert (loaded.step, value_of(loaded)) in {(before, 1.0), (step, 2.0)}
        if finished:
            assert loaded.step == step
        elif loaded.step == before:
            assert checkpoint.checkpoint_steps(folder) == [100, 200, 300]
        save(folder, 500, value=3.0)
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 3
        assert not [name for name in left if name.startswith(".tmp-")]
    assert call > 10


def test_without_exchange_the_replaced_one_lies_whole_under_some_name(tmp_path: Path) -> None:
    class NoExchange(Dying):
        def exchange(self, one: Path, other: Path) -> bool:
            return False

    for call in range(1, 1000):
        folder = tmp_path / str(call)
        save(folder, 300, value=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "disk", NoExchange(call))
            try:
                save(folder, 300, value=2.0)
            except Killed:
                whole = [path for path in folder.glob("*step-000300*") if (path / "state.json").is_file()]
                values = {value_of(checkpoint.load_checkpoint(path)) for path in whole if manifest_of(path)}
                assert values and values <= {1.0, 2.0}
                continue
        break
    assert call > 30 and checkpoint.checkpoint_steps(folder) == [300]


def manifest_of(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def value_of(loaded: checkpoint.Checkpoint) -> float:
    """What the whole checkpoint was made with."""
    value = float(loaded.tensors["optimizer"]["a/step"])
    assert torch.equal(loaded.tensors["generator"]["a"], content(value)["generator"]["a"])
    return value


KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from rtdmd_cli.engine.storage import checkpoint

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
tensors = {"a": {str(i): torch.full((500,), float(i)) for i in range(8)}, "b": {"x": torch.ones(2000)}}
last, broken = 0, 0
for number in range(rounds):
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            checkpoint.save_checkpoint(folder, step, tensors, {"step": step}, 2, {})
            os.write(started, b"x")
    os.read(ready, 1)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready), os.close(started)
    path, skipped = checkpoint.newest_valid(folder)
    assert path is not None and not skipped, (path, skipped)
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.state["step"] == loaded.step > last, (loaded.state, loaded.step, last)
    last = loaded.step
    broken += any(entry.name.startswith(".tmp-") for entry in folder.iterdir())
checkpoint.save_checkpoint(folder, last + 1, tensors, {}, 2, {})
left = sorted(path.name for path in folder.iterdir())
assert left == [checkpoint.step_name(last), checkpoint.step_name(last + 1)], left
print(broken)
"""


def test_sigkill_at_random_moments_of_a_save_loop(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(rtdmd_cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILL_LOOP, str(tmp_path / "c"), "12"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill hit a save"
