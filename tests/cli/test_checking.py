"""What stops a training before anything is loaded: libraries that don't fit. Its other checks are in test_distill.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import import_utils

from rtdmd_cli.cli import app
from rtdmd_cli.cli.checking import require_adapters, torchao_bound
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.errors import EnvironmentFailure
from tests.tiny_models import PROMPTS
from tests.tiny_runs import make_run


def install(name: str, version: str, folder: Path) -> None:
    """An empty package with the version in its metadata."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("old", [True, False])
def test_the_bound_is_the_one_of_peft(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft refuses what is refused here, and takes the version that is named."""
    bound = torchao_bound()
    assert bound is not None
    install("torchao", "0.1.0" if old else bound, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_torchao_available.cache_clear()
    try:
        if old:
            with pytest.raises(ImportError, match=f"only versions above {bound} "):
                import_utils.is_torchao_available()
        else:
            assert import_utils.is_torchao_available()
    finally:
        import_utils.is_torchao_available.cache_clear()
    adapters, full = (load_preset(name, environ={}).preset for name in ("shapes-4step-lora", "shapes-4step"))
    require_adapters(full)
    if not old:
        require_adapters(adapters)
        return
    with pytest.raises(
        EnvironmentFailure, match=f"torchao 0.1.0 doesn't fit: peft, .* takes {bound} or newer"
    ):
        require_adapters(adapters)


@pytest.mark.parametrize("command", ["distill", "tune-reward"])
def test_an_old_torchao_is_told_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a dry run, and by the training itself."""

    def never(*arguments: object) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr("rtdmd_cli.engine.tune_reward.run.load_backbone", never)
    monkeypatch.setattr("rtdmd_cli.engine.distill.run.load_backbone", never)
    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    preset = make_run(Path("runs"), "first").preset
    Path("libraries").mkdir()
    install("torchao", "0.10.0", Path("libraries"))
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    stage_2 = ["--from", "runs/first", "--reward", "shapes-clip"]
    place = ["--preset", str(preset), "--name", "new"] if command == "distill" else stage_2
    for arguments in (["--dry-run"], []):
        assert app.main([command, *place, *arguments]) == 3
        shown = capsys.readouterr().err
        assert "error: torchao 0.10.0 doesn't fit" in shown and "pip install -U torchao" in shown


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path) -> None:
    """By a training, however the libraries put it; what loads none of them does not look at it."""
    install("torchvision", "0.20.0", tmp_path)
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    root = str(Path(__file__).parents[2])
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "RTDMD_DEBUG": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-P", "-m", "rtdmd_cli", *arguments]
        return subprocess.run(program, cwd=tmp_path, env=environ, capture_output=True, text=True)

    assert run("--help").returncode == 0
    done = run("distill", "--quiet")
    assert done.returncode == 3 and not (tmp_path / "runs").exists()
    first, second = done.stderr.splitlines()
    assert first.startswith("error: The torchvision that is installed here doesn't fit: ")
    assert "torchvision::nms" in first and "pip install -U torchvision" in second
