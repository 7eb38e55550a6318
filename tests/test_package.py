"""The wheel: built from the checkout, installed elsewhere, it brings presets and built-in models along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd_cli import __version__

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = Path("rtdmd_cli/shapes/weights")
MODELS = ("sd3/model_index.json", "clip/model.safetensors", "clip-judge/model.safetensors")
LARGEST = 12 * 10**6  # bytes, all built-in models together


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout that holds the installed wheel, without its dependencies."""
    folder = tmp_path_factory.mktemp("package")
    command(folder, "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    command(
        folder, "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile",
        "--target", str(folder / "site"), str(wheel),
    )  # fmt: skip
    return folder / "site"


def command(cwd: Path, module: str, *arguments: str, site: Path | None = None) -> str:
    """The output of a module run as a program; fails with what it printed."""
    environ = os.environ | ({"PYTHONPATH": str(site)} if site else {})
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd, env=environ, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files(folder: Path) -> dict[str, int]:
    """Relative path -> size in bytes of everything below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_holds_the_package_and_nothing_else(site: Path) -> None:
    tops = {path.name for path in site.iterdir()}
    assert tops == {"bin", "rtdmd_cli", f"rtdmd-{__version__}.dist-info"}
    presets = {f"presets/{name}": size for name, size in files(ROOT / "presets").items()}
    assert files(site / "rtdmd_cli") == files(ROOT / "rtdmd_cli") | presets
    assert (site / f"rtdmd-{__version__}.dist-info/licenses/LICENSE").is_file()


def test_it_finds_its_presets_elsewhere(site: Path, tmp_path: Path) -> None:
    shown = command(tmp_path, "rtdmd_cli", "presets", "list", "--json", site=site)
    assert str(site / "rtdmd_cli" / "presets" / "shapes-4step.yaml") in shown
    assert str(ROOT) not in shown


def test_its_script_runs(site: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [site / "bin" / "rtdmd", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, f"rtdmd {__version__}\n", "")


def test_the_built_in_models_are_inside_and_small(site: Path) -> None:
    inside = files(site / WEIGHTS)
    assert inside == files(ROOT / WEIGHTS)
    assert set(MODELS) <= inside.keys()
    assert sum(inside.values()) <= LARGEST
