"""Models of the hub by its real client, from a hub of our own: fetched, refused, and used without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from rtdmd_cli.cli import failures
from rtdmd_cli.cli.app import app
from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones import locating, sd3
from rtdmd_cli.engine.compute.signals import Stopped, stop_on_signals
from rtdmd_cli.engine.families.table import MODELS
from rtdmd_cli.engine.rewards import needed
from rtdmd_cli.engine.storage.hub import hub_file
from rtdmd_cli.engine.training.downloading import Arriving, arrived, bring
from rtdmd_cli.errors import EnvironmentFailure
from tests.tiny_hub import online_hub
from tests.tiny_hub_server import COMMIT, Hub, Repository, serving
from tests.tiny_models import sd3_folder

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
FEW_STEPS, GATED, CLOSED = "someone/few-step", "someone/gated", "someone/closed"
BESIDE = ("README.md", "LICENSE", "sd3_medium.safetensors", "text_encoder/model.fp16.safetensors")
"""What a published repository holds beside its pipeline."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = Path(shutil.copytree(sd3_folder(), tmp_path / "published"))
    for name in BESIDE:
        (folder / name).write_bytes(b"beside")
    names = {
        SD3: Repository(folder),
        FEW_STEPS: Repository(folder),
        GATED: Repository(folder, gated=True),
        CLOSED: Repository(folder, closed="Enable access to public gated repositories"),
    }
    with serving(names) as hub:
        online_hub(hub.address, tmp_path / "hub", monkeypatch)
        yield hub


def fetch(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["fetch", *arguments])


def model(**settings: Any) -> ModelConfig:
    return ModelConfig(family="sd3", path=SD3, resolution=32, **settings)


def test_a_model_is_fetched_once_and_then_used_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert needed.models(model()) != []
    first = fetch("sd3-4step", "--json")
    assert first.exit_code == 0, first.stderr
    size = MODELS[SD3].size
    assert size is not None and f"about {size / 1e9:.1f} GB" in first.stderr
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.asked and not {*BESIDE} & {*hub.asked}
    hub.asked.clear()
    (found,) = json.loads(first.stdout)
    again = fetch("sd3-4step")
    assert again.exit_code == 0 and "already here" in again.stderr and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert needed.models(model()) == []
    folder = locating.find_folder(sd3.LAYOUT, SD3, None)
    assert str(folder) == found["path"] and folder.name == COMMIT
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert len(needed.models(model())) == 1


def test_a_connection_that_takes_too_long_finds_the_model_in_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object, **__: object) -> None:
        raise httpx2.ConnectTimeout("timed out")

    there = locating.find_folder(sd3.LAYOUT, SD3, None)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", late)
    assert locating.find_folder(sd3.LAYOUT, SD3, None) == there
    with pytest.raises(EnvironmentFailure, match="someone/few-step could not be fetched .*timed out"):
        locating.find_folder(sd3.LAYOUT, FEW_STEPS, None)


def test_a_licence_that_is_not_accepted(hub: Hub) -> None:
    failure = failures.explain(fetch(GATED).exception)
    assert failure.exit_code == 3 and "is gated" in failure.message and "hf auth login" in failure.hint
    with pytest.raises(EnvironmentFailure, match="is gated") as caught:
        locating.find_folder(sd3.LAYOUT, GATED, None)
    assert f"https://huggingface.co/{GATED}" in caught.value.hint
    with pytest.raises(EnvironmentFailure, match="is gated"):
        locating.find_transformer(GATED, None)


def test_a_token_that_may_not_read(hub: Hub) -> None:
    for find in (
        lambda: locating.find_transformer(CLOSED, None),
        lambda: locating.find_folder(sd3.LAYOUT, CLOSED, None),
        lambda: hub_file(CLOSED, "model_index.json"),
    ):
        with pytest.raises(
            EnvironmentFailure, match="could not be fetched .*Enable access to public"
        ) as caught:
            find()
        assert "settings/tokens" in caught.value.hint and "Request ID" not in caught.value.message


def test_what_the_hubs_storage_raises_is_the_networks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Task error: File reconstruction error: CAS Client Error")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", broken)
    for find in (
        lambda: locating.find_transformer(FEW_STEPS, None),
        lambda: locating.find_folder(sd3.LAYOUT, SD3, None),
        lambda: hub_file(SD3, "model_index.json"),
    ):
        with pytest.raises(EnvironmentFailure, match="could not be fetched .* CAS Client Error") as caught:
            find()
        assert "HF_HUB_DISABLE_XET=1" in caught.value.hint
    assert failures.explain(fetch(SD3).exception).exit_code == 3


def test_names_that_the_hub_does_not_know(hub: Hub) -> None:
    with pytest.raises(EnvironmentFailure, match="no public model") as caught:
        locating.find_transformer("someone/else", None)
    assert "model.generator_init" in caught.value.hint
    with pytest.raises(EnvironmentFailure, match="no revision v7") as caught:
        locating.find_transformer(FEW_STEPS, "v7")
    assert "model.generator_revision" in caught.value.hint
    with pytest.raises(EnvironmentFailure, match="no public model"):
        locating.find_folder(sd3.LAYOUT, "someone/else", None)
    assert "no public" in failures.explain(fetch("someone/else").exception).message


def test_a_training_says_what_it_downloads_before_it_does(hub: Hub) -> None:
    """Of the generator's own base the transformer alone."""
    said: list[str] = []
    missing = needed.models(model(generator_init=FEW_STEPS))
    bring(missing, said.append)
    assert [line.partition(" (")[0] for line in said] == [f"downloading {SD3}", f"downloading {FEW_STEPS}"]
    assert "licence: Stability AI Community" in said[0] and "of unknown size" in said[1]
    assert needed.models(model(generator_init=FEW_STEPS)) == []
    of_second = Path(constants.HF_HUB_CACHE) / "models--someone--few-step/snapshots" / COMMIT
    assert {path.name for path in of_second.iterdir()} == {"transformer"}


def test_a_signal_ends_a_download_at_once(hub: Hub) -> None:
    """Although it would let a model load to its end."""

    def watch(path: str) -> None:
        if path == "model_index.json":
            os.kill(os.getpid(), signal.SIGINT)

    hub.watch = watch
    missing = needed.models(model())
    with (
        stop_on_signals() as stop,
        stop.during("finishing this", "nothing"),
        pytest.raises(Stopped, match="whole") as caught,
    ):
        bring(missing, lambda text: None)
    assert caught.value.number == signal.SIGINT and "vae/config.json" not in hub.asked


def test_what_has_come_and_the_time_that_is_left(tmp_path: Path) -> None:
    now = [0.0]
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "earlier").write_bytes(b"x" * 1_000_000)
    told = Arriving(tmp_path, 9_000_000, lambda: now[0])
    assert told() == "downloading: 1.0 MB of about 9.0 MB"
    (blobs / "half.incomplete").write_bytes(b"x" * 2_000_000)
    now[0] = 30.0
    assert told() == "downloading: 3.0 MB of about 9.0 MB, left 1:30"
    assert Arriving(tmp_path, None)() == "downloading: 3.0 MB"
    with (blobs / "whole from the beginning").open("wb") as file:
        file.truncate(5_000_000)
    assert arrived(tmp_path) < 3_100_000
