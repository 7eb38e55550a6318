"""The rehearsal: a model written in the hub's layout, and the user's own commands on it, measured phase by phase."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from typer.testing import CliRunner

from scripts.rehearsal import __main__ as rehearse
from scripts.rehearsal import writing
from scripts.rehearsal.measured import PHASES, Meter, main
from scripts.rehearsal.models import REHEARSALS, Network
from scripts.rehearsal.report import table

BILLIONS = {
    "sd3": {"transformer": 2.03, "text_encoder": 0.124, "text_encoder_2": 0.695, "text_encoder_3": 4.76},
    "sd35": {"transformer": 2.24},
    "flux2-klein-4b": {"transformer": 3.88, "text_encoder": 4.02},
    "flux1": {"transformer": 11.9, "text_encoder": 0.123, "text_encoder_2": 4.76, "vae": 0.084},
    "zimage": {"transformer": 6.15, "text_encoder": 4.02},
    "qwenimage": {"transformer": 20.4, "text_encoder": 8.29, "vae": 0.127},
}
PICKSCORE = 0.986


def size(network: Network) -> float:
    """In billions; weights that repeat others' are counted once."""
    assert isinstance(network.build, partial)
    small = {"pos_embed_max_size": 8} if network.build.func is SD3Transformer2DModel else {}  # no parameters
    with init_empty_weights():
        state = network.build(**small).state_dict()
    return sum(tensor.numel() for name, tensor in state.items() if name not in network.tied) / 1e9


@pytest.mark.parametrize("name", BILLIONS)
def test_the_networks_have_the_published_sizes(name: str) -> None:
    made = REHEARSALS[name]
    found = {part: size(made.networks[part]) for part in BILLIONS[name]}
    assert found == pytest.approx(BILLIONS[name], rel=0.03)
    assert size(made.pickscore) == pytest.approx(PICKSCORE, rel=0.01)


def test_weights_are_written_in_parts_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD", 20_000)
    made = REHEARSALS["small"]
    writing.write_model(made, tmp_path)
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert {key for key in scheduler if key[0] != "_"} == {"num_train_timesteps", "shift"}  # as published
    folder = tmp_path / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    where = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 2 and {path.name for path in shards} == set(where.values())
    with safe_open(shards[0], framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - safe_open is no mapping
    matrices = [tensor.float() for tensor in tensors if tensor.dim() > 1 and tensor.dtype == torch.bfloat16]
    assert matrices and all(0 < tensor.std() < 0.03 for tensor in matrices)
    written = {path: path.stat().st_mtime_ns for path in shards}
    writing.write_model(made, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in shards} == written


def test_both_stages_pictures_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, one command after another, as `scripts/rehearse small` does in processes of their own."""
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    made = REHEARSALS["small"]
    rehearse.write(made, tmp_path)
    done = []
    for command in rehearse.COMMANDS:
        record = tmp_path / f"{command}.json"
        assert main(record, rehearse.arguments(command, made, tmp_path, made.sizes[0])) == 0, command
        done.append(json.loads(record.read_text()) | {"command": command})
    phases = {each["command"]: {phase["phase"]: phase for phase in each["phases"]} for each in done}
    of_rewards = {"rollout", "rewards", "gradient of rewards", "gradient of decode"}
    assert phases["distill"].keys() == PHASES.keys() - of_rewards | {"all"}
    assert of_rewards | {"fake turn", "generator turn", "save"} < phases["tune-reward"].keys()
    assert "encode prompts" not in phases["sample"]  # all in the cache: no encoder is loaded
    for found in phases.values():
        assert all(0 < phase["peak_anonymous_gib"] <= phase["peak_rss_gib"] for phase in found.values())
        assert all(phase["peak_live_gib"] > 0 for phase in found.values())
        assert found["all"]["flops"] > 0 and found["all"]["seconds"] >= found["load"]["seconds"]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1 and (tmp_path / "export/README.md").is_file()
    done[0]["planned_gib"] = {"fake turn": 0.5}
    head = {"name": "small", "size": 32, "disk_gib": 1.0, "seconds_writing": 1.0}
    shown = table(head | {"commands": [each | {"exit_code": 0} for each in done]})
    row = next(line for line in shown.splitlines() if line.startswith("| distill | fake turn | 1 |"))
    assert row.endswith(f"| 0.50 | {phases['distill']['fake turn']['peak_live_gib'] / 0.5:.2f} |")


def test_the_plan_of_what_is_rehearsed(tmp_path: Path) -> None:
    """The rehearsal's own settings can be planned, and the built-in phases have their names."""
    made = REHEARSALS["small"]
    rehearse.write(made, tmp_path)
    values = rehearse.settings(made, tmp_path, made.sizes[0])[1::2]
    assert (
        {"fake turn", "generator turn", "decode"}
        < rehearse.planned(made, values, "distill").keys()
        < set(PHASES) | {"sample grid", "rollout"}
    )


def test_a_phase_inside_itself_counts_once() -> None:
    meter = Meter()
    with meter.live, meter.phase("turn"):
        with meter.phase("turn"), meter.phase("inner"):
            _ = torch.ones(4, 8) @ torch.ones(8, 2)
        _ = torch.ones(4, 8) @ torch.ones(8, 2)
    assert meter.phases["turn"].calls == 1
    assert (meter.phases["inner"].flops, meter.phases["turn"].flops) == (128, 256)


def test_an_unknown_model_is_refused() -> None:
    done = CliRunner().invoke(rehearse.app, ["sd4"])
    assert done.exit_code == 2 and "small, sd3, sd35" in done.output


def test_settings_of_ones_own() -> None:
    made = rehearse.changed(REHEARSALS["small"], ["tune_reward.images_per_epoch=2"])
    assert "tune_reward.images_per_epoch=2" in rehearse.settings(made, Path("here"), 32)
    wrong = CliRunner().invoke(rehearse.app, ["small", "--set", "tune_reward.images_an_epoch=2"])
    assert wrong.exit_code == 2 and "images_per_epoch" in wrong.output
