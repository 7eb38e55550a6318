"""The hub's own cache on disk, filled by hand, with the hub switched off."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api


def offline_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `root` the hub's cache and switch the hub off; returns `root`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def publish(root: Path, repository: str, *files: Path) -> None:
    """Put files into the cache as downloads of "owner/name" would be."""
    folder = root / f"models--{repository.replace('/', '--')}"
    commit = "a" * 40
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for number, file in enumerate(files):
        blob, link = folder / "blobs" / f"{number:064x}", folder / "snapshots" / commit / file.name
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))


def online_hub(address: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the hub's client of this process ask `address`, see `tests.tiny_hub_server`, with `root` as its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    return root
