"""What is said to be here: a hub cache in its real layout, and packages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from rtdmd_cli.engine.rewards import local
from rtdmd_cli.engine.rewards.base import Need, RewardEntry
from rtdmd_cli.engine.rewards.local import at_hand, cached_files, missing, readable
from rtdmd_cli.engine.rewards.registry import REWARDS

REPOSITORY = "someone/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEED = Need(REPOSITORY, ("config.json", "model.safetensors", "tokenizer*"), 2_500_000, "MIT")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; gives the folder of REPOSITORY's snapshot, without a reference to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--someone--some-model/snapshots" / COMMIT


def put(cache: Path, *names: str) -> None:
    """Files as the hub's client lays them: blobs, links to them in the snapshot, and the main revision."""
    blobs, refs = cache.parents[1] / "blobs", cache.parents[1] / "refs"
    for folder in (blobs, refs, cache):
        folder.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(COMMIT)
    for number, name in enumerate(names):
        blob = blobs / f"{number}{name.replace('/', '-')}"
        blob.write_text("{}")
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(blob)


def entry(*needs: Need, extra: str = "") -> RewardEntry:
    return replace(REWARDS["ocr"], needs=needs, extra=extra)


def test_nothing_is_cached(cache: Path) -> None:
    assert cached_files(REPOSITORY) == {} and not at_hand(NEED)
    (only,) = missing(entry(NEED))
    assert only.what == "someone/some-model (2.5 MB) is not in the local cache"
    assert only.get == (
        "hf download someone/some-model --include config.json --include model.safetensors --include 'tokenizer*'"
    )


def test_the_cached_snapshot_counts(cache: Path) -> None:
    put(cache, "config.json", "model.safetensors", "onnx/model.onnx")
    assert set(cached_files(REPOSITORY)) == {"config.json", "model.safetensors", "onnx/model.onnx"}
    assert set(cached_files(REPOSITORY).values()) <= set(cache.rglob("*"))
    assert snapshot_download(REPOSITORY, local_files_only=True) == str(cache)  # as the hub's client finds it
    assert at_hand(NEED) and missing(entry(NEED, NEED)) == []


def test_weights_that_are_missing_or_only_linked(cache: Path) -> None:
    put(cache, "config.json", "tokenizer.json")
    assert not at_hand(NEED)
    (cache / "model.safetensors").symlink_to(cache / "gone")  # a download that was broken off
    assert not at_hand(NEED)


def test_a_snapshot_that_is_not_of_the_main_revision(cache: Path) -> None:
    put(cache, "config.json", "model.safetensors")
    (cache.parents[1] / "refs/main").write_text("f" * 40)
    assert not at_hand(NEED)


def test_all_parts_of_split_weights_are_needed(cache: Path) -> None:
    put(cache, "model-1-of-2.safetensors", "config.json")
    need = replace(NEED, files=("*.safetensors", "*.json"))
    assert at_hand(need)
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (cache / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert not at_hand(need)
    (cache / "model-2-of-2.safetensors").write_text("")
    assert at_hand(need)


def test_without_weights_one_of_the_files_is_enough(cache: Path) -> None:
    need = replace(NEED, files=("tokenizer*", "vocab.json"))
    put(cache, "config.json")
    assert not at_hand(need)
    put(cache, "vocab.json")
    assert at_hand(need)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing(REWARDS["ocr"]) == []
    monkeypatch.setitem(local.EXTRAS, "ocr", ("rapidocr", "rtdmd_no_such_module"))
    (only,) = missing(REWARDS["ocr"])
    assert (only.what, only.get) == ("the package rapidocr", "pip install 'rtdmd[ocr]'")


def test_what_is_built_in_is_here() -> None:
    assert at_hand(Need("", ("weights/*.safetensors",), 1, "MIT"))
    assert missing(REWARDS["shapes-geneval"]) == []


def test_the_extras_of_the_table_are_known_and_declared() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[3]
    declared = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for row in REWARDS.values():
        assert not row.extra or {part.split(">")[0] for part in declared[row.extra]} == set(
            local.EXTRAS[row.extra]
        )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (276_700_000, "276.7 MB"), (999_960_000, "1.0 GB"), (17.6e9, "17.6 GB")],
)  # fmt: skip
def test_readable(size: int, text: str) -> None:
    assert readable(size) == text


def test_the_modules_are_light() -> None:
    modules = "rtdmd_cli.engine.rewards.local, rtdmd_cli.engine.rewards.registry"
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
